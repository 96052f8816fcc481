"""The past of the sequences being generated: keys and values in softmax layers, a D x D state in lightning layers."""

from dataclasses import dataclass

import torch
from m1_kernels import lightning_attention, lightning_attention_step, softmax_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_m1.generation.blocks import BlockPool, block_runs

__all__ = ["BLOCK_TOKENS", "HybridCache", "Prefix", "blocks_for"]

BLOCK_TOKENS = 64

# Keys (elements per sequence, padded to the longest) from which attention reads them in place, sequence by sequence,
# rather than gather the blocks of all sequences for one call.
IN_PLACE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens`."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class _Sequence:
    blocks: list[int]
    length: int
    """Tokens in the cache, those of the pass in progress included."""
    runs: list[tuple[int, int]]


@dataclass(frozen=True)
class Prefix:
    """A past that further sequences may start from, whatever becomes of the one it was taken of."""

    length: int
    blocks: list[int]
    states: dict[int, Tensor]


@dataclass(frozen=True)
class _Pass:
    """One forward pass over `tokens` real tokens of the sequences in slots first, ..., then padding."""

    first: int
    counts: list[int]
    tokens: int
    predicting: Tensor
    rows: Tensor
    """[tokens] place of each token in a pool seen as [blocks * BLOCK_TOKENS, ...]."""
    decode: bool
    fresh: bool
    """Prefill: no sequence has a past."""
    cu_seqlens: Tensor | None = None
    visible: Tensor | None = None
    """Decode, gathered: [sequences, 1, 1, longest] bool, which cached positions a token sees."""
    tables: Tensor | None = None
    """Decode, gathered: the blocks of all sequences, one sequence after the other."""


class HybridCache:
    """Past of up to `slots` sequences in the layers of one rank; an `AttentionCache` (model/cache.py) for them.

    Sequences fill slots 0, 1, ... without gaps. `add` and `fork` begin one, `remove` ends it. A pass begins with
    `start_prefill` or `start_decode`; both give the position ids [1, n] of the pass, n being the tokens padded to a multiple
    of their argument `pad_to`, at least once. Padding takes no part in any attention. With no sequence at all the pass is padding alone,
    for ranks that must keep step with others.

    Keys and values lie in `blocks` blocks of BLOCK_TOKENS tokens per softmax layer, 2 * KV groups * D values of `dtype` a
    token; a sequence owns its blocks from the start, so that none ever has to give way. Per slot and lightning layer:
    heads * D * D fp32.
    """

    def __init__(
        self,
        layer_types: dict[int, int],
        *,
        slots: int,
        blocks: int,
        longest: int,
        heads: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """layer_types: 1-based layer number -> 0 lightning, 1 softmax, of this rank's layers; longest: tokens of a sequence at most;
        heads, groups: local."""
        self.slots, self.device = slots, device
        self.pool = BlockPool(blocks)
        self._sequences: list[_Sequence] = []
        self._tables = torch.zeros(slots, blocks_for(longest), dtype=torch.int64)
        self._states: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._token_elements = groups * head_dim
        for number, kind in layer_types.items():
            if kind == 0:
                self._states[number] = torch.zeros(slots, heads, head_dim, head_dim, device=device)
            else:
                # Zeros, not empty: masked positions count with weight 0, and 0 * NaN is NaN.
                shape = (blocks, BLOCK_TOKENS, groups, head_dim)
                self._keys[number] = torch.zeros(shape, dtype=dtype, device=device)
                self._values[number] = torch.zeros(shape, dtype=dtype, device=device)
        self._pass: _Pass | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache of each sequence, by slot."""
        return [sequence.length for sequence in self._sequences]

    def add(self, capacity: int) -> None:
        """An empty sequence of at most `capacity` tokens in the next slot."""
        for state in self._states.values():
            state[len(self._sequences)].zero_()
        self._append(self.pool.take(blocks_for(capacity)), 0)

    def snapshot(self, slot: int) -> Prefix:
        """What is in `slot` now; to be given back to `forget`."""
        sequence = self._sequences[slot]
        blocks = sequence.blocks[: blocks_for(sequence.length)]
        self.pool.share(blocks)
        return Prefix(sequence.length, blocks, {number: state[slot].clone() for number, state in self._states.items()})

    def fork(self, prefix: Prefix, capacity: int) -> None:
        """A sequence of at most `capacity` tokens that goes on from `prefix`, in the next slot.

        Full blocks are shared, a last one that is partly filled is copied.
        """
        whole = prefix.length // BLOCK_TOKENS
        shared, own = prefix.blocks[:whole], self.pool.take(blocks_for(capacity) - whole)
        self.pool.share(shared)
        if prefix.length % BLOCK_TOKENS:
            for store in (self._keys, self._values):
                for pool in store.values():
                    pool[own[0]].copy_(pool[prefix.blocks[whole]])
        for number, state in self._states.items():
            state[len(self._sequences)].copy_(prefix.states[number])
        self._append(shared + own, prefix.length)

    def forget(self, prefix: Prefix) -> None:
        """No further sequence starts from `prefix`."""
        self.pool.release(prefix.blocks)

    def remove(self, slot: int) -> None:
        """End the sequence in `slot`; that of the last slot moves there."""
        last = len(self._sequences) - 1
        self.pool.release(self._sequences[slot].blocks)
        if slot != last:
            for state in self._states.values():
                state[slot].copy_(state[last])
            self._tables[slot] = self._tables[last]
            self._sequences[slot] = self._sequences[last]
        self._sequences.pop()

    def start_prefill(self, first: int, counts: list[int], *, pad_to: int = 1) -> Tensor:
        """Position ids of a pass over the next counts[i] tokens of slot first + i; for exactness against training all but the
        last of a sequence are multiples of its chunk (64)."""
        sequences = self._sequences[first : first + len(counts)]
        starts = [sequence.length for sequence in sequences]
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.length += count
            assert blocks_for(sequence.length) <= len(sequence.blocks), "the sequence outgrows its capacity"
        ends = torch.tensor([0, *counts]).cumsum(0)
        lengths = ends.diff()
        positions = torch.arange(int(ends[-1])) + (
            torch.tensor(starts, dtype=torch.int64) - ends[:-1]
        ).repeat_interleave(lengths)
        slot_of = torch.arange(first, first + len(counts)).repeat_interleave(lengths)
        return self._begin(
            positions,
            slot_of,
            pad_to,
            first=first,
            counts=counts,
            predicting=ends[1:] - 1,
            fresh=not any(starts),
            cu_seqlens=ends.to(torch.int32).to(self.device) if counts else None,
        )

    def start_decode(self, *, pad_to: int = 1) -> Tensor:
        """Position ids of a pass over one more token of every sequence."""
        sequences = self._sequences
        count = len(sequences)
        positions = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int64)
        for sequence in sequences:
            sequence.length += 1
            assert blocks_for(sequence.length) <= len(sequence.blocks), "the sequence outgrows its capacity"
        slot_of = torch.arange(count)
        visible = tables = None
        longest = blocks_for(max(self.lengths, default=0))
        elements = longest * BLOCK_TOKENS * self._token_elements
        if count and self._keys and (elements < IN_PLACE_ELEMENTS[self.device.type]):
            tables = self._tables[:count, :longest].flatten().to(self.device)
            visible = (torch.arange(longest * BLOCK_TOKENS) <= positions[:, None])[:, None, None].to(self.device)
        return self._begin(
            positions, slot_of, pad_to, first=0, counts=[1] * count, predicting=slot_of, visible=visible, tables=tables,
            decode=True,
        )  # fmt: skip

    def lightning(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        """See AttentionCache."""
        now = self._pass
        assert now is not None
        sequences = len(now.counts)
        if not sequences:
            return torch.zeros_like(q)
        state = self._states[layer_number][now.first : now.first + sequences]
        if now.decode:
            out = lightning_attention_step(q[0, :sequences], k[0, :sequences], v[0, :sequences], state, slopes)
            return _padded(out, q.shape[1])
        out, final = lightning_attention(
            q, k, v, slopes, initial_state=None if now.fresh else state, cu_seqlens=now.cu_seqlens,
            return_final_state=True,
        )  # fmt: skip
        state.copy_(final)
        return out

    def softmax(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """See AttentionCache."""
        now = self._pass
        assert now is not None
        if not now.counts:
            return torch.zeros_like(q)
        keys, values = self._keys[layer_number], self._values[layer_number]
        keys.flatten(0, 1).index_copy_(0, now.rows, k[0, : now.tokens])
        values.flatten(0, 1).index_copy_(0, now.rows, v[0, : now.tokens])
        if now.decode:
            return _padded(self._attend_decode(now, q[0, : now.tokens], keys, values, scale), q.shape[1])
        if now.fresh:
            return softmax_attention(q, k, v, scale=scale, cu_seqlens=now.cu_seqlens)
        parts = q[0, : now.tokens].split(now.counts)
        out = [
            softmax_attention(part[None], self._past(keys, slot)[None], self._past(values, slot)[None], scale=scale)[0]
            for slot, part in enumerate(parts, start=now.first)
        ]
        return _padded(torch.cat(out), q.shape[1])

    def predicting(self, hidden: Tensor) -> Tensor:
        """See AttentionCache."""
        assert self._pass is not None
        return hidden.index_select(0, self._pass.predicting)

    def _attend_decode(self, now: _Pass, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """[sequences, heads, D] from q [sequences, heads, D] and the pools."""
        # The query heads of a KV group stand where the queries of a sequence usually do.
        queries = q.unflatten(1, (keys.shape[2], -1))
        if now.tables is not None:
            k, v = (
                pool.index_select(0, now.tables).view(len(q), -1, *pool.shape[2:]).transpose(1, 2)
                for pool in (keys, values)
            )
            out = scaled_dot_product_attention(queries, k, v, attn_mask=now.visible, scale=scale)
            return out.flatten(1, 2)
        parts = []
        for slot in range(len(q)):
            k, v = (self._past(pool, slot).transpose(0, 1)[None] for pool in (keys, values))
            parts.append(scaled_dot_product_attention(queries[slot : slot + 1], k, v, scale=scale))
        return torch.cat(parts).flatten(1, 2)

    def _past(self, pool: Tensor, slot: int) -> Tensor:
        """[length, KV groups, D] of the sequence in `slot`: a view where its blocks are neighbours, else a copy."""
        sequence = self._sequences[slot]
        flat = pool.flatten(0, 1)
        parts, left = [], sequence.length
        for first, count in sequence.runs:
            tokens = min(count * BLOCK_TOKENS, left)
            parts.append(flat[first * BLOCK_TOKENS : first * BLOCK_TOKENS + tokens])
            left -= tokens
            if not left:
                break
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _append(self, blocks: list[int], length: int) -> None:
        slot = len(self._sequences)
        assert slot < self.slots, f"all {self.slots} slots are taken"
        self._tables[slot].zero_()
        self._tables[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int64)
        self._sequences.append(_Sequence(blocks, length, block_runs(blocks)))

    def _begin(
        self,
        positions: Tensor,
        slot_of: Tensor,
        pad_to: int,
        *,
        first: int,
        counts: list[int],
        predicting: Tensor,
        decode: bool = False,
        fresh: bool = False,
        cu_seqlens: Tensor | None = None,
        visible: Tensor | None = None,
        tables: Tensor | None = None,
    ) -> Tensor:
        tokens = len(positions)
        padded = max(-(-tokens // pad_to), 1) * pad_to
        position_ids = torch.zeros(1, padded, dtype=torch.int64)
        position_ids[0, :tokens] = positions
        rows = self._tables[slot_of, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        self._pass = _Pass(
            first=first,
            counts=counts,
            tokens=tokens,
            predicting=predicting.to(self.device) if counts else torch.zeros(1, dtype=torch.int64, device=self.device),
            rows=rows.to(self.device),
            decode=decode,
            fresh=fresh,
            cu_seqlens=cu_seqlens,
            visible=visible,
            tables=tables,
        )
        return position_ids.to(self.device)


def _padded(rows: Tensor, length: int) -> Tensor:
    """[1, length, ...]: rows [n, ...], then zeros."""
    if len(rows) == length:
        return rows[None]
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])[None]
