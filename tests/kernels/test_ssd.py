"""The SSD scan where test_ops.py does not look: sizes around chunks, groups of heads, decays that leave nothing."""

import itertools
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import Unsupported, use_backend
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

SSD = ops.OPS["ssd"]
BACKENDS = [name for name in SSD.backends if name != "reference"]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")
OPTIONAL = ("D", "z", "dt_bias", "initial_state", "starts")


def run(backend: str, tensors: dict[str, torch.Tensor], **others: Any) -> dict[str, torch.Tensor]:
    with use_backend(backend):
        return values_and_gradients(SSD, tensors, **others)


def inputs(B: int, L: int, G: int, per_group: int, P: int, N: int, given: frozenset[str]) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    H = G * per_group
    tensors = {
        "x": normal(B, L, H, P),
        "dt": normal(B, L, H) - 2,
        "A": -8 * torch.rand(H, dtype=torch.float64) - 0.1,
        "B": normal(B, L, G, N),
        "C": normal(B, L, G, N),
        "D": normal(H),
        "z": normal(B, L, H, P),
        "dt_bias": normal(H),
        "initial_state": normal(B, H, P, N),
        "starts": torch.rand(B, L) < 2 / L,
    }
    return {k: t for k, t in tensors.items() if k not in OPTIONAL or k in given}


SIZES = {
    "B": st.integers(1, 2),
    "L": st.integers(1, 150),
    "G": st.integers(1, 2),
    "per_group": st.integers(1, 3),
    "P": st.integers(1, 20),
    "N": st.integers(1, 20),
    "given": st.frozensets(st.sampled_from(OPTIONAL)),
    "chunk_len": st.sampled_from([None, 16, 32, 50]),
    "seed": st.integers(0, 2**16),
}
# the interpreter is too slow to shrink with
DRAWN = settings(phases=(Phase.explicit, Phase.generate))


def check(backend: str, chunk_len: int | None, seed: int, **sizes: Any) -> None:
    torch.manual_seed(seed)
    tensors = inputs(**sizes)
    expected = run("reference", tensors, dt_softplus=True)
    assert_same(run(backend, cast(tensors, torch.float32), dt_softplus=True, chunk_len=chunk_len), expected, 1e-5)


@settings(DRAWN, max_examples=16)
@given(backend=st.sampled_from([name for name in BACKENDS if name != "triton"]), **SIZES)
def test_the_cpu_matches_the_definition_for_any_sizes(backend: str, **drawn: Any) -> None:
    check(backend, **drawn)


@needs_triton
@settings(DRAWN, max_examples=6)
@given(**SIZES | {"B": st.just(1), "L": st.integers(1, 70), "per_group": st.integers(1, 2)})
def test_triton_matches_the_definition_for_any_sizes(**drawn: Any) -> None:
    check("triton", **drawn)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("L", [15, 16, 17, 32, 33, 65])
def test_chunk_boundaries_are_nothing_special(backend: str, L: int) -> None:
    tensors = inputs(1, L, 1, 2, 5, 3, frozenset(OPTIONAL))
    tensors["starts"] = torch.zeros(1, L, dtype=torch.bool)
    tensors["starts"][:, 15::16] = tensors["starts"][:, 16::16] = True
    expected = run("reference", tensors, dt_softplus=True)
    assert_same(run(backend, cast(tensors, torch.float32), dt_softplus=True, chunk_len=16), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_length_changes_nothing_but_rounding(backend: str) -> None:
    tensors = cast(ops.ssd.cases.example(B=1, L=70), torch.float32)
    whole = run(backend, tensors, dt_softplus=True, chunk_len=64)
    for chunk_len in (16, 32):
        assert_same(run(backend, tensors, dt_softplus=True, chunk_len=chunk_len), whole, 1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter: the overflow is meant
@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_that_leave_nothing_do_not_overflow(backend: str) -> None:
    tensors = ops.ssd.cases.example(B=1, L=40, optional=False)
    tensors["dt"] = 10.0 ** (8 * torch.rand(1, 40, 4, dtype=torch.float64) - 6)
    tensors["dt"][:, 7], tensors["dt"][:, 21:23] = 1e15, 0.0
    tensors["A"] = -torch.tensor([1e-3, 1.0, 1e3, 1e30], dtype=torch.float64)  # 1e30 * 1e15 is infinite in float32
    tensors["x"] /= tensors["dt"][..., None].clamp(min=1)  # the drive stays near one
    with use_backend("reference"):
        expected = SSD(**tensors)
    actual = run(backend, cast(tensors, torch.float32), chunk_len=16)
    assert all(torch.isfinite(t).all() for t in actual.values())
    assert relative_error(actual["output 0"], expected[0]) < 1e-5
    assert relative_error(actual["output 1"], expected[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_decay_keeps_the_gradients_of_what_is_left(backend: str) -> None:
    tensors = ops.ssd.cases.example(B=1, L=40, optional=False)
    tensors["A"] = -torch.tensor([1.0, 30.0, 300.0, 3000.0], dtype=torch.float64)
    expected = run("reference", tensors)
    # the sums of log decays that a chunk holds are large, and so is their rounding
    assert_same(run(backend, cast(tensors, torch.float32), chunk_len=16), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_separate_ones(backend: str) -> None:
    tensors, L = cast(ops.ssd.cases.example(B=1, L=50), torch.float32), 50
    bounds = [0, 5, 9, 32, 50]  # two in a chunk, one across chunks, one from a chunk's first token
    tensors["starts"] = torch.zeros(1, L, dtype=torch.bool)
    tensors["starts"][:, bounds[:-1]] = True
    others = ops.ssd.cases.example_options()
    with use_backend(backend):
        packed, last = SSD(**tensors, **others)
        for first, end in itertools.pairwise(bounds):
            alone = {k: t[:, first:end] if t.dim() > 2 and t.shape[1] == L else t for k, t in tensors.items()}
            alone = {k: t for k, t in alone.items() if k not in ("initial_state", "starts")}
            y, state = SSD(**alone, **others)
            torch.testing.assert_close(packed[:, first:end], y, atol=1e-5, rtol=1e-5)
            if end == L:
                torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_ignores_the_future_exactly(backend: str) -> None:
    tensors, others = cast(ops.ssd.cases.example(B=1, L=40), torch.float32), ops.ssd.cases.example_options()
    with use_backend(backend):
        y, _ = SSD(**tensors, **others)
        for cut in (10, 16, 31):
            changed = dict(tensors)
            for name in ("x", "dt", "B", "C", "z"):
                later = tensors[name].clone()
                later[:, cut:] = 5 * torch.randn_like(later[:, cut:])
                changed[name] = later
            assert torch.equal(SSD(**changed, **others)[0][:, :cut], y[:, :cut])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit_over_many_chunks(backend: str) -> None:
    tensors, others = cast(ops.ssd.cases.example(B=1, L=40), torch.float32), ops.ssd.cases.example_options()
    first, second = run(backend, tensors, **others), run(backend, tensors, **others)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outside_the_inputs_is_read(backend: str) -> None:
    tensors, others = cast(ops.ssd.cases.example(L=21), torch.float32), ops.ssd.cases.example_options()

    def surrounded(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        wide = torch.full([n + 6 for n in t.shape], float("nan"))
        inside = wide[tuple(slice(3, n + 3) for n in t.shape)]
        return inside.copy_(t)

    def whole_rows(t: torch.Tensor) -> torch.Tensor:
        """Contiguous numbers of a token, so that the kernels get this memory and not a copy."""
        if not t.is_floating_point() or t.dim() < 3:
            return t
        wide = torch.full((t.shape[0] + 2, t.shape[1] + 2, t[0, 0].numel() + 6), float("nan"))
        return wide[1:-1, 1:-1, 3:-3].unflatten(2, t.shape[2:]).copy_(t)

    with use_backend(backend):
        expected = SSD(**tensors, **others)
        for moved in (surrounded, whole_rows):
            actual = SSD(**{k: moved(t) for k, t in tensors.items()}, **others)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_selective_scan_with_one_decay_for_all_states(backend: str) -> None:
    dtype = torch.float64 if backend in ("reference", "torch") else torch.float32
    tensors = cast(ops.ssd.cases.example(L=30), dtype)
    tensors["B"], tensors["C"] = tensors["B"][:, :, :1], tensors["C"][:, :, :1]
    (H, P), N = tensors["x"].shape[2:], tensors["B"].shape[-1]
    channels = {
        "u": tensors["x"].flatten(2),
        "delta": tensors["dt"].repeat_interleave(P, dim=2),
        "A": tensors["A"].repeat_interleave(P)[:, None].expand(H * P, N),
        "B": tensors["B"][:, :, 0],
        "C": tensors["C"][:, :, 0],
        "D": tensors["D"].repeat_interleave(P),
        "z": tensors["z"].flatten(2),
        "delta_bias": tensors["dt_bias"].repeat_interleave(P),
        "initial_state": tensors["initial_state"].flatten(1, 2),
        "starts": tensors["starts"],
    }
    with use_backend("reference"):
        y, h = ops.selective_scan(**channels, delta_softplus=True)
    with use_backend(backend):
        y_heads, h_heads = SSD(**tensors, **ops.ssd.cases.example_options())
    torch.testing.assert_close(y_heads.flatten(2), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h_heads.flatten(1, 2), h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_heads_that_do_not_make_groups_are_refused(backend: str) -> None:
    tensors = cast(ops.ssd.cases.example(optional=False), torch.float32)
    tensors["B"] = tensors["C"] = torch.randn(2, 37, 3, 5)
    with use_backend(backend), pytest.raises(ValueError, match="H=4, G=3, expected H a multiple of G"):
        SSD(**tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_of_no_token_is_refused(backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match="chunk_len=0"):
        SSD(**cast(ops.ssd.cases.example(optional=False), torch.float32), chunk_len=0)


def test_torch_keeps_nothing_of_size_length_times_chunk() -> None:
    B, L, H, P, N = 1, 512, 2, 4, 2
    tensors = cast(inputs(B, L, 1, H, P, N, frozenset()), torch.float32)
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with use_backend("torch"), hooks:
        SSD(**{k: t.requires_grad_() for k, t in tensors.items()}, chunk_len=64)
    assert max(saved) <= B * L * H * P


@needs_triton
def test_heads_of_a_group_sum_alike_in_one_program_and_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossover.kernels.ssd import triton_kernels

    tensors = cast(inputs(1, 20, 1, 3, 4, 5, frozenset(OPTIONAL)), torch.float32)
    apart = run("triton", tensors, dt_softplus=True)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
    assert_same(run("triton", tensors, dt_softplus=True), apart, 1e-6)


@needs_triton
@pytest.mark.parametrize("most", [2, 3, 132])  # of 5 chunks: 3 and 2, 2 and 2 and 1, all by themselves
def test_a_sequence_cut_into_segments_is_still_one(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossover.kernels.ssd import triton_kernels

    for present in (frozenset(OPTIONAL), frozenset()):
        tensors = inputs(1, 70, 1, 1, 5, 3, present)
        if present:  # one document ends within a segment and one across segments; the last segment has no mark
            tensors["starts"] = torch.zeros(1, 70, dtype=torch.bool)
            tensors["starts"][:, [3, 20]] = True
        expected = run("reference", tensors, dt_softplus=True)
        monkeypatch.setattr(triton_kernels, "FILLED", most)
        monkeypatch.setattr(triton_kernels, "SEGMENT", 1)
        actual = run("triton", cast(tensors, torch.float32), dt_softplus=True, chunk_len=16)
        assert_same(actual, expected, 1e-5)


@needs_triton
@pytest.mark.parametrize(
    ("programs", "n_chunks", "chunks"), [(256, 1000, 1000), (67, 1000, 1000), (66, 1000, 500), (24, 64, 13), (1, 7, 7)]
)
def test_segments_are_as_many_as_fill_the_gpu(programs: int, n_chunks: int, chunks: int) -> None:
    from crossover.kernels.ssd import triton_kernels

    assert triton_kernels.segment_chunks(programs, n_chunks) == chunks


@needs_triton
def test_heads_wider_than_a_block_are_done_in_parts() -> None:
    tensors = inputs(1, 18, 1, 1, 70, 3, frozenset(OPTIONAL))
    expected = run("reference", tensors, dt_softplus=True)
    assert_same(run("triton", cast(tensors, torch.float32), dt_softplus=True, chunk_len=16), expected, 1e-5)


@needs_triton
def test_bfloat16_gradients_lose_no_more_than_their_rounding() -> None:
    tensors = cast(ops.ssd.cases.example(B=1, L=40), torch.bfloat16)
    expected = run("reference", cast(tensors, torch.float64), **ops.ssd.cases.example_options())
    # twice the usual tolerance: the interpreter cuts bits off where a GPU rounds
    assert_same(run("triton", tensors, **ops.ssd.cases.example_options()), expected, 3e-2)


@needs_triton
def test_heads_too_large_for_the_kernels_are_unsupported() -> None:
    with use_backend("triton"):
        with pytest.raises(Unsupported, match="heads of 129 x 4"):
            SSD(**cast(inputs(1, 2, 1, 1, 129, 4, frozenset()), torch.float32))
        with pytest.raises(Unsupported, match="float64"):
            SSD(**inputs(1, 2, 1, 1, 4, 4, frozenset()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_operators_are_registered_soundly(backend: str) -> None:
    from crossover.kernels.ssd import torch_impl

    t = {
        k: v.requires_grad_()
        for k, v in cast(ops.ssd.cases.example(B=1, L=20, E=3, N=2), torch.float32).items()
        if k != "starts"
    }
    scanned = (t["x"], t["dt"].exp(), t["A"], t["B"], t["C"])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if backend == "torch":
        torch.library.opcheck(torch_impl._scan, (*scanned, t["initial_state"], None, 16), test_utils=checks)
    else:
        from crossover.kernels.ssd import triton_kernels

        rest = (t["D"], t["z"], t["dt_bias"], t["initial_state"], None, True, 16)
        torch.library.opcheck(triton_kernels._ssd, (*scanned, *rest), test_utils=checks)


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors = cast(inputs(2, 41, 2, 3, 9, 19, frozenset(OPTIONAL)), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(run("cpu", tensors, dt_softplus=True))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_the_cpu_reads_and_writes_only_its_own_memory(guard_bands: Any) -> None:
    tensors = cast(inputs(2, 41, 2, 3, 9, 19, frozenset(OPTIONAL)), torch.float32)
    expected = run("cpu", tensors, dt_softplus=True)
    with guard_bands.watched() as allocated:
        actual = run("cpu", {k: guard_bands.surrounded(t) for k, t in tensors.items()}, dt_softplus=True)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert len(allocated) > 5
