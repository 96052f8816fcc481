"""Inputs, plain formulas and the comparison that the tests of norms and SwiGLU share."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def plain_swiglu(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up * scale.unsqueeze(-1)


def plain_gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.sigmoid(gate) * plain_rms_norm(x, weight, eps)


def run(operator: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[out, gradient of each input], from a gradient of out that is rounded to its dtype."""
    out = operator(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Numbers that bf16 holds exactly, so that every precision sees the same.
    return [out, *torch.autograd.grad(out, inputs, grad.bfloat16().to(out.device, out.dtype))]


def assert_matches_fp64(
    operator: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> None:
    """Output and gradients of `operator` against float64 autograd of `plain` on the same numbers, with dtypes and shapes."""
    exact = run(plain, [x.detach().double().requires_grad_() for x in inputs])
    for actual, expected, like in zip(run(operator, inputs), exact, [inputs[0], *inputs], strict=True):
        assert actual.dtype == like.dtype
        tolerance = max(TOLERANCE[like.dtype], TOLERANCE[inputs[0].dtype] if actual.ndim == 1 else 0.0)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
