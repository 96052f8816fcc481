"""Which local queries see which keys of another rank, as blocks without a mask, and attention over such a block."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from m1_kernels import merge_attention, softmax_attention_backward, softmax_attention_forward
from torch import Tensor

from megatron_m1.parallel.rows import Rows
from megatron_m1.parallel.sequence_layout import Piece, SequenceLayout
from megatron_m1.platform.transfer import upload

__all__ = ["AttentionPlan", "Block", "attend", "attend_backward", "attend_locally", "attend_locally_backward"]

type Pack = dict[str, Tensor | int]
type Spans = dict[int, tuple[int, int]]
"""Rows [start, end) by document."""


@dataclass(frozen=True)
class Block:
    """Queries and keys of one document, or of several in the same order: every query sees all keys of its document."""

    queries: Rows
    """Rows of the local queries, each at most once."""
    keys: Rows
    """Rows of the keys, each at most once."""
    pack: Pack
    """cu_seqlens and longest lengths where there are several documents."""


@dataclass(frozen=True)
class AttentionPlan:
    """All that this rank computes. `local` and `by_rank` together, as well as `local` and `gathered`, hold every visible
    (query, key) pair once."""

    local: Pack
    """Documents of the local row, where there are several, for causal attention among its own tokens. Local pieces of one document
    touch."""
    by_rank: tuple[Block | None, ...]
    """Local queries against the keys of each rank; None where no local query sees any of them, and for this rank."""
    gathered: tuple[Block, ...]
    """Local queries against keys in the global row."""

    @staticmethod
    def of(layout: SequenceLayout, device: torch.device) -> "AttentionPlan":
        """The plan of layout.rank, made once per layout and device."""
        plans = _plans.setdefault(layout, {})
        if device not in plans:
            plans[device] = _make(layout, device)
        return plans[device]


_plans: WeakKeyDictionary[SequenceLayout, dict[torch.device, AttentionPlan]] = WeakKeyDictionary()


def attend_locally(q: Tensor, k: Tensor, v: Tensor, *, scale: float, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """(o, lse) of causal attention among the local tokens, both in the accumulation dtype (fp32; fp64 for fp64)."""
    o, lse = softmax_attention_forward(q, k, v, scale=scale, causal=True, **plan.local)
    return o.to(lse.dtype), lse


def attend(o: Tensor, lse: Tensor, block: Block, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> None:
    """Merge the block into o [B, T, H, D] and lse [B, H, T], in place. q: local; k, v: those the block was made for."""
    rows, keys = block.queries, block.keys
    part = softmax_attention_forward(q[:, rows], k[:, keys], v[:, keys], scale=scale, causal=False, **block.pack)
    o[:, rows], lse[:, :, rows] = merge_attention(o[:, rows], lse[:, :, rows], *part)


def attend_locally_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float, plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    """(dq, dkv [2, ...]) of `attend_locally` in the dtype of lse; o, lse are those over all keys."""
    dq, dk, dv = softmax_attention_backward(do, q, k, v, o, lse, scale=scale, causal=True, **plan.local)
    return dq.to(lse.dtype), torch.stack([dk, dv]).to(lse.dtype)


def attend_backward(
    dq: Tensor,
    dkv: Tensor,
    block: Block,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
) -> None:
    """Add the block's gradients to dq and to dkv [2, ...], in place; o, lse are those over all keys."""
    rows, keys = block.queries, block.keys
    gradients = softmax_attention_backward(
        do[:, rows],
        q[:, rows],
        k[:, keys],
        v[:, keys],
        o[:, rows],
        lse[:, :, rows],
        scale=scale,
        causal=False,
        **block.pack,
    )
    dq[:, rows] += gradients[0]
    dkv[0, :, keys] += gradients[1]
    dkv[1, :, keys] += gradients[2]


def _make(layout: SequenceLayout, device: torch.device) -> AttentionPlan:
    rank, world = layout.rank, layout.world
    first, second = rank, 2 * world - 1 - rank
    pieces = [[piece for piece in of_rank if piece.row == 0] for of_rank in layout.pieces]
    own = pieces[rank]
    everything, behind = _spans(own), _spans(p for p in own if p.chunk == second)

    by_rank = [
        _block(everything, _spans(p for p in pieces[other] if p.chunk == other), device)
        if other < rank
        else _block(behind, _spans(pieces[other]), device)
        if other > rank
        else None
        for other in range(world)
    ]

    # The local first chunk splits the keys before the second one: all queries see what precedes it, and the second
    # chunk's also what follows it.
    before: Spans = {}
    between: Spans = {}
    ends_first = {p.document: p.start + p.length for p in own if p.chunk == first}
    for p in own:
        start = 0 if p.chunk == first else ends_first.get(p.document, 0)
        if p.start > start:
            document_start = int(layout.indices[rank, p.local_start]) - p.start
            (before if p.chunk == first else between)[p.document] = document_start + start, document_start + p.start
    gathered = (_block(everything, before, device), _block(behind, between, device))

    # a single one, padding behind it being another, is the whole row: no pack, for which cuDNN has no kernel
    local = _pack(list(everything.values()), list(everything.values()), device) if len(everything) > 1 else {}
    return AttentionPlan(local, tuple(by_rank), tuple(block for block in gathered if block is not None))


def _spans(pieces: Iterable[Piece]) -> Spans:
    """Local rows of each document."""
    spans: Spans = {}
    for piece in pieces:
        start, end = spans.get(piece.document, (piece.local_start, piece.local_start))
        assert end == piece.local_start, f"the pieces of document {piece.document} do not touch"
        spans[piece.document] = start, end + piece.length
    return spans


def _block(queries: Spans, keys: Spans, device: torch.device) -> Block | None:
    common = [document for document in queries if document in keys]
    if not common:
        return None
    query_spans, key_spans = [queries[d] for d in common], [keys[d] for d in common]
    pack = _pack(query_spans, key_spans, device) if len(common) > 1 else {}
    return Block(_rows(query_spans, device), _rows(key_spans, device), pack)


def _rows(spans: list[tuple[int, int]], device: torch.device) -> Rows:
    if all(end == start for (_, end), (start, _) in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return upload(torch.cat([torch.arange(start, end) for start, end in spans]), device)


def _pack(queries: list[tuple[int, int]], keys: list[tuple[int, int]], device: torch.device) -> Pack:
    pack: Pack = {}
    for name, spans in (("q", queries), ("k", keys)):
        lengths = [end - start for start, end in spans]
        edges = upload([0, *itertools.accumulate(lengths)], device, dtype=torch.int32)
        pack |= {f"cu_seqlens_{name}": edges, f"max_seqlen_{name}": max(lengths)}
    return pack
