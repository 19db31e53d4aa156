"""What a training step spends its time on: that operators have kinds, and that what has none shows."""

import time
from pathlib import Path

import pytest
import torch
from crossover.archs import available
from crossover.benchmarks.harness.progress import StatusLine
from crossover.benchmarks.operations.contestants import BEFORE, OURS
from crossover.benchmarks.operations.models import profile_rows
from crossover.benchmarks.operations.options import KernelsConfig
from crossover.benchmarks.operations.profiles import KINDS, kind_of, shares, shares_by_kind
from crossover.benchmarks.operations.turns import model_of, our_step, profiling, window_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("arch", available())
def test_every_operator_of_ours_has_a_kind(arch: str) -> None:
    lm = model_of(arch, 300_000, 137)
    step, window = our_step(lm), window_of({"batch_size": 11, "length": 137})  # so many that kernels run
    work, facts = profiling(lambda: step(window))
    work(time.perf_counter)
    assert "step" in facts["names"]
    ours = {name: kind_of(arch, name) for name in facts["names"] if "crossover" in name}
    assert len(ours) >= 2
    assert None not in ours.values(), ours


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::add_", "arithmetic"),
        ("aten::embedding_dense_backward", "rest"),
        ("aten::native_layer_norm_backward", "norms"),
        ("autograd::engine::evaluate_function: MmBackward0", "rest"),
        ("crossover::ssd_cpu", "scans"),
        ("crossover::ssd_cpuBackward", "scans"),
        ("crossover::ssd_cpu_backward", "scans"),
        ("GeneratedBackwardFor_crossover_ssd_cpu_default", "scans"),
        ("GeneratedBackwardFor_crossover_ssd_cpu_defaultBackward", "scans"),
        ("crossover::newest_cpu", None),
        ("aten::mmm", None),
    ],
)
def test_an_operator_is_known_forward_and_backward_and_another_is_not(name: str, kind: str | None) -> None:
    assert kind_of("mamba2", name) == kind


@pytest.mark.quick
def test_the_convolution_of_h3_is_a_long_one() -> None:
    kinds = {arch: kind_of(arch, "crossover::causal_conv1d_cpuBackward") for arch in ("h3", "mamba")}
    assert kinds == {"h3": "long conv", "mamba": "short conv"}


@pytest.mark.quick
def test_shares_are_of_medians_and_sum_to_one_with_what_has_no_kind_under_its_own_name() -> None:
    found = shares([{"aten::mm": 5.0, "x": 1.0}, {"aten::mm": 6.0, "x": 2.0}, {"aten::mm": 99.0, "aten::cat": 7.0}])
    assert found == pytest.approx({"aten::mm": 6 / 7, "x": 1 / 7, "aten::cat": 0.0})
    kinds = shares_by_kind("mamba", found)
    assert tuple(kinds) == (*KINDS, "x")
    assert {kind: share for kind, share in kinds.items() if share} == pytest.approx({"products": 6 / 7, "x": 1 / 7})


def test_ours_and_another_checkout_are_profiled_by_turns(tmp_path: Path) -> None:
    config = KernelsConfig(archs=("mamba",), params=(60_000,), model_lengths=(9,), against=ROOT)
    before = torch.get_num_threads()
    (row,) = profile_rows(config, threads=[2], logs=tmp_path, status=StatusLine())
    assert torch.get_num_threads() == before
    assert row["errors"] == {}
    assert (row["n_params"], row["threads"]) == (pytest.approx(60_000, rel=0.02), 1)
    assert (row["seq_len"], row["batch_size"], row["repeats"]) == (9, 455, {OURS: 3, BEFORE: 3})
    assert row["ratios"].keys() == {BEFORE}
    for who in (OURS, BEFORE):
        assert row["kinds"][who]["scans"] > 0
        assert sum(row["kinds"][who].values()) == pytest.approx(1)
        assert "crossover::selective_scan_cpuBackward" in row["names"][who]
