"""The chunk grid: how tokens of a batch or a pack are laid out in chunks of C tokens, each inside one document."""

import functools
from dataclasses import dataclass

import torch
from m1_kernels.checks import document_edges
from torch.nn.functional import silu

__all__ = ["ChunkGrid", "build_grid"]


@dataclass(frozen=True)
class ChunkGrid:
    """N chunks of C tokens, anchored at document starts, so that no chunk holds two documents.

    Chunks are ordered by their rank inside the document: first the first chunk of every non-empty document (longest
    documents first), then every second chunk, and so on. The state recurrence is then one vectorised operation per
    rank, and the chunks of rank r + 1 continue a prefix of those of rank r.
    """

    chunk: int
    documents: int
    size: int  # N
    counts: list[int]  # chunks of each rank, never rising
    order: torch.Tensor  # [R] index of the non-empty documents, longest first
    last: torch.Tensor  # [R] last chunk of each of them
    lengths: torch.Tensor | None  # [N] tokens in each chunk; None: all are full
    token_of: torch.Tensor | None  # [N*C] flat token of each slot, 0 for padding; None: aligned batch, see `gather`
    slot_of: torch.Tensor | None  # [tokens] slot of each token (-1 outside all documents)
    padding: torch.Tensor | None  # [P] slots that hold no token
    parent: torch.Tensor | None  # [N] place of each chunk's predecessor, see `entry`; None: the same place
    child: torch.Tensor | None  # [N] place of each chunk's successor, see `exit`; None: R places on

    def gather(self, x: torch.Tensor, dtype: torch.dtype, *, activate: bool = False) -> torch.Tensor:
        """New contiguous [N, H, C, D] of `dtype` from x [B, T, H, D] of any strides; padding slots are zero.

        activate: from SiLU of x, rounded to the dtype of x.
        """
        batch, _, heads, dim = x.shape
        grid = x.new_empty(self.size, heads, self.chunk, dim, dtype=dtype)
        if not self.size:
            return grid
        if self.token_of is None:
            chunks = x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)
            out = grid.view(-1, batch, heads, self.chunk, dim)
            if activate and x.dtype == dtype:
                torch.ops.aten.silu.out(chunks, out=out)
            else:
                out.copy_(silu(chunks) if activate else chunks)
            return grid
        rows = x.flatten(0, 1).index_select(0, self.token_of)
        if activate:
            rows = silu(rows, inplace=True)
        rows.index_fill_(0, self.padding, 0.0)
        return grid.copy_(rows.view(self.size, self.chunk, heads, dim).transpose(1, 2))

    def scatter(self, grid: torch.Tensor, out: torch.Tensor, *, before: torch.Tensor | None = None) -> None:
        """Write grid [N, H, C, D] to its tokens in out [B, T, H, D]; tokens outside all documents become zero.

        before: the input of a SiLU of which grid holds the gradient; what is written is the gradient of that input.
        """
        batch, _, heads, dim = out.shape
        if not self.size:
            out.zero_()
            return
        if self.slot_of is None:
            chunks = grid.view(-1, batch, heads, self.chunk, dim).permute(1, 0, 3, 2, 4)
            out = out.unflatten(1, (-1, self.chunk))
            before = None if before is None else before.unflatten(1, (-1, self.chunk))
            _write(chunks, out, before)
            return
        rows = grid.transpose(1, 2).reshape(-1, heads, dim).index_select(0, self.slot_of.clamp(min=0)).view_as(out)
        _write(rows, out, before)
        out.masked_fill_((self.slot_of < 0).view(batch, -1, 1, 1), 0.0)

    def entry(self, states: torch.Tensor) -> torch.Tensor:
        """[N, ...], the state entering each chunk; states [R + N, ...]: entering each document, leaving each chunk."""
        return states[: self.size] if self.parent is None else states.index_select(0, self.parent)

    def exit(self, grads: torch.Tensor) -> torch.Tensor:
        """[N, ...], for the state leaving each chunk; grads [N + R, ...]: entering each chunk, leaving each document."""
        return grads[len(self.order) :] if self.child is None else grads.index_select(0, self.child)


def _write(x: torch.Tensor, out: torch.Tensor, before: torch.Tensor | None) -> None:
    if before is None:
        out.copy_(x)
    elif out.dtype == x.dtype:
        torch.ops.aten.silu_backward.grad_input(x, before, grad_input=out)
    else:
        out.copy_(torch.ops.aten.silu_backward(x, before.to(x.dtype)))


def build_grid(batch: int, tokens: int, cu_seqlens: torch.Tensor | None, chunk: int, device: torch.device) -> ChunkGrid:
    """Grid of a dense [batch, tokens] input, or of the documents that cu_seqlens [S+1] marks in [1, tokens].

    The chunk is halved, down to 16, while the longest document fits in half of it.
    Reads cu_seqlens on the host. Raises ValueError when cu_seqlens does not rise from 0 to at most `tokens`.
    """
    if cu_seqlens is None:
        return _grid(batch, tokens, None, chunk, device)
    return _grid(1, tokens, document_edges(cu_seqlens, tokens), chunk, device)


# Every layer of a model asks for the same grid, forward and again under recomputation.
@functools.lru_cache(maxsize=8)
def _grid(batch: int, tokens: int, cu_seqlens: tuple[int, ...] | None, chunk: int, device: torch.device) -> ChunkGrid:
    edges = torch.arange(batch + 1) * tokens if cu_seqlens is None else torch.tensor(cu_seqlens)
    lengths = edges.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    while chunk > 16 and 2 * longest <= chunk:
        chunk //= 2

    chunks_of, order = torch.div(lengths + chunk - 1, chunk, rounding_mode="floor").sort(descending=True, stable=True)
    order, chunks_of = order[chunks_of > 0], chunks_of[chunks_of > 0]
    ascending = chunks_of.flip(0).contiguous()
    most = int(ascending[-1]) if len(ascending) else 0
    # counts[r]: documents with more than r chunks; they are a prefix of `order`
    counts = len(order) - torch.searchsorted(ascending, torch.arange(most), right=True)
    ends = counts.cumsum(0)
    starts = ends - counts
    last = starts[chunks_of - 1] + torch.arange(len(order))
    frame = functools.partial(
        ChunkGrid,
        chunk=chunk,
        documents=len(lengths),
        size=int(chunks_of.sum()),
        counts=counts.tolist(),
        order=order.to(device),
        last=last.to(device),
    )
    if cu_seqlens is None and tokens % chunk == 0:
        return frame(lengths=None, token_of=None, slot_of=None, padding=None, parent=None, child=None)

    rank = torch.arange(most).repeat_interleave(counts)
    place = torch.arange(len(rank)) - starts[rank]
    document = order[place]
    first_token = edges[:-1][document] + rank * chunk
    chunk_lengths = (edges[1:][document] - first_token).clamp(max=chunk)
    offset = torch.arange(chunk)
    valid = (offset < chunk_lengths[:, None]).flatten()
    token_of = (first_token[:, None] + offset).flatten()
    slot_of = torch.full((batch * tokens,), -1, dtype=torch.int64)
    slot_of[token_of[valid]] = valid.nonzero().flatten()

    uniform = len(order) * most == len(rank)
    parent = torch.where(rank > 0, len(order) + starts[rank - 1] + place, place)
    next_rank = (rank + 1).clamp(max=most - 1)
    continues = (rank + 1 < most) & (place < counts[next_rank])
    child = torch.where(continues, starts[next_rank] + place, len(rank) + place)
    return frame(
        lengths=chunk_lengths.to(device),
        token_of=torch.where(valid, token_of, 0).to(device),
        slot_of=slot_of.to(device),
        padding=(~valid).nonzero().flatten().to(device),
        parent=None if uniform else parent.to(device),
        child=None if uniform else child.to(device),
    )
