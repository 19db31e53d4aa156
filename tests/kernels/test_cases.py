"""Inputs that operations are checked and timed on: every size can be built, fits the operation and is counted."""

import inspect

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.cases import Cases, Inputs, Maker, Sizes, call, size

META = Maker(device=torch.device("meta"), dtype=torch.bfloat16)
SINGLE = Maker(device=torch.device("cpu"), dtype=torch.float32)
TIMED = [name for name, op in ops.OPS.items() if op.cases.inputs]


def sizes_of(cases: Cases) -> list[Sizes]:
    return [*(size.sizes for size in (*cases.gpu, *cases.quick)), *cases.aot.values(), cases.cpu(4, 64, 128)]


def fits(name: str, inputs: Inputs) -> bool:
    inspect.signature(ops.OPS[name]._implementations["reference"]).bind(**inputs.tensors, **inputs.options)
    return True


@pytest.mark.parametrize("name", TIMED)
def test_every_size_fits_the_operation_and_is_counted(name: str) -> None:
    cases = ops.OPS[name].cases
    for sizes in sizes_of(cases):
        inputs = cases.build(META, sizes)
        assert all(t.device.type == "meta" for t in inputs.tensors.values())
        assert cases.call is not call or fits(name, inputs)
        forward, *others = inputs.counts.values()
        assert forward.bytes >= sum(t.nbytes for t in inputs.tensors.values())
        assert len(others) == inputs.has_backward
        assert all(both.bytes > 2 * forward.bytes and both.flops >= 2 * forward.flops for both in others)


@pytest.mark.parametrize("name", ops.OPS)
def test_what_is_small_runs_on_a_cpu(name: str) -> None:
    op = ops.OPS[name]
    for sizes in (op.cases.quick[0].sizes, op.cases.cpu(2, 16, 64)):
        inputs = op.cases.build(SINGLE, sizes)
        out = op.cases.call(op, inputs.tensors, inputs.options)
        assert all(torch.isfinite(t).all() for t in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("name", ops.OPS)
def test_examples_repeat_and_have_less_without_what_is_optional(name: str) -> None:
    cases = ops.OPS[name].cases
    torch.manual_seed(3)
    first = cases.example()
    torch.manual_seed(3)
    second = cases.example()
    assert all(torch.equal(first[k], second[k]) for k in first)
    bare, options = cases.example(optional=False), cases.example_options(optional=False)
    assert bare.keys() <= first.keys()
    assert options.keys() <= cases.example_options().keys()
    assert fits(name, Inputs(tensors=bare, options=options, written=0))


def test_the_compile_gate_takes_the_first_size_unless_it_has_its_own() -> None:
    cases = Cases(example_tensors=dict, gpu=(size(B=1), size(B=2)), aot={"special": {"B": 3}})
    assert cases.aot_sizes() == {"B": 1}
    assert cases.aot_sizes("special") == {"B": 3}
    assert Cases(example_tensors=dict, gpu=(size(B=1),), aot={"": {"B": 4}}).aot_sizes() == {"B": 4}
