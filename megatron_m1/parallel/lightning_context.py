"""Lightning attention over a sequence that lies on several ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from m1_kernels import lightning_attention
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.parallel.lightning_exchange import ExchangeStats, StateExchange, exchange_method
from megatron_m1.parallel.sequence_layout import Piece, SequenceLayout
from megatron_m1.parallel.state_chain import state_chains

__all__ = ["LightningContext", "final_states"]

BLOCK_TOKENS = 4096
"""Tokens whose keys and values are held in the dtype of the states at a time."""
SPARE_STATES = 16
"""The kernel takes an entry state for every piece or for none. With more pieces than this that start from zero their states would cost
more memory (H * D * D * 4 bytes each) than adding the few others' share to the output takes time."""


@dataclass
class LightningContext:
    """Lightning attention of one layer over the ranks of a context-parallel group.

    host_slopes: the layer's slopes (of this tensor-parallel rank's heads), which say how far each head's state travels.
    method: `auto`, `ring`, `all_gather`; see `exchange_method`.  limit: see `StateExchange`.
    """

    group: dist.ProcessGroup
    host_slopes: Sequence[float]
    method: str = "auto"
    limit: bool = True
    stats: ExchangeStats = field(default_factory=ExchangeStats)

    def start(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: SequenceLayout) -> Callable[[], Tensor]:
        """A function that returns o [B, T/W, H, D] for this rank's tokens; q, k, v likewise, as for `lightning_attention`.

        What the caller does before it asks for o overlaps with the exchange of states, and its backward pass with the one back.
        slopes: fp32 [H] on the device. Every rank of the group must call it, and go backward through it.
        """
        chains = state_chains(layout, q.device)
        if chains.empty:
            return lambda: _local(q, k, v, slopes, layout, None)
        pieces = layout.local_pieces
        leaving, entering = ([pieces[i] for i in places] for places in (chains.leaving, chains.entering))
        states = final_states(k, v, slopes, leaving)
        state_bytes = math.prod(states.shape[1:]) * states.itemsize
        method = exchange_method(self.method, chains=chains, world=layout.world, state_bytes=state_bytes)
        exchange = StateExchange(
            chains,
            slopes,
            host_slopes=self.host_slopes,
            group=self.group,
            method=method,
            limit=self.limit,
            stats=self.stats,
        )
        token = exchange.start(states)
        if method == "ring" or len(pieces) > SPARE_STATES + len(entering):
            out = _local(q, k, v, slopes, layout, None)
            return lambda: _AddEntered.apply(out, q, exchange.finish(token), slopes, entering)

        def finish() -> Tensor:
            entry = exchange.finish(token)
            places = layout.memo(
                ("entering", q.device), lambda: torch.tensor(chains.entering, dtype=torch.int64, device=q.device)
            )
            initial = entry.new_zeros(len(pieces), *entry.shape[1:]).index_copy(0, places, entry)
            return _local(q, k, v, slopes, layout, initial)

        return finish


def _local(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, layout: SequenceLayout, initial: Tensor | None) -> Tensor:
    """Lightning attention of each local piece by itself, from its row of `initial` [P, H, D, D] or zero."""
    if layout.packed:
        return lightning_attention(q, k, v, slopes, initial_state=initial, cu_seqlens=layout.cu_seqlens(q.device))
    rows, tokens = q.shape[:2]
    q, k, v = (x.reshape(2 * rows, tokens // 2, *x.shape[2:]) for x in (q, k, v))
    return lightning_attention(q, k, v, slopes, initial_state=initial).reshape(rows, tokens, *q.shape[2:])


def final_states(k: Tensor, v: Tensor, slopes: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """[P, H, D, D] sum_j e^{-s (n-1-j)} k_j^T v_j over the n tokens of each piece of k, v [B, T, H, D]; fp32, or fp64 for fp64 inputs."""
    return _FinalStates.apply(k, v, slopes, pieces)


class _FinalStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, slopes: Tensor, pieces: Sequence[Piece]) -> Tensor:
        ctx.save_for_backward(k, v, slopes)
        ctx.pieces = pieces
        heads, dim = k.shape[2:]
        states = torch.zeros(len(pieces), heads, dim, dim, dtype=_state_dtype(k), device=k.device)
        for state, piece in zip(states, pieces, strict=True):
            for block, weights in _from_the_end(piece, slopes, states.dtype):
                keys = _tokens(k, piece, block).to(states.dtype) * weights
                state += torch.einsum("nhd,nhe->hde", keys, _tokens(v, piece, block).to(states.dtype))
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        k, v, slopes = ctx.saved_tensors
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for grad, piece in zip(gradient, ctx.pieces, strict=True):
            for block, weights in _from_the_end(piece, slopes, gradient.dtype):
                keys, values = (_tokens(x, piece, block).to(gradient.dtype) * weights for x in (k, v))
                _tokens(dk, piece, block).copy_(torch.einsum("nhe,hde->nhd", values, grad))
                _tokens(dv, piece, block).copy_(torch.einsum("nhd,hde->nhe", keys, grad))
        return dk, dv, None, None


class _AddEntered(torch.autograd.Function):
    """out, to which e^{-s (i+1)} q_i S is added (in place) at token i of each piece that starts from a state S."""

    @staticmethod
    def forward(ctx, out: Tensor, q: Tensor, entry: Tensor, slopes: Tensor, pieces: Sequence[Piece]) -> Tensor:
        ctx.save_for_backward(q, entry, slopes)
        ctx.pieces = pieces
        for state, piece in zip(entry, pieces, strict=True):
            for block, weights in _from_the_start(piece, slopes, entry.dtype):
                queries = _tokens(q, piece, block).to(entry.dtype) * weights
                _tokens(out, piece, block).add_(torch.einsum("nhd,hde->nhe", queries, state))
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, entry, slopes = ctx.saved_tensors
        dq, dentry = torch.zeros_like(q), torch.zeros_like(entry)
        for state, dstate, piece in zip(entry, dentry, ctx.pieces, strict=True):
            for block, weights in _from_the_start(piece, slopes, entry.dtype):
                weighted = _tokens(gradient, piece, block).to(entry.dtype) * weights
                _tokens(dq, piece, block).copy_(torch.einsum("nhe,hde->nhd", weighted, state))
                dstate += torch.einsum("nhd,nhe->hde", _tokens(q, piece, block).to(entry.dtype), weighted)
        return gradient, dq, dentry, None, None


def _from_the_end(piece: Piece, slopes: Tensor, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    """(tokens of the piece, e^{-s (n-1-j)} [tokens, H, 1]) in blocks."""
    return [
        (block, _decays(slopes, piece.length - 1 - block.start, piece.length - 1 - block.stop, -1, dtype))
        for block in _blocks(piece)
    ]


def _from_the_start(piece: Piece, slopes: Tensor, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    """(tokens of the piece, e^{-s (i+1)} [tokens, H, 1]) in blocks."""
    return [(block, _decays(slopes, block.start + 1, block.stop + 1, 1, dtype)) for block in _blocks(piece)]


def _blocks(piece: Piece) -> list[slice]:
    starts = range(0, piece.length, BLOCK_TOKENS)
    return [slice(first, min(first + BLOCK_TOKENS, piece.length)) for first in starts]


def _decays(slopes: Tensor, first: int, end: int, step: int, dtype: torch.dtype) -> Tensor:
    distance = torch.arange(first, end, step, device=slopes.device, dtype=torch.float64)
    return (distance[:, None] * -slopes.double()).exp().to(dtype).unsqueeze(-1)


def _tokens(x: Tensor, piece: Piece, block: slice) -> Tensor:
    """View [n, H, D] of those tokens of the piece in x [B, T, H, D]."""
    return x[piece.row, piece.local_start + block.start : piece.local_start + block.stop]


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
