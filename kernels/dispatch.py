"""Which implementation of lightning attention runs, and why."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from m1_kernels.chunked import lightning_attention_chunked
from m1_kernels.reference import lightning_attention_reference

__all__ = ["IMPLEMENTATIONS", "Implementation", "lightning_attention"]

logger = logging.getLogger("m1_kernels")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Implementation:
    """One way to compute lightning attention.

    run: takes (q, k, v, slopes, *, initial_state, cu_seqlens, return_final_state).
    obstacle: for (q) returns why this input cannot run here, with the remedy, or None when it can.
    why: the reason to log when "auto" picks it; None keeps "auto" from picking it.
    """

    run: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    obstacle: Callable[[torch.Tensor], str | None]
    why: str | None


# In the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "torch": Implementation(
        run=lightning_attention_chunked,
        obstacle=lambda q: None if q.device.type in ("cpu", "cuda") else f"it runs on cpu and cuda, not {q.device}",
        why="chunked batched matmuls, the only differentiable implementation built in",
    ),
    "reference": Implementation(run=lightning_attention_reference, obstacle=lambda q: None, why=None),
}


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    implementation: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, H, D] in the dtype of q, or (o, final_state [S, H, D, D]) with return_final_state.

        S_t = exp(-slope) S_{t-1} + k_t^T v_t          o_t = q_t S_t          (no 1/sqrt(D), no normaliser)

    q, k, v: [B, T, H, D], any strides (views of a packed projection are read in place), bf16, fp16, fp32 or fp64.
        Take them apart with torch.split or unbind, whose backward is one concatenation, rather than by slicing.
    slopes: float32 [H], >= 0, see `m1_kernels.slopes`; not differentiated.
    cu_seqlens: int32 [S+1], cumulative document lengths in a pack of B = 1; the state starts anew at each document.
        Documents may be empty. Tokens at and beyond cu_seqlens[-1] are padding: never read, zero output and gradient.
    initial_state: [S, H, D, D] (key dimension first), S = B without cu_seqlens; float32, or float64 for fp64 inputs.
    implementation: "auto", or a name in `dispatch.IMPLEMENTATIONS`. "auto" logs its choice once.

    Computes and accumulates in float32 (float64 for fp64 inputs), states included. Differentiable in q, k, v and
    initial_state, from gradients of o and of final_state. Tensors are local; nothing communicates.
    What a document's neighbours hold, NaN included, cannot change one bit of its results. Repeated runs on the CPU are
    bitwise equal. A packed document equals the same one alone to tolerance only (2e-6 relative RMS per head in
    float32): another batch of products may be summed in another order.
    Raises ValueError, with the remedy, for shapes or dtypes that break the above and for an impossible implementation.
    Source: MiniMax-01 report (arXiv 2501.08313), Lightning Attention-2 (arXiv 2401.04658).
    """
    _check(q, k, v, slopes, initial_state, cu_seqlens)
    return choose(implementation, q).run(
        q, k, v, slopes, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state
    )


def choose(implementation: str, q: torch.Tensor) -> Implementation:
    """The named implementation, or for "auto" the first that can run q; raises ValueError when there is none."""
    if implementation == "auto":
        for name, candidate in IMPLEMENTATIONS.items():
            if candidate.why is not None and candidate.obstacle(q) is None:
                _log_once(f"lightning_attention on {q.device.type}: {name} ({candidate.why})")
                return candidate
        reasons = "; ".join(f"{name}: {entry.obstacle(q)}" for name, entry in IMPLEMENTATIONS.items() if entry.why)
        raise ValueError(f"implementation='auto' found none for {q.dtype} on {q.device}: {reasons}")
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"implementation={implementation!r} is not available; use one of {names}")
    chosen = IMPLEMENTATIONS[implementation]
    obstacle = chosen.obstacle(q)
    if obstacle is not None:
        raise ValueError(
            f"implementation={implementation!r} cannot run: {obstacle}; implementation='auto' picks another"
        )
    _log_once(f"lightning_attention on {q.device.type}: {implementation} (asked for)")
    return chosen


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _check(q, k, v, slopes, initial_state, cu_seqlens) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must share one shape [B, T, H, D]; "
            "lightning attention has as many key and value heads as query heads"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype} must share one dtype of bf16, fp16, fp32, fp64; cast them"
        )
    batch, _, heads, dim = q.shape
    if slopes.shape != (heads,) or slopes.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"slopes {slopes.dtype} {tuple(slopes.shape)} must be float32 [{heads}]; lower precision rounds "
            "decays to 1: pass m1_kernels.slopes(...)"
        )
    documents = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs B=1, got B={batch}; concatenate the rows into one pack")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} must be int32 [S+1]")
        documents = len(cu_seqlens) - 1
    if initial_state is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if initial_state.shape != (documents, heads, dim, dim) or initial_state.dtype != dtype:
            raise ValueError(
                f"initial_state {initial_state.dtype} {tuple(initial_state.shape)} must be {dtype} "
                f"{(documents, heads, dim, dim)}: one state per document, never below float32"
            )
