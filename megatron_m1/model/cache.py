"""What the layers ask of a generation cache."""

from typing import Protocol

from torch import Tensor

__all__ = ["AttentionCache"]


class AttentionCache(Protocol):
    """The past of the sequences that one forward pass continues; it attends in the layers' stead and takes the new tokens in.

    layer_number: 1-based, global. q, k, v, o: [1, n, heads, D], the n tokens of the pass in one row, heads local; k and v of
    `softmax` are already rotated.
    """

    def lightning(
        self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *, strategy: str = "auto"
    ) -> Tensor:
        """o of a lightning layer; slopes [heads] fp32; strategy: see `m1_kernels.lightning_attention`."""

    def softmax(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """o of a softmax layer; k, v [1, n, KV groups, D]."""

    def predicting(self, hidden: Tensor) -> Tensor:
        """Rows [m, 1, h] of hidden [n, 1, h] that predict a next token."""
