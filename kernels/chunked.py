"""Lightning attention in chunks: batched matrix products in PyTorch, with a hand-written backward.

Per head with slope s, for a chunk of C tokens entered with state S (D x D):
    o_i = e^{-s(i+1)} q_i S + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j
    S'  = e^{-sC} S + sum_j e^{-s(C-1-j)} k_j^T v_j
Every exponent is non-positive. Heads are independent and are processed a few at a time, so that intermediates stay
in cache and memory beyond inputs and outputs is that of a few heads.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from m1_kernels.grid import ChunkGrid, build_grid

__all__ = ["lightning_attention_chunked"]

CHUNK = 64
# Elements of one [N, heads, C, C] intermediate. CPU: 4 MiB in float32, so that a few of them fit in the last-level
# cache; CUDA: enough work for a launch.
GROUP_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def lightning_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, H, D], or (o, final_state [S, H, D, D]); arguments as in `lightning_attention`.

    Saves only its inputs for the backward. Time and memory are linear in T.
    """
    batch, tokens = q.shape[:2]
    grid = build_grid(batch, tokens, cu_seqlens, CHUNK, q.device)
    o, final_state = _Chunked.apply(q, k, v, slopes, initial_state, grid, return_final_state)
    return (o, final_state) if return_final_state else o


@dataclass(frozen=True)
class _Decays:
    """exp(-slope * n) of some heads, in the compute dtype."""

    mask: torch.Tensor  # [heads, C, C]: e^{-s(i-j)} for j <= i, else 0
    query: torch.Tensor  # [heads, C, 1]: e^{-s(i+1)}
    key: torch.Tensor  # [1 or N, heads, C, 1]: e^{-s(len-1-j)}, 0 or finite beyond the length
    chunk: torch.Tensor  # [1 or N, heads, 1, 1]: e^{-s len}

    @classmethod
    def of(cls, slopes: torch.Tensor, grid: ChunkGrid, dtype: torch.dtype) -> "_Decays":
        size = grid.chunk
        steps = torch.arange(size + 1, device=slopes.device)
        table = torch.exp(-slopes.double()[:, None] * steps).to(dtype)
        distance = steps[:size, None] - steps[None, :size]
        lengths = grid.lengths if grid.lengths is not None else steps[size:]
        remaining = (lengths[:, None] - 1 - steps[None, :size]).clamp(min=0)
        return cls(
            mask=table[:, distance.clamp(min=0)].tril(),
            query=table[:, 1:, None],
            key=table[:, remaining].transpose(0, 1)[..., None].contiguous(),
            chunk=table[:, lengths].t()[:, :, None, None].contiguous(),
        )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, initial_state, grid: ChunkGrid, return_final_state: bool):
        ctx.save_for_backward(q, k, v, slopes, initial_state)
        ctx.grid = grid
        ctx.set_materialize_grads(False)
        dtype = _compute_dtype(q)
        heads, dim = q.shape[2:]
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        final_state = None
        if return_final_state:
            final_state = torch.zeros(grid.documents, heads, dim, dim, dtype=dtype, device=q.device)
            if initial_state is not None:
                final_state.copy_(initial_state)
        for group in _head_groups(heads, grid, q.device):
            _forward_heads(
                *(grid.gather(x[:, :, group], dtype) for x in (q, k, v)),
                _Decays.of(slopes[group], grid, dtype),
                grid,
                _heads_of(initial_state, group, dtype),
                o[:, :, group],
                _heads_of(final_state, group, dtype),
            )
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, slopes, initial_state = ctx.saved_tensors
        grid, dtype = ctx.grid, _compute_dtype(q)
        do = torch.zeros_like(q) if do is None else do
        dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
        dinitial = None
        if initial_state is not None:
            dinitial = torch.zeros_like(initial_state) if dfinal is None else dfinal.to(initial_state.dtype, copy=True)
        for group in _head_groups(q.shape[2], grid, q.device):
            _backward_heads(
                *(grid.gather(x[:, :, group], dtype) for x in (q, k, v, do)),
                _Decays.of(slopes[group], grid, dtype),
                grid,
                _heads_of(initial_state, group, dtype),
                _heads_of(dfinal, group, dtype),
                [x[:, :, group] for x in (dq, dk, dv)],
                None if dinitial is None else dinitial[:, group],
            )
        return dq, dk, dv, None, dinitial, None, None


def _forward_heads(q, k, v, decays, grid, initial, o, final_state) -> None:
    """Write o and final_state of some heads. q, k, v: [N, h, C, D], overwritten; initial, final_state: [S, h, D, D]."""
    scores = _bmm(q, k.mT).mul_(decays.mask)
    out = _bmm(scores, v)
    entered, left = _inter_chunk_ranges(grid, initial is not None, final_state is not None)
    if left or entered < grid.size:
        increments = _bmm(k[:left].mul_(decays.key[:left]).mT, v[:left])
        states = _entry_states(increments, initial, decays.chunk, grid)
        _add_bmm_(out[entered:], q[entered:].mul_(decays.query), states[entered:])
        if final_state is not None and grid.size:
            last = grid.last
            leaving = torch.addcmul(increments[last], _rows(decays.chunk, last), states[last])
            final_state.index_copy_(0, grid.order, leaving)
    grid.scatter(out, o)


def _backward_heads(q, k, v, do, decays, grid, initial, dfinal, grads, dinitial) -> None:
    """Write the gradients of some heads. q, k, v, do: [N, h, C, D], overwritten; grads: dq, dk, dv [B, T, h, D]."""
    scores = _bmm(q, k.mT).mul_(decays.mask)
    dv = _bmm(scores.mT, do)
    dscores = torch.bmm(do.flatten(0, 1), v.flatten(0, 1).mT, out=scores.flatten(0, 1)).view_as(scores)
    dscores.mul_(decays.mask)
    dq = _bmm(dscores, k)
    dk = _bmm(dscores.mT, q)
    entered, left = _inter_chunk_ranges(grid, initial is not None, dfinal is not None)
    if left or entered < grid.size:
        keys = k[:left].mul_(decays.key[:left])
        states = _entry_states(_bmm(keys.mT, v[:left]), initial, decays.chunk, grid)
        do[entered:].mul_(decays.query)
        dstates = _exit_gradients(_bmm(q[entered:].mT, do[entered:]), dfinal, decays.chunk, grid, entered, dinitial)
        _add_bmm_(dq[entered:], do[entered:], states[entered:].mT)
        _add_bmm_(dk[:left], v[:left].mul_(decays.key[:left]), dstates[:left].mT)
        _add_bmm_(dv[:left], keys, dstates[:left])
    for grad, out in zip((dq, dk, dv), grads):
        grid.scatter(grad, out)


def _inter_chunk_ranges(grid: ChunkGrid, has_initial: bool, has_final: bool) -> tuple[int, int]:
    """(first chunk that can be entered by a non-zero state, end of the chunks whose exit state anything uses)."""
    if not grid.ranks:
        return 0, 0
    return (0 if has_initial else grid.ranks[0][1]), (grid.size if has_final else grid.ranks[-1][0])


def _entry_states(increments, initial, decay, grid: ChunkGrid) -> torch.Tensor:
    """State at the entry of each chunk, [N, h, D, D], from what each of the first chunks adds to it [<=N, h, D, D]."""
    states = increments.new_empty(grid.size, *increments.shape[1:])
    if grid.ranks:
        entry = states[: grid.ranks[0][1]]
        entry.zero_() if initial is None else torch.index_select(initial, 0, grid.order, out=entry)
    for (before, _), (start, end) in zip(grid.ranks, grid.ranks[1:]):
        source = slice(before, before + end - start)
        torch.addcmul(increments[source], _rows(decay, source), states[source], out=states[start:end])
    return states


def _exit_gradients(dentry, dfinal, decay, grid: ChunkGrid, entered: int, dinitial) -> torch.Tensor:
    """Gradient of the state leaving each chunk, [N, h, D, D], and dinitial [S, h, D, D] if given.

    dentry: what each chunk from `entered` on contributes to the gradient of its entry state.
    """
    dstates = dentry.new_empty(grid.size, *dentry.shape[1:])
    if dfinal is None:
        dstates.index_fill_(0, grid.last, 0.0)
    else:
        dstates.index_copy_(0, grid.last, dfinal.index_select(0, grid.order))
    for (before, _), (start, end) in zip(reversed(grid.ranks[:-1]), reversed(grid.ranks[1:])):
        rank = slice(start, end)
        torch.addcmul(
            dentry[start - entered : end - entered],
            _rows(decay, rank),
            dstates[rank],
            out=dstates[before : before + end - start],
        )
    if dinitial is not None and grid.ranks:
        rank = slice(*grid.ranks[0])
        first = torch.addcmul(dentry[rank], _rows(decay, rank), dstates[rank])
        dinitial.index_copy_(0, grid.order, first.to(dinitial.dtype))
    return dstates


def _rows(decay: torch.Tensor, index: slice | torch.Tensor) -> torch.Tensor:
    """decay[index], or all of it when one row stands for every chunk."""
    return decay if len(decay) == 1 else decay[index]


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_bmm_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def _heads_of(state: torch.Tensor | None, group: slice, dtype: torch.dtype) -> torch.Tensor | None:
    return None if state is None else state[:, group].to(dtype)


def _head_groups(heads: int, grid: ChunkGrid, device: torch.device) -> list[slice]:
    budget = GROUP_ELEMENTS[device.type]
    width = max(1, budget // max(1, grid.size * grid.chunk * grid.chunk))
    return [slice(first, min(first + width, heads)) for first in range(0, heads, width)]


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
