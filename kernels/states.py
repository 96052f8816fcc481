"""States of lightning attention apart from its sweeps, in PyTorch: what documents leave behind, and what tokens read from a state."""

import itertools
from collections.abc import Iterator

import torch
from m1_kernels.checks import document_edges

__all__ = ["document_states_torch", "read_states_torch"]

BLOCK_TOKENS = 4096
"""Tokens that are held in the dtype of the states at a time."""


def document_states_torch(
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """[S, H, D, D]; see `lightning_attention_state`."""
    heads, dim = k.shape[2:]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    documents = len(k) if cu_seqlens is None else len(cu_seqlens) - 1
    states = torch.zeros(documents, heads, dim, dim, dtype=dtype, device=k.device)
    for rows, tokens, weights in _blocks(k, cu_seqlens, slopes, dtype, from_start=reverse):
        keys = k[:, tokens].to(dtype) * weights
        states[rows] += torch.einsum("bnhd,bnhe->bhde", keys, v[:, tokens].to(dtype))
    return states


def read_states_torch(
    q: torch.Tensor,
    states: torch.Tensor,
    slopes: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    transposed: bool = False,
) -> None:
    """Adds to `out`; see `lightning_attention_read`."""
    equation = "bnhe,bhde->bnhd" if transposed else "bnhd,bhde->bnhe"
    for rows, tokens, weights in _blocks(q, cu_seqlens, slopes, states.dtype, from_start=not reverse):
        out[:, tokens] += torch.einsum(equation, q[:, tokens].to(states.dtype) * weights, states[rows]).to(out.dtype)


def _blocks(
    x: torch.Tensor, cu_seqlens: torch.Tensor | None, slopes: torch.Tensor, dtype: torch.dtype, *, from_start: bool
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(documents, tokens, weights [tokens, H, 1]): e^{-s (i+1)} of token i of a document of n, or e^{-s (n-1-i)}."""
    edges = (0, x.shape[1]) if cu_seqlens is None else document_edges(cu_seqlens, x.shape[1])
    for document, (start, end) in enumerate(itertools.pairwise(edges)):
        rows = slice(None) if cu_seqlens is None else slice(document, document + 1)
        for first in range(start, end, BLOCK_TOKENS):
            last = min(first + BLOCK_TOKENS, end)
            token = torch.arange(first, last, device=x.device, dtype=torch.float64)
            distance = token + (1 - start) if from_start else (end - 1) - token
            weights = (distance[:, None] * -slopes.double()).exp()
            yield rows, slice(first, last), weights.to(dtype).unsqueeze(-1)
