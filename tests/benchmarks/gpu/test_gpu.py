"""The GPU run, all but its clock: floors, order, peers, rows, checks that find what is broken, and what is written."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.benchmarks.gpu import __main__ as gpu
from crossover.benchmarks.gpu import limits as gpu_limits
from crossover.benchmarks.gpu import peers as gpu_peers
from crossover.benchmarks.gpu import prepare as gpu_prepare
from crossover.benchmarks.gpu.__main__ import Setup, main, run, timed_rows
from crossover.benchmarks.gpu.cases import Spec, build, in_order, specs_of
from crossover.benchmarks.gpu.limits import CpuClock, CudaClock, Timing, measure_limits
from crossover.benchmarks.gpu.peers import racing
from crossover.benchmarks.gpu.prepare import Job, carry_out, jobs, run_jobs
from crossover.benchmarks.harness.limits import Limits
from crossover.benchmarks.harness.processes import Child
from crossover.benchmarks.operations.checks import checks_of
from crossover.benchmarks.operations.race_cases import Contestant, one_pass
from crossover.files import read_json_lines
from crossover.kernels import ops
from crossover.kernels.cases import Cases, Counts, size
from crossover.kernels.dispatch import Unsupported, use_backend
from torch import Tensor

from ..scripts import Script

STANDARD, QUICK = ([spec for name in ops.OPS for spec in specs_of(name, quick=quick)] for quick in (False, True))
CPU, META = torch.device("cpu"), torch.device("meta")
H200 = Limits(bytes=4.3e12, flops=790e12, exps=132 * 16 * 1.98e9)


def steady(work: Callable[[], object]) -> Timing:
    """A clock by which everything takes two milliseconds."""
    work()
    return Timing(ms=2.0, launch_ms=0.5, repeats=3)


def setup(out: Path, **changed: Any) -> Setup:
    settings: dict[str, Any] = {
        "names": ("rms_norm", "linear_cross_entropy"),
        "device": CPU,
        "backend": "torch",
        "dtype": torch.float32,
        "clock": steady,
        "seconds": 600.0,
        "parallel": 0,
        "quick": True,
        "with_peers": False,
        "out": out,
    }
    return Setup(**settings | changed)


def job(op: str, **changed: Any) -> Job:
    settings = {"device": "cpu", "backend": "torch", "timed_dtype": "float32", "quick": True, "with_peers": False}
    return Job(**{"op": op, "dtype": None} | settings | changed)


def spec(op: str, specs: list[Spec] = QUICK, **sizes: int) -> Spec:
    return next(spec for spec in specs if spec.op == op and sizes.items() <= dict(spec.size.sizes).items())


def replace(monkeypatch: pytest.MonkeyPatch, op: str, function: Callable[..., Any], backend: str = "cpu") -> None:
    """Gives an operation a backend, and leaves it no other but the reference and plain PyTorch."""
    found = ops.OPS[op]._implementations
    kept = {name: found[name] for name in ("reference", "torch")}
    monkeypatch.setattr(ops.OPS[op], "_implementations", kept | {backend: function})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("op", "sizes", "which", "ms", "what"),
    [
        ("selective_scan", {"B": 8, "L": 2048}, "fwd", 0.161, "exps"),
        ("selective_scan", {"B": 8, "L": 2048}, "fwd+bwd", 0.161 + 0.168, "exps"),
        ("ssd", {"B": 8, "L": 2048}, "fwd", 0.038, "flops"),
        ("attention", {"L": 4096, "P": 128}, "fwd", 0.348, "flops"),
        ("attention", {"L": 4096, "P": 128}, "fwd+bwd", 0.348 + 0.87, "flops"),
        ("attention", {"L": 1}, "fwd", 0.250, "bytes"),
        ("causal_conv1d", {}, "fwd", 0.031, "bytes"),
        ("causal_conv1d", {}, "fwd+bwd", 0.031 + 0.047, "bytes"),
        ("gated_rms_norm", {}, "fwd", 0.047, "bytes"),
        ("linear_cross_entropy", {}, "fwd+bwd", 12.8, "flops"),
        ("state_update", {}, "fwd", 0.031, "bytes"),
    ],
)
def test_floors_at_standard_sizes_are_those_of_the_arithmetic(
    op: str, sizes: dict[str, int], which: str, ms: float, what: str
) -> None:
    counts = build(spec(op, STANDARD, **sizes), META, torch.bfloat16).inputs.counts[which]
    floor = H200.floor(counts)
    assert floor is not None
    assert floor == (pytest.approx(ms, rel=0.03), what)


def test_no_prediction_beats_its_floor() -> None:
    predicted = [spec for spec in STANDARD if spec.size.predicted]
    assert len(predicted) > 10
    for spec in predicted:
        counts = build(spec, META, torch.bfloat16).inputs.counts
        for which, (least, most) in spec.size.predicted.items():
            floor = H200.floor(counts[which])
            assert floor is not None
            assert floor[0] * 0.97 < least < most


def test_the_slowest_limit_is_the_floor_and_what_is_not_known_is_none() -> None:
    counts = Counts(bytes=2e12, flops=3e12) + Counts(bytes=0, exps=5e12)
    assert Limits(bytes=1e12, flops=1e12, exps=1e12).floor(counts) == (5000.0, "exps")
    assert Limits(bytes=1e12, flops=1e12).floor(counts) == (3000.0, "flops")
    assert Limits().floor(counts) is None


def test_a_window_counts_only_the_keys_it_shows() -> None:
    L, W = 13, 5
    spec = Spec(op="attention", size=size(B=1, L=L, H=1, H_kv=1, P=16, W=W))
    pairs = sum(1 for q, k in itertools.product(range(L), repeat=2) if q - W < k <= q)
    assert build(spec, META, torch.bfloat16).inputs.counts["fwd"].flops == 4 * 16 * pairs


def test_every_operation_is_timed_the_important_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    important = ["selective_scan", "ssd", "attention", "causal_conv1d", "rms_norm", "gated_rms_norm"]
    assert in_order([*ops.OPS][::-1]) == list(ops.OPS)
    assert list(ops.OPS)[: len(important)] == important
    for name, quick in itertools.product(ops.OPS, (True, False)):
        assert {spec.op for spec in specs_of(name, quick=quick)} == {name}
    # as an operation would be that nobody has given sizes to
    monkeypatch.setattr(ops.ssm_scan, "_cases", Cases(example_tensors=ops.ssm_scan.cases.example_tensors))
    (spec,) = specs_of("ssm_scan", quick=True)
    case = build(spec, CPU, torch.float32)
    ours = racing(case, "torch", with_peers=True)["ours"]
    assert isinstance(ours, Contestant)
    assert len(one_pass(ours, True)()) == 3  # u, A, C
    assert case.inputs.counts["fwd"].bytes > case.inputs.tensors["u"].nbytes


@pytest.mark.parametrize("spec", QUICK, ids=lambda spec: f"{spec.op} {spec.shape}")
def test_all_contestants_compute_the_same(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    gpu_peers._compiled_flex_attention.cache_clear()
    gpu_peers._compiled_loss.cache_clear()
    case = build(spec, CPU, torch.float32)
    found = racing(case, "torch", with_peers=True)
    for who in ("cudnn", "cuDNN LSTM"):  # needs a GPU; has weights of its own
        found.pop(who, None)
    for t in case.inputs.tensors.values():  # PyTorch's FlexAttention does not differentiate on the CPU
        t.requires_grad_(False)
    racers = {who: c for who, c in found.items() if isinstance(c, Contestant)}
    with use_backend("reference"):
        expected = ops.OPS[spec.op].cases.call(ops.OPS[spec.op], case.inputs.tensors, case.inputs.options)
    for who, contestant in racers.items():
        out = one_pass(contestant, False)()
        y, x = (t[0] if isinstance(t, tuple) else t for t in (out, expected))
        torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4, msg=lambda text, who=who: f"{who}: {text}")
    assert set(found) >= {"ours", *gpu_peers.PEERS.get(spec.op, {})} - {"cudnn", "cuDNN LSTM"}


def library(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    """Pretends that a library is installed."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(functions)


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, output_final_state: bool
) -> tuple[Tensor, Tensor]:
    h, ys = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        h = g[:, t].exp()[..., None, None] * h + k[:, t, ..., None] * v[:, t, :, None]
        ys.append(scale * torch.einsum("bhn,bhnp->bhp", q[:, t], h))
    return torch.stack(ys, dim=1), h


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    assert chunk_size == 32
    return ops.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus)[0]


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert all(t.is_contiguous() for t in (u, delta, B, C, z))
    y, _ = ops.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, delta_bias, delta_softplus)
    return y.mT


def causal_conv1d_fn(x, weight, bias=None, activation=None):
    return F.silu(F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1]))


def test_libraries_get_our_inputs_in_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    library(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    library(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    library(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    for op, who in (
        ("ssd", "mamba_ssm"),
        ("ssd", "fla"),
        ("selective_scan", "mamba_ssm"),
        ("causal_conv1d", "causal_conv1d"),
    ):
        case = build(spec(op), CPU, torch.float32)
        with use_backend("torch"):
            found = racing(case, "torch", with_peers=True)
            theirs = found[who]
            assert isinstance(theirs, Contestant)
            y, *_ = out if isinstance(out := one_pass(theirs, False)(), tuple) else (out,)
            grads = one_pass(theirs, True)()
        assert all(g is not None and g.shape == leaf.shape for g, leaf in zip(grads, theirs.leaves, strict=True))
        if who == "fla":  # leaves out the skip connection
            y = y + case.inputs.tensors["D"][:, None] * case.inputs.tensors["x"]
        with use_backend("reference"):
            expected = ops.OPS[op](**case.inputs.tensors, **case.inputs.options)
        torch.testing.assert_close(y, expected[0], rtol=1e-4, atol=1e-4)


def test_a_library_that_is_absent_or_broken_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, "mamba_ssm")
    found = racing(build(spec("ssd"), CPU, torch.float32), "torch", with_peers=True)
    assert "not installed: ModuleNotFoundError: No module named 'fla'" in str(found["fla"])
    assert "mamba_ssm" in str(found["mamba_ssm"])
    monkeypatch.setattr(gpu_peers, "PEERS", {"ssd": {"odd": lambda case: {}["gone"]}})
    assert racing(build(spec("ssd"), CPU, torch.float32), "torch", with_peers=True)["odd"] == "KeyError: 'gone'"


class FakeCuda:
    """Stands for torch.cuda: a list of what happened, and a clock that each work sets on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.happened: list[str] = []
        self.ms = 0.0
        cuda = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.happened.append("event")
                self.at = cuda.ms

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.happened.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.happened.append("lead" if cycles > 0 else "none"))


def test_the_gpu_is_timed_between_events_after_a_lead_and_slow_works_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_limits, "_FLUSH_BYTES", 1024)
    cuda = FakeCuda(monkeypatch)
    takes = iter([9.0, 9.0, 3.0, 5.0, 4.0])

    def work() -> None:
        cuda.happened.append("work")
        cuda.ms += next(takes, 4.0)

    timing = CudaClock(CPU, seconds=1e-9)(work)
    assert cuda.happened == [
        "work",
        "synchronize",
        "work",
        "synchronize",
        "lead",
        "event",
        "work",
        "event",
        "synchronize",
    ]
    assert (timing.ms, timing.repeats) == (3.0, 1)
    timing = CudaClock(CPU, seconds=10.0)(work)
    assert timing.repeats == 200
    assert timing.ms == 4.0
    assert 0 < timing.launch_ms < 10


def test_limits_are_measured_and_a_fast_copy_is_a_high_rate() -> None:
    limits = measure_limits(CPU, steady, quick=True)
    assert limits == Limits(bytes=2 * 2**20 / 2e-3, flops=2 * 128**3 / 2e-3)
    assert CpuClock(seconds=0.0)(lambda: time.sleep(0.002)).ms >= 2


@pytest.mark.quick
def test_a_row_holds_rates_floor_prediction_and_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(op="rms_norm", size=size({"fwd": (1.0, 2.0)}, T=8, D=16))
    monkeypatch.setattr(gpu, "specs_of", lambda name, quick: [spec])
    x = torch.ones(1)
    peers = {
        "good": lambda case: Contestant(run=lambda: x, leaves=[]),
        "bad": lambda case: Contestant(run=lambda: 1 / 0, leaves=[]),
        "late": lambda case: Contestant(run=lambda: x, leaves=[]),
    }
    monkeypatch.setattr(gpu_peers, "PEERS", {"rms_norm": peers})
    ready = {("rms_norm", "T=8 D=16", "fwd", who): None for who in ("ours", "good", "bad")}
    limits = Limits(bytes=1e6)
    rows = timed_rows(
        setup(tmp_path, names=["rms_norm"], with_peers=True), limits, ready, deadline=time.monotonic() + 60
    )
    forward, both = rows
    n_bytes = 2 * 8 * 16 * 4 + 16 * 4
    assert forward["status"] == "ok"
    assert (forward["ms"], forward["launch_ms"], forward["predicted_ms"]) == (2.0, 0.5, (1.0, 2.0))
    assert forward["floor_ms"] == pytest.approx(n_bytes / 1e3)
    assert forward["percent_of_floor"] == pytest.approx(100 * n_bytes / 1e3 / 2)
    assert forward["tb_per_second"] == pytest.approx(n_bytes / 2e-3 / 1e12)
    assert forward["peers"]["good"] == {"ms": 2.0, "launch_ms": 0.5, "ratio": 1.0}
    assert forward["peers"]["bad"] == {"absent": "ZeroDivisionError: division by zero"}
    assert forward["peers"]["late"] == {"absent": "was not ready in time"}
    assert both["pass"] == "fwd+bwd"
    assert both["predicted_ms"] is None
    assert both["bytes"] > 2 * forward["bytes"]


def test_what_fails_is_a_row_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **others: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    def refuse(*arguments: Any, **others: Any) -> Tensor:
        raise Unsupported("only on Sundays")

    for function, reason in (
        (full, "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"),
        (refuse, "Sundays"),
    ):
        replace(monkeypatch, "rms_norm", function)
        rows = list(timed_rows(setup(tmp_path, backend="cpu"), H200, {}, deadline=time.monotonic() + 60))
        assert [row["status"] for row in rows] == ["failed", "failed", "ok", "ok"]
        assert all(reason in row["reason"] for row in rows[:2])
        json.dumps(rows, allow_nan=False)
    ready = {("linear_cross_entropy", spec("linear_cross_entropy").shape, "fwd", "ours"): "ValueError: no"}
    *_, last, _ = timed_rows(setup(tmp_path), H200, ready, deadline=time.monotonic() + 60)
    assert (last["status"], last["reason"]) == ("failed", "ValueError: no")


def test_what_does_not_fit_is_listed_as_left_out(tmp_path: Path) -> None:
    assert run(setup(tmp_path, seconds=1e-9), command=["gpu"]) == 0
    rows = read_json_lines(tmp_path / "gpu.jsonl")
    assert {row["status"] for row in rows if row["kind"] == "time"} == {"left out"}
    assert {row["status"] for row in rows if row["kind"] == "check"} == {"not checked"}
    page = (tmp_path / "gpu.md").read_text()
    assert "## What was left out" in page
    assert "rms\\_norm, T=32 D=32: no time left" in page


@pytest.mark.quick
def test_a_run_writes_every_finding_with_its_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--quick", "--backend", "torch", "--processes", "0", "--skip-peers"]
    assert main([*words, "--out", str(tmp_path), "--ops", "grouped_mm", "rms_norm"]) == 0
    rows = read_json_lines(tmp_path / "gpu.jsonl")
    timed = [(row["op"], row["pass"], row["status"]) for row in rows if row["kind"] == "time"]
    assert timed == [(op, which, "ok") for op in ("rms_norm", "grouped_mm") for which in ("fwd", "fwd+bwd")]
    assert {row["dtype"] for row in rows if row["kind"] == "check"} == {"float32", "bfloat16", "float16"}
    assert all("gpu" in row["provenance"]["command"] and row["provenance"]["git_commit"] for row in rows)
    text, page = capsys.readouterr().out, (tmp_path / "gpu.md").read_text()
    assert text.count("\n") > len(rows)
    assert "hostname" not in page
    assert not (tmp_path / "processes").exists()
    assert page.count("| rms\\_norm |") == page.count("| grouped\\_mm |") == 2


def test_a_stopped_run_leaves_the_table_of_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **others: Any) -> Iterator[dict[str, Any]]:
        yield from itertools.islice(rows(*arguments, **others), 1)
        raise KeyboardInterrupt

    rows = gpu.timed_rows
    monkeypatch.setattr(gpu, "timed_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        run(setup(tmp_path), command=["gpu"])
    assert (tmp_path / "gpu.md").read_text().count("| rms\\_norm |") == 1
    assert [row["kind"] for row in read_json_lines(tmp_path / "gpu.jsonl")][-1] == "time"


def reference_norm(*arguments: Any, **others: Any) -> Tensor:
    return ops.rms_norm._implementations["reference"](*arguments, **others)


def test_a_kernel_wrong_at_the_sizes_that_are_timed_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(
        monkeypatch, "rms_norm", lambda x, weight, eps: reference_norm(x, weight, eps) * (1 + 0.1 * (x.shape[1] == 32))
    )
    assert run(setup(tmp_path, backend="cpu", names=["rms_norm"]), command=["gpu"]) == 1
    failed = [row for row in read_json_lines(tmp_path / "gpu.jsonl") if row.get("status") == "failed"]
    assert {(row["kind"], row["shape"]) for row in failed} == {
        ("check", "T=32 D=32, fwd"),
        ("check", "T=32 D=32, fwd+bwd"),
    }
    assert "differs from plain PyTorch's by 1.0e-01" in failed[0]["reason"]
    assert "FAILED" in (tmp_path / "gpu.md").read_text()


def test_unwritten_memory_and_results_that_change_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = reference_norm(x, weight, eps)
        hole = torch.empty_like(y) if torch.are_deterministic_algorithms_enabled() else y.detach()
        return torch.cat([y[:, :-1], hole[:, -1:]], dim=1)

    runs = itertools.count()

    def changing(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference_norm(x, weight, eps) * (1 + 1e-6 * (next(runs) == 3))

    def reasons(function: Callable[..., Tensor]) -> list[str | None]:
        replace(monkeypatch, "rms_norm", function)
        examples = [{"L": 5, "E": 6, "N": 4, "optional": True}]
        found = list(checks_of("rms_norm", "cpu", "cpu", torch.float32, examples=examples, repeats=5))
        return [check.reason for check in found]

    assert reasons(reference_norm) == [None]
    assert reasons(unwritten)[0] == "output 0 is off by inf, allowed 2.0e-05"
    assert reasons(changing) == ["output 0 is not the same in 5 runs"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_examples_for_a_gpu_take_several_blocks_and_suit_every_operation() -> None:
    for name in ops.OPS:
        cases = ops.OPS[name].cases
        for sizes in cases.blocks:
            assert sizes["L"] > 128
            cases.example(**sizes)


@pytest.mark.quick
def test_a_job_tells_who_is_ready_and_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(case: Any) -> Contestant:
        return Contestant(run=lambda: 1 / 0, leaves=[])

    def full(case: Any) -> Contestant:
        def run() -> Tensor:
            raise torch.OutOfMemoryError

        return Contestant(run=run, leaves=[])

    monkeypatch.setattr(gpu_peers, "PEERS", {"rms_norm": {"crash": crash, "full": full}})
    replace(monkeypatch, "rms_norm", reference_norm)
    rows = list(carry_out(job("rms_norm", backend="cpu", with_peers=True)))
    ready = {(row["pass"], row["who"]): row["error"] for row in rows if row["kind"] == "ready"}
    assert {who for _, who in ready} == {"ours", "torch", "crash"}
    assert ready["fwd", "crash"] == "ZeroDivisionError: division by zero"
    assert ready["fwd+bwd", "ours"] is None
    assert [row["status"] for row in rows if row["kind"] == "check"] == ["ok", "ok"]
    assert next(carry_out(job("rms_norm", dtype="float16", backend="cpu")))["dtype"] == "float16"
    assert list(carry_out(job("rms_norm", dtype="float16", backend="triton"))) == []  # has none just now


def test_processes_that_die_or_take_too_long_are_told_and_leave_their_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, dies, sleeps = (job(op, dtype="float32") for op in ("rms_norm", "grouped_mm", "long_conv"))
    script = Script(
        "print('a line of some library', flush=True)",
        "parent.send({'kind': 'check', 'op': order, 'status': 'ok'})",
        "if order == 'grouped_mm': raise ValueError('an illegal memory access')",
        "if order == 'long_conv': time.sleep(60)",
    )
    monkeypatch.setattr(gpu_prepare, "Child", lambda work, job, log, preload: Child(script, job.op, log=log))
    deadline = time.monotonic() + 5
    rows = list(run_jobs([good, dies, sleeps, job("ssd")], parallel=3, folder=tmp_path, deadline=deadline))
    assert time.monotonic() < deadline + 10
    found = {(row["op"], row["status"]): row.get("reason") for row in rows}
    assert found["grouped_mm", "failed"] == "its process died: ValueError: an illegal memory access"
    assert found["long_conv", "not checked"] == "did not end in time"
    assert {(op, "ok") for op in ("rms_norm", "grouped_mm", "long_conv")} <= found.keys()
    assert {path.name for path in tmp_path.glob("*.log")} == {"grouped_mm-float32.log", "long_conv-float32.log"}
    late = run_jobs([job("ssd")], parallel=1, folder=tmp_path, deadline=0)
    assert [(row["op"], row["status"], row["reason"]) for row in late] == [("ssd", "not checked", "no time left")]


def test_jobs_begin_with_the_important_operations() -> None:
    shared = vars(job("ssd"))
    shared = {k: shared[k] for k in ("device", "backend", "timed_dtype", "quick", "with_peers")}
    found = jobs(["ssd", "rms_norm"], **shared)
    assert [(job.op, job.dtype) for job in found[:5]] == [
        ("ssd", None), ("ssd", "float32"), ("ssd", "bfloat16"), ("ssd", "float16"), ("rms_norm", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--ops", "rms_morn"], "did you mean 'rms_norm'?"),
        (["--device", "cpu", "--seconds", "0"], "--seconds must be positive"),
        ([], "with PyTorch for CUDA"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_mistakes_and_a_missing_gpu_end_with_one_line_and_code_2(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*words, "--out", str(tmp_path / "gpu")]) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "gpu").exists()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter")
def test_the_kernel_that_measures_exponentials_takes_them() -> None:
    from crossover.benchmarks.gpu.triton_kernels import BLOCK, exponentials

    x = torch.arange(BLOCK) / BLOCK
    for _ in range(3):
        x = torch.exp2(-x)
    torch.testing.assert_close(exponentials(2, 3, CPU), x.expand(2, BLOCK))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels in Triton's interpreter")
def test_triton_kernels_are_checked_and_timed(tmp_path: Path) -> None:
    assert run(setup(tmp_path, names=["rms_norm"], backend="triton"), command=["gpu"]) == 0
    rows = read_json_lines(tmp_path / "gpu.jsonl")
    checks = [(row["dtype"], row["status"]) for row in rows if row["kind"] == "check" and row["backend"] == "triton"]
    assert len(checks) == 5
    assert {status for _, status in checks} == {"ok"}
    timed = [(row["backend"], set(row["peers"])) for row in rows if row["kind"] == "time"]
    assert timed == [("triton", {"torch"})] * 2


def test_contributing_shows_commands_that_are_understood() -> None:
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    shown = re.findall(r'^make gpu(?: GPU="(.*?)")? ', text, re.MULTILINE)
    assert len(shown) == 5
    for words in shown:
        asked = gpu._parser().parse_args(words.split())
        assert set(asked.ops) <= ops.OPS.keys()
    assert "--ops" in " ".join(shown)
    assert "--quick" in " ".join(shown)


BLOCKER = """
import sys

class Refuse:
    names = {"tyro", "datasets", "tensorboard", "matplotlib", "transformers", "rich", "tokenizers", "numba", "einops"}
    names |= {"safetensors"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.slow
def test_it_runs_through_the_link_where_little_more_than_pytorch_is_installed(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    (tmp_path / "crossover").symlink_to(root)
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    code = "import sys, crossover.benchmarks.gpu.__main__ as gpu; print(gpu.__file__); sys.exit(gpu.main(sys.argv[1:]))"
    words = [
        "--device",
        "cpu",
        "--quick",
        "--backend",
        "torch",
        "--processes",
        "2",
        "--skip-peers",
        "--ops",
        "rms_norm",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith(str(tmp_path / "crossover"))
    rows = read_json_lines(tmp_path / "out" / "gpu.jsonl")
    assert [row["status"] for row in rows if row["kind"] == "time"] == ["ok", "ok"]
    assert {row["status"] for row in rows if row["kind"] == "check"} == {"ok"}
    assert all("torch" in row["provenance"] for row in rows)
