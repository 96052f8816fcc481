"""Which tokens of a sequence each context-parallel rank holds: one layout for softmax and lightning layers.

Zig-zag: a sequence is cut into 2W equal chunks and rank r holds chunks r and 2W-1-r, so that causal attention costs every rank
the same. Three kinds:
    `dense`         every row of a batch [B, T] is one sequence.
    `pack`          the pack as a whole is cut; documents cross chunk and rank borders wherever these fall. No padding.
    `per_document`  Megatron's layout: every document of the pack is cut on its own, so its length must be a multiple of 2W.
A chunk falls into pieces of one document each. A document's piece in chunk c goes on, if at all, in chunk c + 1.
Pure torch, no communication; every rank knows the pieces of all ranks.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_m1.platform.transfer import upload

__all__ = ["Padding", "Piece", "SequenceLayout", "pad_documents"]

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document on one rank."""

    document: int
    """Index of the document in the pack, or of the row in a dense batch; numbers the same on every rank."""
    start: int
    """Offset of the first token inside the document."""
    length: int
    document_length: int
    chunk: int
    """Position of its chunk along the zig-zag, 0 .. 2W-1."""
    row: int
    """Row of the local batch; 0 for packs."""
    local_start: int
    """Offset of the first token in the local row."""

    @property
    def enters(self) -> bool:
        """Whether tokens of the document lie before the piece (then its previous chunk holds a piece of it)."""
        return self.start > 0

    @property
    def leaves(self) -> bool:
        """Whether tokens of the document lie behind the piece (then its next chunk holds a piece of it)."""
        return self.start + self.length < self.document_length


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The tokens of one micro-batch over W context-parallel ranks; make one with `dense`, `pack` or `per_document`."""

    world: int
    rank: int
    packed: bool
    """False: rows [B, T] of one sequence each. True: one row [1, T] of documents."""
    rows: int
    tokens: int
    """T, tokens of a row over all ranks."""
    pieces: tuple[tuple[Piece, ...], ...]
    """By rank: its pieces in local order (row by row). They cover every local token once."""
    indices: Tensor
    """int64 [W, T/W]: for each rank, where its tokens lie in the global row."""
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def dense(*, world: int, rank: int, rows: int, tokens: int) -> "SequenceLayout":
        """Layout of a batch [rows, tokens]; tokens must be a multiple of 2W, else ValueError."""
        size = _chunk_size(tokens, world, "the sequence")
        pieces = tuple(
            tuple(
                Piece(row, chunk * size, size, tokens, chunk, row, place * size)
                for row in range(rows)
                for place, chunk in enumerate(_chunks_of(owner, world))
            )
            for owner in range(world)
        )
        return SequenceLayout(world, rank, False, rows, tokens, pieces, _indices(pieces, [0] * rows))

    @staticmethod
    def pack(*, world: int, rank: int, cu_seqlens: Sequence[int], tokens: int) -> "SequenceLayout":
        """Layout of a pack [1, tokens], zig-zag over the pack; cu_seqlens [S+1] as for `lightning_attention`.

        tokens must be a multiple of 2W. Tokens from cu_seqlens[-1] on, padding, are laid out as one more document.
        Raises ValueError for cu_seqlens that do not rise from 0 to at most `tokens`.
        """
        size = _chunk_size(tokens, world, "the pack")
        edges = _edges(cu_seqlens, tokens)
        by_chunk: list[list[tuple[int, int, int, int]]] = [[] for _ in range(2 * world)]
        for document, (first, end) in enumerate(itertools.pairwise(edges)):
            position = first
            while position < end:
                chunk = position // size
                stop = min(end, (chunk + 1) * size)
                by_chunk[chunk].append((document, position - first, stop - position, end - first))
                position = stop
        pieces = _place(world, lambda owner: ((c, piece) for c in _chunks_of(owner, world) for piece in by_chunk[c]))
        return SequenceLayout(world, rank, True, 1, tokens, pieces, _indices(pieces, edges))

    @staticmethod
    def per_document(*, world: int, rank: int, cu_seqlens: Sequence[int]) -> "SequenceLayout":
        """Megatron's layout of a pack [1, cu_seqlens[-1]]: zig-zag in each document, whose length must be a multiple of 2W.

        A rank's local row is its two chunks of the first document, then those of the second, and so on.
        """
        edges = _edges(cu_seqlens, cu_seqlens[-1])
        lengths = [end - first for first, end in itertools.pairwise(edges)]
        sizes = [_chunk_size(length, world, f"document {i}") for i, length in enumerate(lengths)]
        pieces = _place(
            world,
            lambda owner: (
                (c, (document, c * size, size, length))
                for document, (size, length) in enumerate(zip(sizes, lengths, strict=True))
                for c in _chunks_of(owner, world)
                if size
            ),
        )
        return SequenceLayout(world, rank, True, 1, edges[-1], pieces, _indices(pieces, edges))

    @property
    def local_tokens(self) -> int:
        """Tokens of a local row, T/W."""
        return self.tokens // self.world

    @property
    def local_pieces(self) -> tuple[Piece, ...]:
        return self.pieces[self.rank]

    @property
    def longest_piece(self) -> int:
        """Tokens of the longest local piece."""
        return max((piece.length for piece in self.local_pieces), default=0)

    def partition(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of x, whose dimension `dim` is the global row (tokens, labels, positions, masks)."""
        assert x.shape[dim] == self.tokens, (
            f"dimension {dim} of {tuple(x.shape)} is not the row of {self.tokens} tokens"
        )
        return x.index_select(
            dim, self.memo(("partition", x.device), lambda: upload(self.indices[self.rank], x.device))
        )

    def unpartition(self, x: Tensor, dim: int) -> Tensor:
        """The global row from the local rows of all ranks concatenated in rank order along `dim`."""
        assert x.shape[dim] == self.tokens, (
            f"dimension {dim} of {tuple(x.shape)} is not the row of {self.tokens} tokens"
        )
        order = self.memo(("unpartition", x.device), lambda: upload(self.indices.flatten().argsort(), x.device))
        return x.index_select(dim, order)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """int32 [P+1], borders of the local pieces in the local row; for dense batches in the rows laid end to end."""
        edges = [0, *itertools.accumulate(piece.length for piece in self.local_pieces)]
        return self.memo(("cu_seqlens", device), lambda: upload(edges, device, dtype=torch.int32))

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, called once per key: what all layers derive from this layout."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]


@dataclass(frozen=True)
class Padding:
    """A pack whose documents are padded, each at its end."""

    cu_seqlens: list[int]
    """Of the padded documents."""
    sources: Tensor
    """int64 [padded tokens], place of each token in the pack as it was; -1: padding."""

    @property
    def tokens(self) -> int:
        return len(self.sources)

    def apply(self, x: Tensor, fill: float | bool) -> Tensor:
        """[1, padded tokens, ...] from x [1, tokens, ...], `fill` between."""
        padded = x.index_select(1, self.sources.clamp(min=0))
        padded[:, self.sources < 0] = fill
        return padded

    def places(self) -> Tensor:
        """int64 [tokens], place of each token of the pack among the padded ones."""
        return (self.sources >= 0).nonzero().squeeze(1)


def pad_documents(cu_seqlens: Sequence[int], *, tokens: int, unit: int, length: int | None = None) -> Padding:
    """Every document of a pack [1, tokens] padded to a multiple of `unit`; what lies behind cu_seqlens[-1] is one more document.

    length: tokens of the result, a multiple of `unit`; what is missing is one more document, of padding. None: no more than needed.
    Raises ValueError where the documents do not fit in `length`.
    """
    edges = _edges(cu_seqlens, tokens)
    lengths = [end - first for first, end in itertools.pairwise(edges)]
    padded = [-(-n // unit) * unit for n in lengths]
    if length is not None and length != sum(padded):
        if length < sum(padded):
            raise ValueError(f"documents padded to multiples of {unit} have {sum(padded)} tokens, more than {length}")
        padded, edges, lengths = [*padded, length - sum(padded)], [*edges, tokens], [*lengths, 0]
    sources = torch.full((sum(padded),), -1)
    starts = [0, *itertools.accumulate(padded)]
    for first, start, n in zip(edges, starts, lengths):
        sources[start : start + n] = torch.arange(first, first + n)
    return Padding(starts, sources)


def _chunks_of(rank: int, world: int) -> tuple[int, int]:
    return rank, 2 * world - 1 - rank


def _chunk_size(tokens: int, world: int, what: str) -> int:
    if tokens % (2 * world):
        raise ValueError(f"{what} has {tokens} tokens, not a multiple of 2 * {world} context-parallel ranks; pad it")
    return tokens // (2 * world)


def _edges(cu_seqlens: Sequence[int], tokens: int) -> list[int]:
    edges = [int(edge) for edge in cu_seqlens]
    if not edges or edges[0] != 0 or edges[-1] > tokens or any(b < a for a, b in itertools.pairwise(edges)):
        raise ValueError(f"cu_seqlens={edges} must start at 0, never fall, and end at or before T={tokens}")
    return edges if edges[-1] == tokens else [*edges, tokens]


def _place(world: int, parts: Callable) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of every rank from `parts(rank)`, its (chunk, (document, start, length, document_length)) in local order."""
    placed = []
    for rank in range(world):
        local, pieces = 0, []
        for chunk, (document, start, length, whole) in parts(rank):
            pieces.append(Piece(document, start, length, whole, chunk, 0, local))
            local += length
        placed.append(tuple(pieces))
    return tuple(placed)


def _indices(pieces: tuple[tuple[Piece, ...], ...], document_starts: Sequence[int]) -> Tensor:
    """[W, T/W] of the first rows, whose documents begin at `document_starts` in the global row."""
    ranges = [
        [torch.arange(p.length) + (document_starts[p.document] + p.start) for p in of_rank if p.row == 0]
        for of_rank in pieces
    ]
    return torch.stack([torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for parts in ranges])
