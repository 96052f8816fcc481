"""Products of fp32 matrices as sums of bf16 products, for tensor cores that add up in fp32."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_gradients_", "parts", "product_", "split_linear"]

_LARGEST = torch.finfo(torch.bfloat16).max
_CHAIN = 2048
"""Terms of a sum that the tensor cores add up. They round towards zero (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021), so
that the error grows with the length: on an H200 sums of 50,016 terms are right to 2^-14.0 relative (RMS) in one chain, to 2^-17.6,
2^-18.6 and 2^-19.5 in chains of 4096, 2048 and 1024; cuBLAS in fp32 to 2^-18.7. Chains are added up by rounding to nearest, each at the
price of reading and writing the result: 2048 cost nothing measurable, 1024 a twentieth of the time."""


def parts(x: Tensor, count: int, *, consume: bool = False) -> Iterator[Tensor]:
    """bf16 tensors that add up to fp32 `x`, each rounded from what the ones before leave: two to 2^-17 of every number, three to the
    last bit. With count=1, or if x is bf16, x itself is the only one.

    consume: with count=3, x is overwritten between one part and the next, which saves a copy of it.
    NaN stays NaN; an infinity makes products with it infinite or NaN. Finite numbers beyond bf16's largest are first cut to that, as
    rounding would make them infinite. Parts below 2^-133 are lost.
    """
    if count == 1 or x.dtype == torch.bfloat16:
        yield x
        return
    assert x.dtype == torch.float32, f"bf16 parts are of fp32 or bf16, not of {x.dtype}"
    part = x.to(torch.bfloat16).clamp_(-_LARGEST, _LARGEST)
    yield part
    for _ in range(count - 2):
        x = x.sub_(part) if consume else x - part
        consume = True
        part = x.to(torch.bfloat16)
        yield part
    yield torch.sub(x, part, out=torch.empty_like(part))


def product_(
    out: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], count: int, *, place: int = 0, add: bool = False
) -> Tensor:
    """out = a @ b, or with `add` out += a @ b, for a and b in parts; out is fp32 (count=1: of their type).

    count: parts i and j are multiplied if i + j < count; the others' products are below what a further part would hold. Relative to
    |a| @ |b| that drops at most 2^-15 with two parts and 2^-23 with three; if a or b is a single bf16 part, 2^-17 and nothing.
    place: that of a[0] among the parts of its matrix.
    """
    for i, left in enumerate(a, place):
        for j, right in enumerate(b[: count - i]):
            length = left.shape[1]
            # Only the first product is large enough for the rounding of a long chain to be seen.
            step = _CHAIN if count > 1 and i == j == 0 else length
            for start in range(0, length, step):
                span = slice(start, start + step)
                _multiply_(out, left[:, span], right[span], add)
                add = True
    return out


def linear_gradients_(
    grad: Tensor,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    count: int,
    *,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    consume: bool = False,
) -> None:
    """grad_x = grad @ weight and grad_weight += grad^T @ x, where given, for x and weight in parts.

    A single part of grad exists at a time. consume: grad may be overwritten.
    """
    for place, part in enumerate(parts(grad, count, consume=consume)):
        if grad_x is not None:
            product_(grad_x, [part], weight, count, place=place, add=place > 0)
        if grad_weight is not None:
            product_(grad_weight, [part.t()], x, count, place=place, add=True)


def split_linear(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """x @ weight^T [..., V] fp32 by products of `count` parts; x [..., h] fp32 or bf16, weight [V, h] fp32. Gradients likewise."""
    return _SplitLinear.apply(x, weight, count)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.count = count
        rows = x.reshape(-1, x.shape[-1])
        out = weight.new_empty(len(rows), len(weight))
        product_(out, list(parts(rows, count)), [part.t() for part in parts(weight, count)], count)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad_x = weight.new_empty(rows.shape) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        linear_gradients_(
            grad.reshape(-1, len(weight)),
            list(parts(rows, ctx.count)),
            list(parts(weight, ctx.count)),
            ctx.count,
            grad_x=grad_x,
            grad_weight=grad_weight,
        )
        return None if grad_x is None else grad_x.view_as(x).to(x.dtype), grad_weight, None


def _multiply_(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if a.dtype != out.dtype and not out.is_cuda:
        # torch has no bf16 products with an fp32 result on a CPU; products of bf16 numbers are exact in fp32.
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
