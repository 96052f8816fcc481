"""Lightning attention one token at a time: slow, differentiable, and plainly the definition."""

import itertools

import torch
from m1_kernels.checks import document_edges

__all__ = ["lightning_attention_reference"]


def lightning_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, H, D], or (o, final_state [S, H, D, D]), by the recurrence itself.

        S_t = exp(-slope) S_{t-1} + k_t^T v_t          o_t = q_t S_t

    Arguments as in `lightning_attention`. Computes in float32, or float64 for float64 inputs, with plain autograd.
    Source: MiniMax-01 report (arXiv 2501.08313), section on lightning attention.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, tokens, heads, dim = q.shape
    decay = torch.exp(-slopes.to(dtype))[:, None, None]
    if cu_seqlens is None:
        spans = [(row, 0, tokens) for row in range(batch)]
    else:
        edges = document_edges(cu_seqlens, tokens)
        spans = [(0, start, end) for start, end in itertools.pairwise(edges)]

    # Not plain zeros: padding has a gradient, which is zero.
    rows = [list(row.unbind()) for row in torch.where(torch.zeros_like(q, dtype=torch.bool), q, 0)]
    final_states = []
    for index, (row, start, end) in enumerate(spans):
        state = q.new_zeros(heads, dim, dim, dtype=dtype) if initial_state is None else initial_state[index].to(dtype)
        for t in range(start, end):
            state = decay * state + k[row, t].to(dtype)[:, :, None] * v[row, t].to(dtype)[:, None, :]
            rows[row][t] = torch.einsum("hd,hde->he", q[row, t].to(dtype), state).to(q.dtype)
        final_states.append(state)

    o = torch.stack([torch.stack(row) for row in rows]) if batch and tokens else q * 1
    if not return_final_state:
        return o
    if not final_states:
        return o, q.new_zeros(0, heads, dim, dim, dtype=dtype) if initial_state is None else initial_state * 1
    return o, torch.stack(final_states)
