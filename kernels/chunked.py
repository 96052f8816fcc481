"""Lightning attention in chunks: batched matrix products in PyTorch, with a hand-written backward.

Per head with slope s, for a chunk of C tokens entered with state S (D x D):
    o_i = e^{-s(i+1)} q_i S + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j
    S'  = e^{-sC} S + sum_j e^{-s(C-1-j)} k_j^T v_j
Every exponent is non-positive. Heads are independent and are processed a few at a time, dense sequences in segments
that hand on their states, so that intermediates stay in cache and memory beyond inputs and outputs is that of a few heads.
"""

from dataclasses import dataclass

import torch
from m1_kernels.grid import ChunkGrid, build_grid
from torch.autograd.function import once_differentiable

__all__ = ["chunk_size", "lightning_attention_chunked", "lightning_attention_packed_chunked"]

# Elements of one [N, heads, C, C] intermediate. CPU: 2 MiB in float32: a few of them fit in the last-level cache and
# the allocator reuses them without page faults; CUDA: enough work for a launch.
GROUP_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
# Tokens of a segment, rows of the batch together. CPU: at which a group holds a few heads; CUDA: as GROUP_ELEMENTS.
SEGMENT_TOKENS = {"cpu": 2048, "cuda": 1 << 17}
KEPT_TOKENS = {"cpu": 2048, "cuda": 0}
"""Up to so many tokens, rows of the batch together, the states of chunks are kept for the backward: memory for products and a scan."""


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

    Saves its inputs for the backward, and of a dense sequence the state at every SEGMENT_TOKENS, up to KEPT_TOKENS at every chunk.
    Linear in T.
    """
    o, final_state = _run((q, k, v), slopes, initial_state, cu_seqlens, return_final_state, activate=False)
    return (o, final_state) if return_final_state else o


def lightning_attention_packed_chunked(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = "silu",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `lightning_attention_chunked` for the projection qkv [B, T, H, 3D], q, k and v being its parts after `activation`.

    activation: "silu", rounded to the dtype of qkv, or None. It is computed a few heads at a time and again in the
    backward, whose gradients are written into one tensor: fewer passes over memory than with separate operators.
    """
    o, final_state = _run((qkv,), slopes, initial_state, cu_seqlens, return_final_state, activate=activation == "silu")
    return (o, final_state) if return_final_state else o


def _run(inputs: tuple[torch.Tensor, ...], slopes, initial_state, cu_seqlens, return_final_state: bool, activate: bool):
    """(o, final state or None) from inputs (q, k, v) or (qkv,)."""
    tokens = inputs[0].shape[1]
    documents = 0 if cu_seqlens is None else _equal_documents(cu_seqlens, tokens)
    if documents:
        # A pack of equal documents is a dense batch, which needs no gathering into chunks.
        inputs, cu_seqlens = tuple(x[0].unflatten(0, (documents, -1)) for x in inputs), None
    q = _apart(inputs)[0]
    segments = _segments(q, cu_seqlens)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (initial_state, *inputs))
    keeping = learning and q.shape[0] * q.shape[1] <= KEPT_TOKENS[q.device.type]
    o, final_state = _Chunked.apply(slopes, initial_state, segments, return_final_state, activate, keeping, *inputs)
    return (o.flatten(0, 1).unsqueeze(0) if documents else o), final_state


def _apart(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """q, k, v, views of a packed input."""
    return inputs if len(inputs) == 3 else inputs[0].split(inputs[0].shape[-1] // 3, dim=-1)


def _segments(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[slice, ChunkGrid]]:
    """Spans of tokens, each entered with the states that left the one before, and their grids; a pack is one span."""
    batch, tokens, _, dim = q.shape
    chunk = chunk_size(dim)
    if cu_seqlens is not None:
        return [(slice(0, tokens), build_grid(1, tokens, cu_seqlens, chunk, q.device))]
    size = max(SEGMENT_TOKENS[q.device.type] // max(batch, 1) // chunk, 1) * chunk
    spans = [slice(first, min(first + size, tokens)) for first in range(0, max(tokens, 1), size)]
    return [(span, build_grid(batch, span.stop - span.start, None, chunk, q.device)) for span in spans]


def _equal_documents(cu_seqlens: torch.Tensor, tokens: int) -> int:
    """How many documents fill the pack of `tokens` if all are equally long, else 0."""
    documents = len(cu_seqlens) - 1
    if documents < 1 or tokens % documents:
        return 0
    return documents if cu_seqlens.tolist() == list(range(0, tokens + 1, max(tokens // documents, 1))) else 0


def chunk_size(head_dim: int) -> int:
    """Tokens of a chunk: products inside chunks grow with it, states shrink. Fastest on 2 cores in benchmark_cpu."""
    return 32 if head_dim <= 32 else 64


@dataclass(frozen=True)
class _Decays:
    """exp(-slope * n) of some heads, in the compute dtype."""

    mask: torch.Tensor  # [heads, C, C]: e^{-s(i-j)} for j <= i, else 0
    query: torch.Tensor  # [heads, C, 1]: e^{-s(i+1)}
    key: torch.Tensor  # [1 or N, heads, C, 1]: e^{-s(len-1-j)}, 0 or finite beyond the length
    ranks: list[torch.Tensor]  # for the chunks of each rank, [1 or count, heads, 1, 1]: e^{-s len}

    @classmethod
    def of(cls, slopes: torch.Tensor, grid: ChunkGrid, dtype: torch.dtype) -> "_Decays":
        size = grid.chunk
        steps = torch.arange(size + 1, device=slopes.device)
        table = torch.exp(-slopes.double()[:, None] * steps).to(dtype)
        distance = steps[:size, None] - steps[None, :size]
        lengths = grid.lengths if grid.lengths is not None else steps[size:]
        remaining = (lengths[:, None] - 1 - steps[None, :size]).clamp(min=0)
        whole = table[:, lengths].t()[:, :, None, None].contiguous()
        return cls(
            mask=table[:, distance.clamp(min=0)].tril(),
            query=table[:, 1:, None],
            key=table[:, remaining].transpose(0, 1)[..., None].contiguous(),
            ranks=list(whole.split(grid.counts)) if grid.lengths is not None else [whole] * len(grid.counts),
        )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slopes, initial_state, segments, return_final_state: bool, activate: bool, keeping: bool, *inputs):
        ctx.set_materialize_grads(False)
        q, k, v = _apart(inputs)
        dtype = _compute_dtype(q)
        heads, dim = q.shape[2:]
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        entered = [initial_state]
        kept: list[torch.Tensor | None] = []
        for index, (span, grid) in enumerate(segments):
            initial, final_state = entered[-1], None
            if return_final_state or index + 1 < len(segments):
                final_state = torch.zeros(grid.documents, heads, dim, dim, dtype=dtype, device=q.device)
                if initial is not None:
                    final_state.copy_(initial)
            for group in _head_groups(heads, grid, q.device):
                qs, ks, vs = (grid.gather(x[:, span, group], dtype, activate=activate) for x in (q, k, v))
                decays = _Decays.of(slopes[group], grid, dtype)
                states = (_heads_of(x, group, dtype) for x in (initial, final_state))
                found = _forward_heads(qs, ks, vs, decays, grid, o[:, span, group], *states)
                kept.append(found if keeping else None)
            entered.append(final_state)
        ctx.save_for_backward(slopes, *inputs, *entered[:-1], *kept)
        ctx.segments, ctx.activate, ctx.input_count = segments, activate, len(inputs)
        return o, entered[-1] if return_final_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        slopes, *rest = ctx.saved_tensors
        inputs, rest = tuple(rest[: ctx.input_count]), rest[ctx.input_count :]
        entered, kept = rest[: len(ctx.segments)], rest[len(ctx.segments) :]
        q, k, v = _apart(inputs)
        dtype = _compute_dtype(q)
        do = torch.zeros_like(q) if do is None else do
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
        exit_grad = dfinal
        for index in reversed(range(len(ctx.segments))):
            (span, grid), initial = ctx.segments[index], entered[index]
            entry_grad = None
            if initial is not None:
                entry_grad = torch.zeros_like(initial)
                if exit_grad is not None:
                    entry_grad.copy_(exit_grad)
            groups = _head_groups(q.shape[2], grid, q.device)
            for group, known in zip(groups, kept if len(ctx.segments) == 1 else [None] * len(groups), strict=True):
                qkv = [x[:, span, group] for x in (q, k, v)]
                chunks = [grid.gather(x, dtype, activate=ctx.activate) for x in qkv]
                dos = grid.gather(do[:, span, group], dtype)
                decays = _Decays.of(slopes[group], grid, dtype)
                states = (_heads_of(x, group, dtype) for x in (initial, exit_grad))
                dinitial = None if entry_grad is None else entry_grad[:, group]
                found = _backward_heads(*chunks, dos, decays, grid, *states, dinitial, known)
                for grad, x, out in zip(found, qkv, _apart(grads), strict=True):
                    grid.scatter(grad, out[:, span, group], before=x if ctx.activate else None)
            exit_grad = entry_grad
        return None, exit_grad, None, None, None, None, *grads


def _forward_heads(q, k, v, decays, grid, o, initial, final_state) -> torch.Tensor | None:
    """`_states` if there are any; o and final_state of some heads written.

    q, k, v: [N, h, C, D], overwritten; initial, final_state: [S, h, D, D].
    """
    scores = _bmm(q, k.mT).mul_(decays.mask)
    out = _bmm(scores, v)
    entered, left = _inter_chunk_ranges(grid, initial is not None, final_state is not None)
    states = None
    if left:
        k[:left].mul_(decays.key[:left])
        states = _states(k, v, initial, decays, grid, left)
        if entered < grid.size:
            _add_bmm_(out[entered:], q[entered:].mul_(decays.query), grid.entry(states)[entered:])
        if final_state is not None:
            final_state.index_copy_(0, grid.order, states[grid.last + len(grid.order)])
    grid.scatter(out, o)
    return states


def _backward_heads(q, k, v, do, decays, grid, initial, dfinal, dinitial, states) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv of some heads, and dinitial written. q, k, v, do: [N, h, C, D], overwritten. states: `_states`, or None."""
    scores = _bmm(q, k.mT).mul_(decays.mask)
    dv = _bmm(scores.mT, do)
    torch.bmm(do.flatten(0, 1), v.flatten(0, 1).mT, out=scores.flatten(0, 1))
    dscores = scores.mul_(decays.mask)
    dq = _bmm(dscores, k)
    dk = _bmm(dscores.mT, q)
    entered, left = _inter_chunk_ranges(grid, initial is not None, dfinal is not None)
    if left:
        k[:left].mul_(decays.key[:left])
        do[entered:].mul_(decays.query)
        dstates = _state_gradients(q, do, dfinal, decays, grid, entered)
        dexit = grid.exit(dstates)[:left]
        _add_bmm_(dv[:left], k[:left], dexit)
        if entered < grid.size:
            states = _states(k, v, initial, decays, grid, left) if states is None else states
            _add_bmm_(dq[entered:], do[entered:], grid.entry(states)[entered:].mT)
        _add_bmm_(dk[:left], v[:left].mul_(decays.key[:left]), dexit.mT)
        if dinitial is not None:
            dinitial.index_copy_(0, grid.order, dstates[: len(grid.order)].to(dinitial.dtype))
    return dq, dk, dv


def _inter_chunk_ranges(grid: ChunkGrid, has_initial: bool, has_final: bool) -> tuple[int, int]:
    """(first chunk that a non-zero state enters, end of the chunks whose exit state anything uses)."""
    if not grid.size:
        return 0, 0
    entered = 0 if has_initial else grid.counts[0]
    left = grid.size if has_initial or has_final else grid.size - grid.counts[-1]
    return entered, left


def _states(k, v, initial, decays, grid: ChunkGrid, left: int) -> torch.Tensor:
    """States [R + N, h, D, D]: those entering the R documents, then those leaving each of the first `left` chunks.

    k, v: [N, h, C, D], k already decayed to the end of its chunk. States from `left` on are unspecified.
    """
    documents = len(grid.order)
    states = k.new_empty(documents + grid.size, k.shape[1], k.shape[3], v.shape[3])
    if initial is None:
        states[:documents].zero_()
    else:
        torch.index_select(initial, 0, grid.order, out=states[:documents])
    torch.bmm(k[:left].flatten(0, 1).mT, v[:left].flatten(0, 1), out=states[documents : documents + left].flatten(0, 1))
    blocks = states.split([documents, *grid.counts])
    first, end = 0 if initial is not None else 1, len(grid.counts) if left == grid.size else len(grid.counts) - 1
    for rank in range(first, end):
        leaving = blocks[rank + 1]
        leaving.addcmul_(decays.ranks[rank], _first(blocks[rank], len(leaving)))
    return states


def _state_gradients(q, do, dfinal, decays, grid: ChunkGrid, entered: int) -> torch.Tensor:
    """Gradients [N + R, h, D, D] of the states entering the chunks from `entered` on, then of the R final states.

    q, do: [N, h, C, D], do already decayed from the start of its chunk.
    """
    documents, size = len(grid.order), grid.size
    grads = q.new_empty(size + documents, q.shape[1], q.shape[3], q.shape[3])
    if dfinal is None:
        grads[size:].zero_()
    else:
        torch.index_select(dfinal, 0, grid.order, out=grads[size:])
    torch.bmm(q[entered:].flatten(0, 1).mT, do[entered:].flatten(0, 1), out=grads[entered:size].flatten(0, 1))
    *blocks, ending = grads.split([*grid.counts, documents])
    following = ending[:0]
    for rank in reversed(range(0 if entered == 0 else 1, len(blocks))):
        block, decay = blocks[rank], decays.ranks[rank]
        goes_on = len(following)
        if dfinal is not None and goes_on < len(block):
            block[goes_on:].addcmul_(decay[goes_on:] if len(decay) > 1 else decay, ending[goes_on : len(block)])
        if goes_on:
            _first(block, goes_on).addcmul_(_first(decay, goes_on), following)
        following = block
    return grads


def _first(x: torch.Tensor, count: int) -> torch.Tensor:
    """x[:count]; x itself when it is no longer than that, which spares the loops over ranks a slice."""
    return x if len(x) <= count else x[:count]


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
