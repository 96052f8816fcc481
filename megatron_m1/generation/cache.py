"""The past of the sequences being generated: keys and values in softmax layers, a D x D state in lightning layers."""

import itertools
from dataclasses import dataclass

import torch
from m1_kernels import lightning_attention, softmax_attention
from torch import Tensor

from megatron_m1.generation.blocks import BLOCK_TOKENS, BlockPool, block_runs, blocks_for
from megatron_m1.generation.steps import DecodeStep, DeviceStep, HostStep, Sequence, padded, past
from megatron_m1.platform.transfer import upload

__all__ = ["HybridCache", "Prefix"]


@dataclass(frozen=True)
class Prefix:
    """A past that further sequences may start from, whatever becomes of the one it was taken of."""

    length: int
    blocks: list[int]
    states: dict[int, Tensor]


@dataclass(frozen=True)
class _Prefill:
    """A pass over the next counts[i] tokens of slot first + i, then padding."""

    first: int
    counts: list[int]
    predicting: Tensor
    rows: Tensor
    """[tokens] place of each token in a pool seen as [blocks * BLOCK_TOKENS, ...]."""
    fresh: bool
    """No sequence has a past."""
    cu_seqlens: Tensor | None


class HybridCache:
    """Past of up to `slots` sequences in the layers of one rank; an `AttentionCache` (model/cache.py) for them.

    Sequences fill slots 0, 1, ... without gaps. `add` and `fork` begin one, `remove` ends it. A pass begins with
    `start_prefill`, `start_decode` or `start_device_decode`, which give its position ids [1, n]; the first two pad the tokens to a
    multiple of their argument `pad_to`, at least once. Padding takes no part in any attention. With no sequence at all the pass is
    padding alone, for ranks that must keep step with others.

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
        on_device: bool,
        invariant: bool = False,
    ) -> None:
        """layer_types: 1-based layer number -> 0 lightning, 1 softmax, of this rank's layers; longest: tokens of a sequence at most;
        heads, groups: local; on_device: decoding passes begin with `start_device_decode`, not with `start_decode`.
        invariant: what a sequence gets does not depend by a bit on the others of its pass (CPU), provided that all sequences of a
        prefill have a past or none has; `slots` divides by every `pad_to`."""
        assert not (invariant and on_device)
        self.slots, self.device, self.on_device, self.invariant = slots, device, on_device, invariant
        self.pool = BlockPool(blocks)
        self._sequences: list[Sequence] = []
        self._device_tables = torch.zeros(slots, max(blocks_for(longest), 1), dtype=torch.int32, device=device)
        self._states: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for number, kind in layer_types.items():
            if kind == 0:
                self._states[number] = torch.zeros(slots, heads, head_dim, head_dim, device=device)
            else:
                # Zeros, not empty: masked positions count with weight 0, and 0 * NaN is NaN.
                shape = (blocks + on_device, BLOCK_TOKENS, groups, head_dim)
                self._keys[number] = torch.zeros(shape, dtype=dtype, device=device)
                self._values[number] = torch.zeros(shape, dtype=dtype, device=device)
        self._pass: _Prefill | None = None
        self._step: DecodeStep | None = None

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
            if self.on_device:
                self._device_tables[slot].copy_(self._device_tables[last])
            self._sequences[slot] = self._sequences[last]
        self._sequences.pop()

    def start_prefill(self, first: int, counts: list[int], *, pad_to: int = 1, predicting_pad_to: int = 1) -> Tensor:
        """Position ids of a pass over the next counts[i] tokens of slot first + i; for exactness against training all but the
        last of a sequence are multiples of its chunk (64). predicting_pad_to: divides the number of rows of `predicting`, of which
        those behind the sequences' are of no use."""
        sequences = self._sequences[first : first + len(counts)]
        starts = [sequence.length for sequence in sequences]
        positions: list[int] = []
        rows: list[int] = []
        for sequence, count in zip(sequences, counts, strict=True):
            new = range(sequence.length, sequence.length + count)
            sequence.length += count
            assert blocks_for(sequence.length) <= len(sequence.blocks), "the sequence outgrows its capacity"
            positions += new
            rows += [sequence.row(position) for position in new]
        ends = list(itertools.accumulate(counts, initial=0))
        predicting = [end - 1 for end in ends[1:]]
        predicting += [0] * (_padded_length(len(counts), predicting_pad_to) - len(counts))
        self._pass = _Prefill(
            first=first,
            counts=counts,
            predicting=upload(predicting, self.device),
            rows=upload(rows, self.device),
            fresh=not any(starts),
            cu_seqlens=upload(ends, self.device, dtype=torch.int32) if counts else None,
        )
        padding = [0] * (_padded_length(len(positions), pad_to) - len(positions))
        return upload(positions + padding, self.device)[None]

    def start_decode(self, *, pad_to: int = 1) -> Tensor:
        """Position ids of a pass over one more token of every sequence, with the tables of the host."""
        assert not self.on_device
        positions = self.advance()
        padded_to = _padded_length(len(positions), pad_to)
        self._step = HostStep(self._sequences, positions, padded=padded_to, invariant=self.invariant)
        return self._step.position_ids

    def start_device_decode(self, positions: Tensor) -> Tensor:
        """Position ids [1, n] of a pass over the tokens at `positions` int64 [n] of the sequences in slots 0, 1, ...; -1 for padding.

        The host has called `advance`. All that follows up to the logits are kernels on fixed tensors, without a wait for the device.
        """
        assert self.on_device
        self._step = DeviceStep(
            positions, self._device_tables[: len(positions)], spare_row=self.pool.size * BLOCK_TOKENS
        )
        return self._step.position_ids

    def advance(self) -> list[int]:
        """Places of one more token of every sequence, which are now part of them."""
        positions = [sequence.length for sequence in self._sequences]
        for sequence in self._sequences:
            sequence.length += 1
            assert blocks_for(sequence.length) <= len(sequence.blocks), "the sequence outgrows its capacity"
        return positions

    def lightning_step(self, layer_number: int, qkv: Tensor, slopes: Tensor) -> Tensor:
        """o [n, heads, D] of a lightning layer in a decoding pass, for its projection qkv [n, heads, 3D] before SiLU."""
        assert self._step is not None
        return self._step.lightning(self._states[layer_number], qkv, slopes)

    def softmax_step(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """o [n, heads, D] of a softmax layer in a decoding pass, for q [n, heads, D] and k, v [n, KV groups, D]."""
        assert self._step is not None
        return self._step.softmax(self._keys[layer_number], self._values[layer_number], q, k, v, scale=scale)

    def predicting_step(self, hidden: Tensor) -> Tensor:
        """Rows of hidden [n, h] of a decoding pass that predict a next token, one per sequence at least."""
        assert self._step is not None
        return self._step.predicting(hidden)

    def lightning(
        self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *, strategy: str = "auto"
    ) -> Tensor:
        """See AttentionCache."""
        now = self._pass
        assert now is not None
        sequences = len(now.counts)
        if not sequences:
            return torch.zeros_like(q)
        state = self._states[layer_number][now.first : now.first + sequences]
        out, final = lightning_attention(
            q, k, v, slopes, initial_state=None if now.fresh else state, cu_seqlens=now.cu_seqlens,
            return_final_state=True, strategy=strategy,
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
        keys.flatten(0, 1).index_copy_(0, now.rows, k[0, : len(now.rows)])
        values.flatten(0, 1).index_copy_(0, now.rows, v[0, : len(now.rows)])
        if now.fresh:
            return softmax_attention(q, k, v, scale=scale, cu_seqlens=now.cu_seqlens, max_seqlen=max(now.counts))
        parts = q[0, : len(now.rows)].split(now.counts)
        out = [
            softmax_attention(part[None], past(keys, sequence)[None], past(values, sequence)[None], scale=scale)[0]
            for sequence, part in zip(self._sequences[now.first :], parts, strict=False)
        ]
        return padded(torch.cat(out), q.shape[1])[None]

    def predicting(self, hidden: Tensor) -> Tensor:
        """See AttentionCache."""
        assert self._pass is not None
        return hidden.index_select(0, self._pass.predicting)

    def _append(self, blocks: list[int], length: int) -> None:
        slot = len(self._sequences)
        assert slot < self.slots, f"all {self.slots} slots are taken"
        self._sequences.append(Sequence(blocks, length, block_runs(blocks)))
        if self.on_device:
            self._device_tables[slot, : len(blocks)].copy_(torch.tensor(blocks, dtype=torch.int32))


def _padded_length(tokens: int, pad_to: int) -> int:
    return max(-(-tokens // pad_to), 1) * pad_to
