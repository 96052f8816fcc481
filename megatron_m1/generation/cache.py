"""The past of the sequences being generated: keys and values in softmax layers, a D x D state in lightning layers."""

from dataclasses import dataclass

import torch
from m1_kernels import lightning_attention, lightning_attention_step, softmax_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["HybridCache"]


@dataclass(frozen=True)
class _Pass:
    """One forward pass: `tokens` real ones of `sequences` sequences in slots `first`..., then padding."""

    first: int
    sequences: int
    tokens: int
    predicting: Tensor
    """Row of the last token of each sequence, [max(sequences, 1)]."""
    slot_of: Tensor
    """[tokens] slot of each token."""
    position_of: Tensor
    """[tokens] position of each token."""
    cu_seqlens: Tensor | None
    """[sequences + 1] int32 in a prefill; None in decoding."""
    visible: Tensor | None = None
    """[sequences, 1, 1, longest] bool in decoding: which cached positions a token sees."""


class HybridCache:
    """Past of up to `slots` sequences in the layers of one rank; an `AttentionCache` (model/cache.py) for them.

    Sequences fill slots 0, 1, ... without gaps. A pass begins with `start_prefill` (new sequences, whole prompts packed one
    after the other) or `start_decode` (one token of every sequence); both give the position ids [1, n] of the pass, n being
    the tokens padded to a multiple of `pad_to`, at least once. Padding takes no part in any attention. With no sequence at all
    the pass is padding alone, for ranks that must keep step with others.

    Memory per slot: capacity * 2 * KV groups * D values of `dtype` per softmax layer, heads * D * D fp32 per lightning layer.
    """

    def __init__(
        self,
        layer_types: dict[int, int],
        *,
        slots: int,
        capacity: int,
        heads: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pad_to: int = 1,
    ) -> None:
        """layer_types: 1-based layer number -> 0 lightning, 1 softmax, of this rank's layers; heads, groups: local."""
        self.slots, self.capacity, self.pad_to, self.device = slots, capacity, pad_to, device
        self.lengths: list[int] = []
        """Tokens in the cache of each sequence, by slot."""
        self._states: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for number, kind in layer_types.items():
            if kind == 0:
                self._states[number] = torch.zeros(slots, heads, head_dim, head_dim, device=device)
            else:
                shape = (slots, groups, capacity, head_dim)
                # Zeros, not empty: masked positions count with weight 0, and 0 * NaN is NaN.
                self._keys[number] = torch.zeros(shape, dtype=dtype, device=device)
                self._values[number] = torch.zeros(shape, dtype=dtype, device=device)
        self._pass: _Pass | None = None

    def start_prefill(self, lengths: list[int]) -> Tensor:
        """Position ids of a pass over new sequences of these lengths (> 0), which take the next slots."""
        first = len(self.lengths)
        self.lengths.extend(lengths)
        assert len(self.lengths) <= self.slots and max(self.lengths, default=0) <= self.capacity
        ends = torch.tensor([0, *lengths]).cumsum(0)
        slot_of = torch.arange(first, len(self.lengths)).repeat_interleave(ends.diff())
        positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(ends.diff())
        return self._begin(first, slot_of, positions, ends[1:] - 1, ends.to(torch.int32))

    def start_decode(self) -> Tensor:
        """Position ids of a pass over one more token of every sequence."""
        sequences = torch.arange(len(self.lengths))
        positions = torch.tensor(self.lengths, dtype=torch.int64)
        self.lengths = [length + 1 for length in self.lengths]
        assert max(self.lengths, default=0) <= self.capacity
        return self._begin(0, sequences, positions, sequences, None)

    def remove(self, slot: int) -> None:
        """Forget the sequence in `slot`; that of the last slot moves there."""
        last = len(self.lengths) - 1
        if slot != last:
            for store in (self._states, self._keys, self._values):
                for tensor in store.values():
                    tensor[slot].copy_(tensor[last])
        self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def lightning(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        """See AttentionCache."""
        now, state = self._pass, self._states[layer_number]
        assert now is not None
        out = torch.zeros_like(q)
        if now.cu_seqlens is None and now.sequences:
            real = slice(0, now.sequences)
            out[0, real] = lightning_attention_step(q[0, real], k[0, real], v[0, real], state[real], slopes)
        elif now.sequences:
            out, final = lightning_attention(q, k, v, slopes, cu_seqlens=now.cu_seqlens, return_final_state=True)
            state[now.first : now.first + now.sequences] = final
        return out

    def softmax(self, layer_number: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """See AttentionCache."""
        now, keys, values = self._pass, self._keys[layer_number], self._values[layer_number]
        assert now is not None
        out = torch.zeros_like(q)
        if not now.sequences:
            return out
        keys[now.slot_of, :, now.position_of] = k[0, : now.tokens]
        values[now.slot_of, :, now.position_of] = v[0, : now.tokens]
        if now.cu_seqlens is not None:
            return softmax_attention(q, k, v, scale=scale, cu_seqlens=now.cu_seqlens)
        assert now.visible is not None
        longest = now.visible.shape[-1]
        # The query heads of a KV group stand where the queries of a sequence usually do.
        groups = k.shape[2]
        queries = q[0, : now.sequences].unflatten(1, (groups, -1))
        keys, values = (store[: now.sequences, :, :longest] for store in (keys, values))
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=now.visible, scale=scale)
        out[0, : now.sequences] = attended.flatten(1, 2)
        return out

    def predicting(self, hidden: Tensor) -> Tensor:
        """See AttentionCache."""
        assert self._pass is not None
        return hidden.index_select(0, self._pass.predicting)

    def _begin(self, first: int, slot_of: Tensor, positions: Tensor, last: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        tokens, sequences = len(positions), len(last)
        padded = max(-(-tokens // self.pad_to), 1) * self.pad_to
        position_ids = torch.zeros(1, padded, dtype=torch.int64)
        position_ids[0, :tokens] = positions
        visible = None
        if cu_seqlens is None and sequences:
            visible = (torch.arange(int(positions.max()) + 1) <= positions[:, None])[:, None, None].to(self.device)
        self._pass = _Pass(
            first=first,
            sequences=sequences,
            tokens=tokens,
            predicting=last.to(self.device) if sequences else torch.zeros(1, dtype=torch.int64, device=self.device),
            slot_of=slot_of.to(self.device),
            position_of=positions.to(self.device),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(self.device),
            visible=visible,
        )
        return position_ids.to(self.device)
