"""Bytes that one context-parallel rank sends for one layer in one direction, from the shapes alone.

W ranks hold a dense sequence of N tokens in zig-zag order: 2W chunks of N / 2W tokens, rank r with chunks r and 2W-1-r. Collectives
count as their ring algorithm sends. Nothing here reads the code that it is compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "FADED",
    "Direction",
    "Method",
    "Shape",
    "all_to_all_bytes",
    "lightning_bytes",
    "softmax_bytes",
    "states_sent",
]

Method = Literal["ring", "all_gather"]
Direction = Literal["forward", "backward"]
FADED = 104.0
"""float32's e^-x is exactly 0 from here on (its smallest positive number is e^-103.28, half of it rounds to 0)."""
STATE_ITEM = GRADIENT_ITEM = 4
"""Bytes of a number of a lightning state, and of a gradient of keys and values on its way: float32."""


@dataclass(frozen=True)
class Shape:
    """One layer's attention over `world` ranks."""

    world: int
    tokens: int
    """N, over all ranks."""
    heads: int
    key_value_heads: int
    head_dim: int
    item: int = 2
    """Bytes of a number of q, k, v: 2 for bf16."""

    @property
    def local_tokens(self) -> int:
        return self.tokens // self.world

    @property
    def chunk_tokens(self) -> int:
        return self.tokens // (2 * self.world)

    def left_out(self, slopes: Sequence[float]) -> int:
        """Heads of which nothing is left after a chunk, so that their states end at the neighbour."""
        return sum(slope * self.chunk_tokens > FADED for slope in slopes)


def states_sent(rank: int, world: int) -> int:
    """States per head that go from this rank to another one: a state crosses the border behind (backward: in front of) each of its
    two chunks, but for the end of the sequence, which rank 0 holds, and the middle, where both chunks are rank W-1's."""
    return 2 - (rank == 0) - (rank == world - 1)


def lightning_bytes(shape: Shape, *, rank: int, method: Method, left_out: int = 0) -> int:
    """Forward or backward alike.

    ring: every head's states to their neighbours, whatever the horizon (it shortens the chain, not the bytes).
    all_gather: two states per rank and head to W-1 ranks; the `left_out` heads to their neighbours alone.
    """
    state = shape.head_dim**2 * STATE_ITEM
    to_neighbours = states_sent(rank, shape.world) * state
    if method == "ring":
        return to_neighbours * shape.heads
    gathered = 2 * (shape.world - 1) * state
    return gathered * (shape.heads - left_out) + to_neighbours * left_out


def softmax_bytes(shape: Shape, *, direction: Direction) -> int:
    """Ring and all-gather alike, on every rank: keys and values W-1 times, backward their fp32 gradients as often."""
    numbers = 2 * shape.local_tokens * shape.key_value_heads * shape.head_dim
    item = shape.item + (GRADIENT_ITEM if direction == "backward" else 0)
    return (shape.world - 1) * numbers * item


def all_to_all_bytes(shape: Shape) -> int:
    """Megatron's all-to-all, forward or backward: q, k, v from a share of the tokens to a share of the heads, o the way back; of each
    a rank keeps 1 / W. It needs W <= key_value_heads."""
    channels = (2 * shape.heads + 2 * shape.key_value_heads) * shape.head_dim
    return (shape.world - 1) * shape.local_tokens * channels * shape.item // shape.world
