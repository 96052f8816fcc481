"""The layers' elementwise operators with hand-written backward passes: few passes over memory, little saved."""

from collections.abc import Callable
from typing import Any

import torch
from m1_kernels import triton_runtime
from m1_kernels.choice import Implementation, choose
from torch.autograd.function import once_differentiable

__all__ = ["gated_rms_norm", "rms_norm", "swiglu"]

AllReduce = Callable[[torch.Tensor], object]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x; float32 inside (float64 for fp64).

    On CUDA this is torch's fused rms_norm; elsewhere torch decomposes that into six passes, so the passes here are ours.
    """
    if x.is_cuda:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _rms_forward(x, weight, eps)[0]


def swiglu(gate_up: torch.Tensor, scale: torch.Tensor, *, implementation: str = "auto") -> torch.Tensor:
    """silu(gate) * up * scale [n, F] in the dtype of gate_up, for gate_up [n, 2F] = [gate | up] and scale [n].

    implementation: "auto", "triton" (one kernel each way, float32 inside) or "torch" (computes in the dtype of gate_up).
    Saves its inputs only. The gradient of scale is in the dtype of scale.
    """
    if gate_up.ndim != 2 or scale.shape != gate_up.shape[:1]:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} must be [n, 2F] and scale {tuple(scale.shape)} [n]")
    return choose("swiglu", SWIGLU, implementation, gate_up).run(gate_up, scale)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    channels: int | None = None,
    all_reduce: AllReduce | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """sigmoid(gate) * x / sqrt(mean(x^2) + eps) * weight, in the dtype of x; float32 inside (float64 for fp64).

    x, gate: [..., C], any strides.  weight: [C].
    channels, all_reduce: where C are the local channels of a norm that is spread over ranks, the number of all its channels, and a
        function that sums a contiguous float32 [..., 1] in place over those ranks. It is called once in each pass: with the sum of
        x^2 over the local channels, and with that of grad * sigmoid(gate) * weight * x.
    implementation: "auto", "triton" (one kernel each way, two with all_reduce) or "torch".

    Repeated runs are bitwise equal, gradients included.
    Source: MiniMax-01 report (arXiv 2501.08313), section 2.2, and the released code.
    """
    if x.shape != gate.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x {tuple(x.shape)} and gate {tuple(gate.shape)} must share one shape [..., C] "
            f"and weight {tuple(weight.shape)} must be [C]"
        )
    if (channels is None) != (all_reduce is None):
        raise ValueError("channels and all_reduce go together: pass both for a norm spread over ranks, else neither")
    chosen = choose("gated_rms_norm", GATED_RMS_NORM, implementation, x)
    return chosen.run(x, gate, weight, eps, x.shape[-1] if channels is None else channels, all_reduce)


def _inner(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _rms_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    inner = x.to(_inner(x.dtype))
    scale = torch.linalg.vector_norm(inner, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (inner * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, scale = _rms_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        weighted = grad * weight
        inner_product = torch.linalg.vecdot(weighted, normed).unsqueeze(-1).div_(x.shape[-1])
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return weighted.sub_(normed.mul_(inner_product)).mul_(scale).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """The pair (forward, backward) of one implementation as a differentiable function."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, scale: torch.Tensor, forward: Callable, backward: Callable):
        ctx.save_for_backward(gate_up, scale)
        ctx.backward_pass = backward
        return forward(gate_up, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (*ctx.backward_pass(grad, *ctx.saved_tensors), None, None)


def _swiglu_forward(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up).mul_(scale.to(gate_up.dtype).unsqueeze(-1))


def _swiglu_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    scaled = grad * scale.to(gate_up.dtype).unsqueeze(-1)
    torch.mul(scaled, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(scaled.mul_(up), gate, grad_input=grad_gate)
    grad_scale = torch.linalg.vecdot(grad, activated.mul_(up)).to(scale.dtype)
    return grad_gate_up, grad_scale


def _swiglu_torch(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return _swiglu_forward(gate_up, scale)
    return _SwiGLU.apply(gate_up, scale, _swiglu_forward, _swiglu_backward)


def _swiglu_triton(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from m1_kernels import triton_swiglu

    if not torch.is_grad_enabled():
        return triton_swiglu.forward(gate_up, scale)
    return _SwiGLU.apply(gate_up, scale, triton_swiglu.forward, triton_swiglu.backward)


class _GatedRMSNorm(torch.autograd.Function):
    """The pair (forward, backward) of one implementation as a differentiable function."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        channels: int,
        all_reduce: AllReduce | None,
        forward: Callable,
        backward: Callable,
    ) -> torch.Tensor:
        out, scale = forward(x, gate, weight, eps, channels, all_reduce)
        ctx.save_for_backward(x, gate, weight, scale)
        ctx.backward_pass, ctx.channels, ctx.all_reduce = backward, channels, all_reduce
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        gradients = ctx.backward_pass(grad, *ctx.saved_tensors, ctx.channels, ctx.all_reduce)
        return (*gradients, None, None, None, None, None)


def _gated_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    channels: int,
    all_reduce: AllReduce | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _inner(x.dtype)
    squares = x.to(dtype).square().sum(dim=-1, keepdim=True)
    if all_reduce is not None:
        all_reduce(squares)
    scale = squares.div_(channels).add_(eps).rsqrt_()
    return torch.sigmoid(gate.to(dtype)).mul_(x).mul_(scale).mul_(weight).to(x.dtype), scale


def _gated_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    channels: int,
    all_reduce: AllReduce | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = scale.dtype
    share = torch.sigmoid(gate.to(dtype))
    normed = x.to(dtype) * scale
    grad_share = grad.to(dtype) * normed
    grad_weight = (grad_share * share).flatten(0, -2).sum(dim=0).to(weight.dtype)
    grad_gate = torch.ops.aten.sigmoid_backward(grad_share.mul_(weight), share)
    grad_normed = share.mul_(grad).mul_(weight)
    product = torch.linalg.vecdot(grad_normed, x.to(dtype)).unsqueeze(-1)
    if all_reduce is not None:
        all_reduce(product)
    grad_x = grad_normed.sub_(normed.mul_(product.mul_(scale).div_(channels))).mul_(scale)
    return grad_x.to(x.dtype), grad_gate.to(gate.dtype), grad_weight


def _gated_torch(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, channels: int, all_reduce: AllReduce | None
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return _gated_forward(x, gate, weight, eps, channels, all_reduce)[0]
    return _GatedRMSNorm.apply(x, gate, weight, eps, channels, all_reduce, _gated_forward, _gated_backward)


def _gated_triton(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, channels: int, all_reduce: AllReduce | None
) -> torch.Tensor:
    from m1_kernels import triton_norm

    if not torch.is_grad_enabled():
        return triton_norm.forward(x, gate, weight, eps, channels, all_reduce)[0]
    passes = triton_norm.forward, triton_norm.backward
    return _GatedRMSNorm.apply(x, gate, weight, eps, channels, all_reduce, *passes)


def _gated_obstacle(x: torch.Tensor) -> str | None:
    obstacle = triton_runtime.obstacle(x)
    if obstacle is not None:
        return obstacle
    from m1_kernels.triton_norm import MAX_CHANNELS

    if x.shape[-1] > MAX_CHANNELS:
        return (
            f"a program holds a row of at most {MAX_CHANNELS} channels, not {x.shape[-1]}; use implementation='torch'"
        )
    return None


SWIGLU = {
    "triton": Implementation(_swiglu_triton, triton_runtime.obstacle, "one fused kernel each way", auto_on=("cuda",)),
    "torch": Implementation(_swiglu_torch, lambda x: None, "in-place passes over memory"),
}
GATED_RMS_NORM = {
    "triton": Implementation(_gated_triton, _gated_obstacle, "one fused kernel each way", auto_on=("cuda",)),
    "torch": Implementation(_gated_torch, lambda x: None, "in-place passes over memory"),
}
