import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.dispatch import use_backend


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [3, 1200])  # few rows go to PyTorch on the CPU
@pytest.mark.parametrize("backend", ops.rms_norm.backends)
def test_a_row_whose_squares_are_beyond_float_range_is_unknown_and_not_zero(
    backend: str, n_rows: int, dtype: torch.dtype
) -> None:
    n_rows = min(n_rows, 70) if backend == "triton" else n_rows
    x = torch.randn(n_rows, 33)
    x[1] *= 1e20
    x[2] *= 1e15  # large, and right
    x, weight = x.to(dtype).requires_grad_(), torch.rand(33, requires_grad=True)
    with use_backend(backend):
        y = ops.rms_norm(x, weight, 1e-5)
        gated = ops.gated_rms_norm(x[:, :30], torch.ones_like(x[:, :30]), weight[:30], 1e-5, n_groups=3)
    for values in (y, gated):
        unknown = values.isnan()
        assert unknown[1].all()
        assert not unknown[0].any()
        assert not unknown[2:].any()
    y[2:].float().square().sum().backward()
    assert x.grad is not None
    assert x.grad[2:].isfinite().all()
    y_alone = ops.rms_norm(x.detach()[2:], weight, 1e-5)
    torch.testing.assert_close(y[2:], y_alone, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-5)
