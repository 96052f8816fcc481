"""SiLU whose result takes no memory between the forward and the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["transient_silu"]


def transient_silu(x: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
    """(silu(x), contiguous and differentiable; drop), for operators that save views of it for their backward pass.

    drop(result), once they have run, frees the memory of silu(x). It is filled again, with the same bits, from x when the gradient of
    `result` arrives, and given back when x has its own. Nothing may read silu(x) between; all gradients to it must come through `result`.
    """
    memory = _Memory(x.detach())
    return _Silu.apply(x, memory), memory.drop


@dataclass
class _Memory:
    """Of silu(x), or nothing once the backward pass is through: hooks outlive it."""

    x: Tensor | None
    y: Tensor | None = None

    def drop(self, result: Tensor) -> None:
        assert self.y is not None
        size = self.y.untyped_storage().nbytes()
        self.y.untyped_storage().resize_(0)
        result.register_hook(lambda _: self._fill(size))

    def _fill(self, size: int) -> None:
        if self.x is not None and self.y is not None:
            self.y.untyped_storage().resize_(size)
            torch.ops.aten.silu.out(self.x, out=self.y)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: _Memory) -> Tensor:
        ctx.save_for_backward(x)
        ctx.memory = memory
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # Not y itself, whose version would tell autograd that tensors saved by others were written to.
        memory.y = y.data
        return torch.ops.aten.silu.out(x, out=y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.memory.x = ctx.memory.y = None
        return torch.ops.aten.silu_backward(gradient, *ctx.saved_tensors), None
