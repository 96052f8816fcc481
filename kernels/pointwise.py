"""The layers' elementwise operators with hand-written backward passes: few passes over memory, little saved."""

from typing import Any

import torch

__all__ = ["gated_rms_norm", "rms_norm", "swiglu"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x; float32 inside (float64 for fp64).

    On CUDA this is torch's fused rms_norm; elsewhere torch decomposes that into six passes, so the passes here are ours.
    """
    if x.is_cuda:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * scale [n, F] in the dtype of gate_up, for gate_up [n, 2F] = [gate | up] and scale [n].

    Saves its inputs only. Computes in the dtype of gate_up, the gradient of scale in the dtype of scale.
    """
    return _SwiGLU.apply(gate_up, scale)


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, mean_square: torch.Tensor, eps: float
) -> torch.Tensor:
    """sigmoid(gate) * x / sqrt(mean_square + eps) * weight, in the dtype of x; float32 inside (float64 for fp64).

    x, gate: [..., C].  weight: [C].  mean_square: [..., 1], of all channels that share the norm: over a tensor-parallel group C are the
    local ones and mean_square is reduced; its gradient is returned, so its own computation is differentiated outside.
    """
    return _GatedScale.apply(x, gate, weight, mean_square, eps)


def _inner(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inner = x.to(_inner(x.dtype))
        scale = torch.linalg.vector_norm(inner, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (inner * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        weighted = grad * weight
        inner_product = torch.linalg.vecdot(weighted, normed).unsqueeze(-1).div_(x.shape[-1])
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return weighted.sub_(normed.mul_(inner_product)).mul_(scale).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, scale)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up).mul_(scale.to(gate_up.dtype).unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate_up, scale = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        scaled = grad * scale.to(gate_up.dtype).unsqueeze(-1)
        torch.mul(scaled, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(scaled.mul_(up), gate, grad_input=grad_gate)
        grad_scale = torch.linalg.vecdot(grad, activated.mul_(up)).to(scale.dtype)
        return grad_gate_up, grad_scale


class _GatedScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, mean_square: torch.Tensor, eps: float
    ) -> torch.Tensor:
        dtype = _inner(x.dtype)
        scale = (mean_square + eps).rsqrt_()
        ctx.save_for_backward(x, gate, weight, scale)
        return torch.sigmoid(gate.to(dtype)).mul_(x).mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, gate, weight, scale = ctx.saved_tensors
        dtype = scale.dtype
        share = torch.sigmoid(gate.to(dtype))
        normed = x.to(dtype) * scale
        grad_share = grad.to(dtype) * normed
        grad_weight = (grad_share * share).flatten(0, -2).sum(dim=0).to(weight.dtype)
        grad_gate = torch.ops.aten.sigmoid_backward(grad_share.mul_(weight), share)
        grad_normed = share.mul_(grad).mul_(weight)
        grad_mean_square = torch.linalg.vecdot(grad_normed, normed).unsqueeze(-1).mul_(scale.square()).mul_(-0.5)
        return grad_normed.mul_(scale).to(x.dtype), grad_gate.to(gate.dtype), grad_weight, grad_mean_square, None
