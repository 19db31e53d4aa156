"""What a token must read, and what this processor does at most."""

import pytest
import torch
from crossover.archs import LanguageModel, available, build
from crossover.archs.layers import linear_flops
from crossover.benchmarks.operations.floors import matrices, reads_per_token
from crossover.benchmarks.operations.limits import CpuLimits, measure_limits, reading
from crossover.kernels.cases import Counts

pytestmark = pytest.mark.quick


@pytest.fixture(params=available())
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param, d_model=64, n_layers=2, vocab_size=97)


def test_a_token_reads_every_parameter_that_it_uses_and_the_state_of_its_context(lm: LanguageModel) -> None:
    reads = reads_per_token(lm, 64)
    unread = 0 if lm.backbone.positions is None else lm.backbone.positions.weight[1:].nbytes
    assert reads.weights == 4 * lm.n_active_params - unread
    assert reads.state == lm.init_state(1, 64, device="meta").nbytes
    assert reads.total == reads.weights + reads.state


def test_the_matrices_are_those_of_the_flops(lm: LanguageModel) -> None:
    products = sum(2 * matrix.numel() for matrix in matrices(lm))
    assert linear_flops(lm) + 2 * lm.output_weight.numel() <= products <= lm.flops_per_token(0)
    assert 4 * products / 2 <= reads_per_token(lm, 0).weights
    if {mixer for mixer, _ in lm.config.layers} == {"attention"}:  # which multiplies besides only what it sees
        assert products == lm.flops_per_token(-1)


def test_an_embedding_that_is_no_head_is_looked_up_and_no_matrix() -> None:
    tied, untied = (
        build("transformer", d_model=32, n_layers=1, vocab_size=97, tie_embeddings=tie) for tie in (True, False)
    )
    assert reads_per_token(untied, 8).weights == reads_per_token(tied, 8).weights + 4 * 32  # one row of the table
    assert len(matrices(untied)) == len(matrices(tied))


def test_a_token_reads_half_as_much_of_a_model_in_bfloat16() -> None:
    lm = build("transformer", d_model=32, n_layers=1, vocab_size=97)
    single = reads_per_token(lm, 8)
    half = reads_per_token(lm.bfloat16(), 8)
    assert (2 * half.weights, 2 * half.state) == (single.weights, single.state)


def test_limits_are_measured_and_between_two_sizes_lies_what_is_between_their_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("crossover.benchmarks.operations.limits._SIZES", (1 << 14, 1 << 16))
    limits = measure_limits(seconds=1e-4)
    assert limits.threads == torch.get_num_threads()
    assert 1e7 < limits.exps < 1e12
    assert 1e8 < limits.flops < 1e14
    assert all(1e8 < rate < 1e13 for rates in (limits.read, limits.copy) for rate in rates.values())
    given = CpuLimits(threads=1, exps=1e9, flops=1e11, read={1024: 8e9, 4096: 2e9}, copy={1024: 1e9, 4096: 4e9})
    assert [given.at(n).bytes for n in (1, 1024, 2048, 4096, 1e9)] == pytest.approx([8e9, 8e9, 5e9, 4e9, 4e9])
    assert given.at(1024).floor(Counts(bytes=8e9, flops=3e11, exps=1e9)) == (pytest.approx(3000), "flops")


def test_reading_goes_through_all_bytes() -> None:
    n_read, read = reading(10_000_000)
    assert n_read == pytest.approx(10_000_000, rel=1e-3)
    read()
    assert reading(1000)[0] > 1_000_000  # again and again, so that the call itself does not count
