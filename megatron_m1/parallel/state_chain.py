"""The way of lightning states along the chunks of a sequence: who hands which state to whom."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m1.parallel.rows import Rows, rows_of
from megatron_m1.parallel.sequence_layout import Piece, SequenceLayout
from megatron_m1.platform.transfer import upload

__all__ = ["Border", "Chain", "StateChains", "state_chains"]


@dataclass(frozen=True)
class Border:
    """States that cross the border between two neighbouring chunks, one for each document that does."""

    source: int
    """Context-parallel rank that has them, and `target` the one that takes them."""
    target: int
    count: int
    """States here."""
    source_rows: Rows
    """Their rows among the states that the source rank puts in; `target_rows`: among those that the target rank gets."""
    target_rows: Rows
    onward: Rows
    """States here of documents that have crossed the border before; `previous`: their places there."""
    previous: Rows
    lengths: tuple[int, ...]
    """Tokens of these documents between the two borders."""

    @property
    def shortest(self) -> int | None:
        """The smallest of `lengths`; None: no document crosses both borders."""
        return min(self.lengths, default=None)


@dataclass(frozen=True)
class Chain:
    """One direction of travel."""

    borders: list[Border]
    """In the order of travel."""
    lengths: Tensor
    """float64 [sum of m]: the borders' lengths one after another."""
    spans: list[slice]
    """Each border's in `lengths`."""


@dataclass(frozen=True)
class StateChains:
    """Both directions of travel of one layout.

    forward: what leaves the chunks' last pieces, to the pieces that go on. backward: gradients, the same way back.
    """

    forward: "Chain"
    backward: "Chain"
    leaving: list[int]
    """Local pieces whose final state is put in, in this order."""
    entering: list[int]
    """Local pieces that get an entry state, in this order."""
    most_leaving: int
    """The most states that any rank puts in; `most_entering`: gets."""
    most_entering: int

    @property
    def empty(self) -> bool:
        """Whether no document crosses any border (known to every rank)."""
        return self.most_leaving == 0


def state_chains(layout: SequenceLayout, device: torch.device) -> StateChains:
    """The chains of a layout with indices on `device`; made once per layout."""
    return layout.memo(("state_chains", device), lambda: _build(layout, device))


def _build(layout: SequenceLayout, device: torch.device) -> StateChains:
    chunks = 2 * layout.world
    pieces: list[dict[int, Piece]] = [{} for _ in range(chunks)]
    leave_row: dict[tuple[int, int], int] = {}
    enter_row: dict[tuple[int, int], int] = {}
    counts = []
    for of_rank in layout.pieces:
        leaving = [p for p in of_rank if p.leaves]
        entering = [p for p in of_rank if p.enters]
        counts.append((len(leaving), len(entering)))
        leave_row |= {(p.chunk, p.document): row for row, p in enumerate(leaving)}
        enter_row |= {(p.chunk, p.document): row for row, p in enumerate(entering)}
        for piece in of_rank:
            pieces[piece.chunk][piece.document] = piece
    owner = [min(chunk, chunks - 1 - chunk) for chunk in range(chunks)]
    crossing = [[d for d, piece in pieces[chunk].items() if piece.leaves] for chunk in range(chunks - 1)]
    place = [{d: i for i, d in enumerate(documents)} for documents in crossing]

    def border(left: int, *, forward: bool) -> Border:
        documents = crossing[left]
        leave = [leave_row[left, d] for d in documents]
        enter = [enter_row[left + 1, d] for d in documents]
        between, before = (left, left - 1) if forward else (left + 1, left + 1)
        links = [
            (i, place[before][d], pieces[between][d].length)
            for i, d in enumerate(documents)
            if (pieces[between][d].enters if forward else pieces[between][d].leaves)
        ]
        onward, previous, lengths = zip(*links) if links else ((), (), ())
        source, target = (left, left + 1) if forward else (left + 1, left)
        return Border(
            source=owner[source],
            target=owner[target],
            count=len(documents),
            source_rows=rows_of(leave if forward else enter, device),
            target_rows=rows_of(enter if forward else leave, device),
            onward=rows_of(onward, device),
            previous=rows_of(previous, device),
            lengths=lengths,
        )

    lefts = range(chunks - 1)
    return StateChains(
        forward=_chain([border(left, forward=True) for left in lefts], device),
        backward=_chain([border(left, forward=False) for left in reversed(lefts)], device),
        leaving=[i for i, piece in enumerate(layout.local_pieces) if piece.leaves],
        entering=[i for i, piece in enumerate(layout.local_pieces) if piece.enters],
        most_leaving=max(leaving for leaving, _ in counts),
        most_entering=max(entering for _, entering in counts),
    )


def _chain(borders: list[Border], device: torch.device) -> Chain:
    ends = list(itertools.accumulate(len(border.lengths) for border in borders))
    lengths = [length for border in borders for length in border.lengths]
    spans = [slice(first, end) for first, end in zip([0, *ends], ends)]
    return Chain(borders, upload(lengths, device, dtype=torch.float64), spans)
