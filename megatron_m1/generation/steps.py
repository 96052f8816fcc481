"""Attention of one more token of every sequence: over the host's tables on CPU, over tables of the device elsewhere."""

from dataclasses import dataclass
from typing import Protocol

import torch
from m1_kernels import lightning_attention_step_packed, softmax_attention_step
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_m1.generation.blocks import BLOCK_TOKENS, blocks_for
from megatron_m1.generation.products import VECTOR_ELEMENTS

__all__ = ["DecodeStep", "DeviceStep", "HostStep", "Sequence", "padded", "past"]

IN_PLACE_ELEMENTS = 1 << 16
"""Keys (elements per sequence, padded to the longest) from which attention on CPU reads them in place, sequence by sequence,
rather than gather the blocks of all sequences for one call."""


@dataclass
class Sequence:
    """What is in one slot."""

    blocks: list[int]
    length: int
    """Tokens in the cache, those of the pass in progress included."""
    runs: list[tuple[int, int]]

    def row(self, position: int) -> int:
        """Place of a token in a pool seen as [blocks * BLOCK_TOKENS, ...]."""
        return self.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


class DecodeStep(Protocol):
    """One decoding pass over n tokens; the arguments as in `HybridCache`, the layer's own state [slots, ...] or pools in front."""

    position_ids: Tensor

    def lightning(self, states: Tensor, qkv: Tensor, slopes: Tensor) -> Tensor: ...

    def softmax(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor: ...

    def predicting(self, hidden: Tensor) -> Tensor: ...


class DeviceStep:
    """Everything that depends on the sequences is read from tensors of the device, so that the same kernels serve every step."""

    def __init__(self, positions: Tensor, tables: Tensor, *, spare_row: int) -> None:
        """positions: int64 [n], -1 for padding; tables: int32 [n, blocks of the longest]; spare_row: first row of a block that
        no sequence owns, where padding puts its keys and values."""
        self._positions, self._tables, self._live = positions, tables, positions >= 0
        places = positions.clamp(min=0)
        self.position_ids = places[None]
        block = tables.gather(1, (places // BLOCK_TOKENS)[:, None]).squeeze(1)
        self._rows = (block * BLOCK_TOKENS + places % BLOCK_TOKENS).masked_fill_(~self._live, spare_row)

    def lightning(self, states: Tensor, qkv: Tensor, slopes: Tensor) -> Tensor:
        return lightning_attention_step_packed(qkv, states[: len(qkv)], slopes, active=self._live)

    def softmax(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        keys.flatten(0, 1).index_copy_(0, self._rows, k)
        values.flatten(0, 1).index_copy_(0, self._rows, v)
        return softmax_attention_step(q, keys, values, self._tables, self._positions, scale=scale)

    def predicting(self, hidden: Tensor) -> Tensor:
        return hidden


class HostStep:
    """The lengths are known to the host, so that no key behind them is touched."""

    def __init__(self, sequences: list[Sequence], positions: list[int], *, padded: int, invariant: bool) -> None:
        """padded: tokens of the pass, those behind the sequences' being padding. invariant: what a sequence gets does not depend on
        the others by a bit."""
        self._sequences, self._invariant = sequences, invariant
        self.position_ids = torch.tensor([positions + [0] * (padded - len(positions))])
        self._rows = torch.tensor([s.row(p) for s, p in zip(sequences, positions, strict=True)], dtype=torch.int64)
        self._tables: Tensor | None = None
        self._visible: Tensor | None = None

    def lightning(self, states: Tensor, qkv: Tensor, slopes: Tensor) -> Tensor:
        whole = self._invariant and qkv[0].numel() % VECTOR_ELEMENTS
        count = len(qkv) if whole else len(self._sequences)
        return padded(lightning_attention_step_packed(qkv[:count], states[:count], slopes), len(qkv))

    def softmax(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        count = len(self._sequences)
        if not count:
            return torch.zeros_like(q)
        keys.flatten(0, 1).index_copy_(0, self._rows, k[:count])
        values.flatten(0, 1).index_copy_(0, self._rows, v[:count])
        # The query heads of a KV group stand where the queries of a sequence usually do.
        queries = q[:count].unflatten(1, (keys.shape[2], -1))
        in_place = self._padded_keys() * keys[0, 0].numel() >= IN_PLACE_ELEMENTS
        if count == 1 or in_place or self._invariant:
            parts = []
            for slot, sequence in enumerate(self._sequences):
                mine = [past(pool, sequence).transpose(0, 1)[None] for pool in (keys, values)]
                parts.append(scaled_dot_product_attention(queries[slot : slot + 1], mine[0], mine[1], scale=scale))
            out = torch.cat(parts)
        else:
            k, v = self._gathered(keys, values)
            out = scaled_dot_product_attention(queries, k, v, attn_mask=self._visible, scale=scale)
        return padded(out.flatten(1, 2), len(q))

    def predicting(self, hidden: Tensor) -> Tensor:
        return hidden if self._invariant else hidden[: max(len(self._sequences), 1)]

    def _padded_keys(self) -> int:
        return blocks_for(max(s.length for s in self._sequences)) * BLOCK_TOKENS

    def _gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[sequences, KV groups, longest, D] each; what is behind a sequence's end is any block's."""
        longest = self._padded_keys()
        if self._tables is None:
            blocks = longest // BLOCK_TOKENS
            tables = [(s.blocks + [0] * blocks)[:blocks] for s in self._sequences]
            self._tables = torch.tensor(tables).flatten()
            lengths = torch.tensor([s.length for s in self._sequences])
            self._visible = (torch.arange(longest) < lengths[:, None])[:, None, None]
        shape = (len(self._sequences), longest, *keys.shape[2:])
        k, v = (pool.index_select(0, self._tables).view(shape).transpose(1, 2) for pool in (keys, values))
        return k, v


def past(pool: Tensor, sequence: Sequence) -> Tensor:
    """[length, KV groups, D] of a sequence: a view where its blocks are neighbours, else a copy."""
    flat = pool.flatten(0, 1)
    parts, left = [], sequence.length
    for first, count in sequence.runs:
        tokens = min(count * BLOCK_TOKENS, left)
        parts.append(flat[first * BLOCK_TOKENS : first * BLOCK_TOKENS + tokens])
        left -= tokens
        if not left:
            break
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def padded(rows: Tensor, length: int) -> Tensor:
    """rows [n, ...], then zeros up to `length` rows."""
    if len(rows) == length:
        return rows
    return pad(rows, [0, 0] * (rows.ndim - 1) + [0, length - len(rows)])
