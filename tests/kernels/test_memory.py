"""Nothing that a kernel is given can make it read or write outside its tensors: values that are places, and strides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.cases import Maker
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import Unsupported, triton_can_run, use_backend
from torch import Tensor

BACKENDS = [(name, backend) for name, op in ops.OPS.items() for backend in op.backends if backend != "reference"]
needs_triton = pytest.mark.skipif(not triton_can_run(), reason="Triton cannot run here")


def strided(t: Tensor) -> Tensor:
    """Every other number of a larger tensor."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0] if t.dim() else t


def expanded(t: Tensor) -> Tensor:
    """One number along the last axis."""
    return t[..., :1].expand(t.shape) if t.dim() else t


@pytest.mark.parametrize(
    ("name", "backend"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair[1] == "triton" else ()) for pair in BACKENDS],
)
def test_inputs_may_lie_in_memory_as_they_like(name: str, backend: str) -> None:
    op, options = ops.OPS[name], ops.OPS[name].cases.example_options(L=5)
    tensors = cast(op.cases.example(B=2, L=5, E=3, N=3), torch.float32)
    real = {k for k, t in tensors.items() if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool}
    for view in (strided, expanded):

        def laid_out(view: Any = view, *, copied: bool, **given: Tensor) -> Any:
            views = {k: view(t) if k in real else t for k, t in given.items()}
            return op(**{k: t.contiguous() if copied else t for k, t in views.items()}, **options)

        with use_backend(backend):
            found = values_and_gradients(laid_out, tensors, copied=False)
            assert_same(found, values_and_gradients(laid_out, tensors, copied=True), 1e-6)


@pytest.mark.parametrize("backend", ops.attention.backends)
@pytest.mark.parametrize("L", [1, 5])
def test_a_cache_that_is_said_to_be_longer_than_it_is_is_not_left(guard_bands: Any, backend: str, L: int) -> None:
    q, k, v = (guard_bands.surrounded(torch.randn(2, n, 2, 7)) for n in (L, 13, 13))
    for kv_len in (14, 2**31 + 5, 2**40):
        with use_backend(backend):
            o = ops.attention(q, k, v, causal=False, kv_len=torch.tensor(kv_len))
        assert torch.isfinite(o).all()
    for first_key in (-(2**40), -3, 14, 2**33):
        with use_backend(backend):
            o = ops.attention(q, k, v, first_key=torch.tensor([first_key, 0]), kv_len=torch.tensor(13))
        assert torch.isfinite(o[1]).all()


@needs_triton
@pytest.mark.parametrize("counts", [[30, 1, 9], [-5, 45, 0], [2**40, 0, 2**62], [-(2**62), 3, 2]], ids=str)
def test_counts_of_other_rows_stay_inside(counts: list[int]) -> None:
    from crossover.kernels.grouped_mm import triton_kernels

    firsts = triton_kernels.bounds(torch.tensor(counts), 21, 16)[0].tolist()
    assert firsts[0] == 0
    assert firsts == sorted(firsts)
    assert firsts[-1] <= 21


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("counts", [[30, 1, 9], [-5, 26, 0], [1, 2, 3]], ids=str)
def test_counts_that_the_host_reads_are_checked(backend: str, counts: list[int]) -> None:
    with use_backend(backend), pytest.raises(ValueError, match=r"^grouped_mm: counts are .* of 21 rows$"):
        ops.grouped_mm(torch.randn(21, 5), torch.randn(3, 7, 5), torch.tensor(counts))


@needs_triton
@pytest.mark.parametrize("target", [11, 16, 2**40, -1, -(2**40)])
def test_a_target_that_is_no_class_shows_in_the_loss(target: int) -> None:
    targets = torch.tensor([3, target, 5])
    with use_backend("triton"):
        loss, _ = ops.linear_cross_entropy(torch.randn(3, 4), torch.randn(11, 4), targets)
    assert loss.isnan()


@needs_triton
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS if backend == "triton"])
def test_grids_are_within_limits_for_millions_of_tokens(name: str) -> None:
    from crossover.kernels.triton_kernels import MOST_PROGRAMS, record_launches

    cases, make = ops.OPS[name].cases, Maker(device=torch.device("meta"), dtype=torch.bfloat16)
    sizes = dict(cases.gpu[0].sizes)
    if name != "state_update":
        sizes |= {"T": 10**8 if name == "grouped_mm" else 10**6} if "T" in sizes else {"L": 10**7}
    inputs = cases.build(make, sizes)
    tensors = {k: t if t.dtype == torch.int64 else t.requires_grad_() for k, t in inputs.tensors.items()}
    with record_launches() as launches, use_backend("triton"):
        out = cases.call(ops.OPS[name], tensors, inputs.options)
        torch.stack([t.real.sum().float() for t in (out if isinstance(out, tuple) else (out,))]).sum().backward()
    # PyTorch's FFT at this length, and kernels inside an operator
    assert launches or name in ("long_conv", "linear_cross_entropy")
    for launch in launches:
        assert all(0 < n <= most for n, most in zip(launch.grid, MOST_PROGRAMS, strict=False)), launch.kernel


class Kernel:
    """In the place of a kernel of Triton: does as it is told, and remembers what device was current."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.devices = error, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        self.devices.append(Devices.current)
        if self.error:
            raise self.error


class Devices:
    """In the place of torch.cuda.device_of."""

    current = 0

    def __init__(self, x: Tensor) -> None:
        self.index, self.before = getattr(x, "place", 0), Devices.current

    def __enter__(self) -> None:
        Devices.current = self.index

    def __exit__(self, *_: object) -> None:
        Devices.current = self.before


@needs_triton
def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossover.kernels.triton_kernels import launch

    monkeypatch.setattr(torch.cuda, "device_of", Devices)
    x, kernel = torch.zeros(1), Kernel()
    x.place = 1  # pyright: ignore[reportAttributeAccessIssue]
    launch(kernel, (1,), None, 3, x)
    assert kernel.devices == [1]
    assert Devices.current == 0


@needs_triton
def test_what_a_device_has_no_room_for_is_unsupported() -> None:
    from crossover.kernels.triton_kernels import launch
    from triton.runtime.errors import OutOfResources

    with pytest.raises(Unsupported, match="shared memory"):
        launch(Kernel(OutOfResources(102_400, 101_376, "shared memory")), (1,), torch.zeros(1))
    for grid in ((1, 2**16), (1, 1, 2**16), (2**31,)):
        with pytest.raises(Unsupported, match="grid"):
            launch(Kernel(), grid, torch.zeros(1))
    launch(Kernel(), (2**31 - 1, 2**16 - 1, 2**16 - 1), torch.zeros(1))


@needs_triton
@pytest.mark.parametrize(
    ("room", "chosen"),
    [
        (232_448, [(64, 2), (32, 2)]),
        (166_912, [(64, 2), (32, 2)]),
        (101_376, [(64, 1), (16, 2)]),  # compiled for sm_86 they take 98,304 and 84,096 bytes
        (65_536, None),
    ],
)
def test_wide_heads_train_where_backward_fits_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch, room: int, chosen: list[tuple[int, int]] | None
) -> None:
    from crossover.kernels.attention import triton_kernels
    from crossover.kernels.triton_kernels import record_launches

    monkeypatch.setattr(triton_kernels, "shared_memory", lambda _: room)
    q = torch.empty(1, 100, 1, 256, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with record_launches() as launches:
        triton_kernels.attention(q.detach(), q.detach(), q.detach())
        if chosen is None:
            with pytest.raises(Unsupported, match=f"shared memory, and meta has {room}"):
                triton_kernels.attention(q, q, q)
        else:
            triton_kernels.attention(q, q, q).sum().backward()
            options = [launch.options for launch in launches[-2:]]
            assert [(each["BLOCK_M"], each["num_stages"]) for each in options] == chosen


@needs_triton
@pytest.mark.parametrize(("room", "Q"), [(232_448, 64), (163_840, 64), (163_839, 32), (101_376, 16), (65_536, None)])
def test_large_states_train_in_chunks_that_fit_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch, room: int, Q: int | None
) -> None:
    from crossover.kernels.ssd import triton_kernels
    from crossover.kernels.triton_kernels import record_launches

    monkeypatch.setattr(triton_kernels, "shared_memory", lambda _: room)
    x, B = (torch.empty(1, 100, 1, n, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (128, 256))
    dt, A = torch.empty(1, 100, 1, device="meta"), torch.empty(1, device="meta")
    with record_launches() as launches:
        if Q is None:
            with pytest.raises(Unsupported, match=f"shared memory, and meta has {room}"):
                triton_kernels.ssd(x, dt, A, B, B)
        else:
            triton_kernels.ssd(x, dt, A, B, B)[0].sum().backward()
            assert [launch.options["Q"] for launch in launches if "heads" in launch.kernel.__name__] == [Q]


def test_a_gpu_says_how_much_shared_memory_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from crossover.kernels.triton_kernels import shared_memory

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=device.index)
    )
    assert shared_memory(torch.device("cuda:3")) == 3
    assert shared_memory(torch.device("cpu")) == shared_memory(torch.device("meta")) > 2**20
