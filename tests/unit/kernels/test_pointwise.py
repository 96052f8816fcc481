"""Norms and SwiGLU against plain autograd and finite differences."""

import pytest
import torch
from m1_kernels import gated_rms_norm, rms_norm, swiglu
from torch.nn.functional import silu


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def plain_rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def plain_swiglu(gate_up, scale):
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up * scale.unsqueeze(-1)


def plain_gated_rms_norm(x, gate, weight, mean_square, eps):
    return torch.sigmoid(gate) * x * torch.rsqrt(mean_square + eps) * weight


CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 0.1), lambda x, w: plain_rms_norm(x, w, 0.1), [(3, 2, 6), (6,)]),
    "swiglu": (swiglu, plain_swiglu, [(5, 8), (5,)]),
    "gated_rms_norm": (
        lambda x, g, w, m: gated_rms_norm(x, g, w, m.square(), 0.1),
        lambda x, g, w, m: plain_gated_rms_norm(x, g, w, m.square(), 0.1),
        [(3, 2, 6), (3, 2, 6), (6,), (3, 2, 1)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    ours, plain, shapes = CASES[name]
    leaves = _leaves(*shapes)
    out, expected = ours(*leaves), plain(*leaves)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    ours, _, shapes = CASES[name]
    assert torch.autograd.gradcheck(ours, _leaves(*shapes))


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_near_fp64(name):
    ours, plain, shapes = CASES[name]
    leaves = _leaves(*shapes, dtype=torch.bfloat16)
    out = ours(*leaves)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves)
    torch.testing.assert_close(out.double(), plain(*[leaf.double() for leaf in leaves]), rtol=3e-2, atol=3e-2)


def test_swiglu_without_tokens():
    gate_up, scale = _leaves((0, 8), (0,))
    swiglu(gate_up, scale).sum().backward()
    assert gate_up.grad.shape == (0, 8)
