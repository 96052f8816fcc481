"""Lightning attention over a sequence that lies on several ranks."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from m1_kernels import lightning_attention, lightning_attention_read, lightning_attention_state
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.parallel.lightning_exchange import StateExchange, exchange_method
from megatron_m1.parallel.rows import Rows, rows_of
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.state_chain import state_chains
from megatron_m1.parallel.traffic import Traffic
from megatron_m1.platform.transfer import upload

__all__ = ["LightningContext"]

SPARE_STATES = 16
"""The kernel takes an entry state for every piece or for none. With more pieces than this that start from zero their states would cost
more memory (H * D * D * 4 bytes each) than adding the few others' share to the output takes time."""
MOST_SPANS = 2
"""Spans of chosen pieces, each with launches of its own; where there would be more, all pieces make one, with states for all."""


@dataclass
class LightningContext:
    """Lightning attention of one layer over the ranks of a context-parallel group.

    host_slopes: the layer's slopes (of this tensor-parallel rank's heads), which say how far each head's state travels.
    method: `auto`, `ring`, `all_gather`; see `exchange_method`.  limit: see `StateExchange`.
    strategy: of the work inside the chunks, see `lightning_attention`.
    """

    group: dist.ProcessGroup
    host_slopes: Sequence[float]
    method: str = "auto"
    strategy: str = "auto"
    limit: bool = True
    traffic: Traffic = field(default_factory=Traffic)

    def start(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: SequenceLayout) -> Callable[[], Tensor]:
        """A function that returns o [B, T/W, H, D] for this rank's tokens; q, k, v likewise, as for `lightning_attention`.

        What the caller does before it asks for o overlaps with the exchange of states, and its backward pass with the one back.
        slopes: fp32 [H] on the device. Every rank of the group must call it, and go backward through it.
        """
        chains = state_chains(layout, q.device)
        if chains.empty:
            return lambda: self._local(q, k, v, slopes, layout, None).reshape(q.shape)
        pieces = layout.local_pieces
        leaving, entering = (_spans(layout, chosen, q.device) for chosen in (chains.leaving, chains.entering))
        k, v, states = _FinalStates.apply(k, v, slopes, leaving, len(chains.leaving))
        state_bytes = math.prod(states.shape[1:]) * states.itemsize
        method = exchange_method(self.method, chains=chains, world=layout.world, state_bytes=state_bytes)
        exchange = StateExchange(
            chains,
            slopes,
            host_slopes=self.host_slopes,
            group=self.group,
            method=method,
            limit=self.limit,
            traffic=self.traffic,
        )
        token = exchange.start(states)
        if method == "ring" or len(pieces) > SPARE_STATES + len(chains.entering):
            out = self._local(q, k, v, slopes, layout, None)
            return lambda: _AddEntered.apply(out, q, exchange.finish(token), slopes, entering).reshape(q.shape)

        def finish() -> Tensor:
            entry = exchange.finish(token)
            places = layout.memo(("entering", q.device), lambda: upload(chains.entering, q.device))
            initial = entry.new_zeros(len(pieces), *entry.shape[1:]).index_copy(0, places, entry)
            return self._local(q, k, v, slopes, layout, initial).reshape(q.shape)

        return finish

    def _local(
        self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: SequenceLayout, initial: Tensor | None
    ) -> Tensor:
        """Attention of each local piece by itself, from its row of `initial` [P, H, D, D] or zero; dense: [P, tokens, H, D]."""
        cu_seqlens = layout.cu_seqlens(q.device) if layout.packed else None
        if not layout.packed:
            q, k, v = (x.reshape(2 * len(x), x.shape[1] // 2, *x.shape[2:]) for x in (q, k, v))
        return lightning_attention(
            q, k, v, slopes, initial_state=initial, cu_seqlens=cu_seqlens, strategy=self.strategy
        )


@dataclass(frozen=True)
class _Span:
    """Adjacent pieces that one launch takes, and which of their states are meant."""

    tokens: slice
    """Of the local rows."""
    cu_seqlens: Tensor | None
    """int32, borders of the pieces in the span; None: a piece in every row."""
    count: int
    """Pieces."""
    chosen: Rows
    """Those of the pieces that are meant; `rows`: where their states lie among those of all spans."""
    rows: Rows

    def states(self, k: Tensor, v: Tensor, slopes: Tensor, *, reverse: bool = False) -> Tensor:
        """[chosen, H, D, D]; see `lightning_attention_state`."""
        k, v = k[:, self.tokens], v[:, self.tokens]
        return lightning_attention_state(k, v, slopes, cu_seqlens=self.cu_seqlens, reverse=reverse)[self.chosen]

    def read(self, x: Tensor, states: Tensor, slopes: Tensor, *, out: Tensor, **options: bool) -> None:
        """Add to `out` what the tokens of x read from states [all spans, H, D, D]; see `lightning_attention_read`."""
        entered = states[self.rows]
        if len(entered) < self.count:
            entered = states.new_zeros(self.count, *states.shape[1:])
            entered[self.chosen] = states[self.rows]
        x, out = x[:, self.tokens], out[:, self.tokens]
        lightning_attention_read(x, entered, slopes, out=out, cu_seqlens=self.cu_seqlens, **options)


def _spans(layout: SequenceLayout, chosen: Sequence[int], device: torch.device) -> list[_Span]:
    """Spans that cover the chosen ones of layout.local_pieces; made once per layout."""
    return layout.memo(("spans", tuple(chosen), device), lambda: _make_spans(layout, chosen, device))


def _make_spans(layout: SequenceLayout, chosen: Sequence[int], device: torch.device) -> list[_Span]:
    if not layout.packed:
        half = layout.local_tokens // 2
        places = [piece for piece in chosen if piece < 2]  # pieces lie row by row, two in each
        return [
            _Span(slice(p * half, (p + 1) * half), None, layout.rows, slice(None), slice(i, None, len(places)))
            for i, p in enumerate(places)
        ]
    pieces = layout.local_pieces
    numbered = enumerate(chosen)
    runs = [list(run) for _, run in itertools.groupby(numbered, key=lambda pair: pair[1] - pair[0])]
    if len(runs) > MOST_SPANS:
        whole = slice(0, layout.local_tokens)
        return [_Span(whole, layout.cu_seqlens(device), len(pieces), rows_of(chosen, device), slice(0, len(chosen)))]
    spans = []
    for run in runs:
        of_run = [pieces[piece] for _, piece in run]
        edges = [0, *itertools.accumulate(piece.length for piece in of_run)]
        tokens = slice(of_run[0].local_start, of_run[0].local_start + edges[-1])
        cu_seqlens = upload(edges, device, dtype=torch.int32) if len(run) > 1 else None
        spans.append(_Span(tokens, cu_seqlens, len(run), slice(None), slice(run[0][0], run[-1][0] + 1)))
    return spans


class _FinalStates(torch.autograd.Function):
    """(k, v, [count, H, D, D] final states of pieces from zero entry). k and v go through, so that the states' gradients are added to
    theirs in place: nothing but one attention operator, whose gradients are new tensors, may read what is returned."""

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, slopes: Tensor, spans: list[_Span], count: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(k, v, slopes)
        ctx.spans = spans
        heads, dim = k.shape[2:]
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        states = torch.empty(count, heads, dim, dim, dtype=dtype, device=k.device)
        for span in spans:
            states[span.rows] = span.states(k, v, slopes)
        return k.view_as(k), v.view_as(v), states

    @staticmethod
    @once_differentiable
    def backward(ctx, dk: Tensor, dv: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        k, v, slopes = ctx.saved_tensors
        for span in ctx.spans:
            span.read(v, gradient, slopes, out=dk, reverse=True, transposed=True)
            span.read(k, gradient, slopes, out=dv, reverse=True)
        return dk, dv, None, None, None


class _AddEntered(torch.autograd.Function):
    """out, to which e^{-s (i+1)} q_i S is added (in place) at token i of each piece that starts from a state S.

    out: as many numbers as q; better not a view, of which autograd would copy the gradient twice.
    """

    @staticmethod
    def forward(ctx, out: Tensor, q: Tensor, entry: Tensor, slopes: Tensor, spans: list[_Span]) -> Tensor:
        ctx.save_for_backward(q, entry, slopes)
        ctx.spans = spans
        rows = out.view(q.shape)
        for span in spans:
            span.read(q, entry, slopes, out=rows)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        q, entry, slopes = ctx.saved_tensors
        dq, dentry, rows = torch.zeros_like(q), torch.empty_like(entry), do.reshape(q.shape)
        for span in ctx.spans:
            span.read(rows, entry, slopes, out=dq, transposed=True)
            dentry[span.rows] = span.states(q, rows, slopes, reverse=True)
        return do, dq, dentry, None, None
