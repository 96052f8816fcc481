"""Which implementation of lightning attention runs, and why."""

from typing import Any

import torch
from m1_kernels import triton_attention
from m1_kernels.checks import check_devices, check_slopes
from m1_kernels.choice import Implementation, choose
from m1_kernels.chunked import lightning_attention_chunked, lightning_attention_packed_chunked
from m1_kernels.reference import lightning_attention_reference
from m1_kernels.states import document_states_torch, read_states_torch

__all__ = [
    "IMPLEMENTATIONS",
    "PACKED_IMPLEMENTATIONS",
    "lightning_attention",
    "lightning_attention_packed",
    "lightning_attention_read",
    "lightning_attention_state",
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

TRITON_REASON = "chunks swept by Triton kernels, the state in registers"
TORCH_REASON = "chunked batched matmuls in PyTorch"


def _torch_obstacle(x: torch.Tensor) -> str | None:
    return None if x.device.type in ("cpu", "cuda") else f"it runs on cpu and cuda, not {x.device}"


def _packed_obstacle(qkv: torch.Tensor) -> str | None:
    return triton_attention.obstacle(qkv[..., : qkv.shape[-1] // 3])


def _read_states_triton(q: torch.Tensor, states: torch.Tensor, slopes: torch.Tensor, **options: Any) -> None:
    from m1_kernels import triton_states

    triton_states.read_states_triton(q, states, slopes, **options)


# In the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(
        triton_attention.lightning_attention_triton, triton_attention.obstacle, TRITON_REASON, auto_on=("cuda",)
    ),
    "torch": Implementation(lightning_attention_chunked, _torch_obstacle, TORCH_REASON),
    "reference": Implementation(lightning_attention_reference, lambda x: None, "one token at a time", auto_on=()),
}
PACKED_IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(
        triton_attention.lightning_attention_packed_triton, _packed_obstacle, TRITON_REASON, auto_on=("cuda",)
    ),
    "torch": Implementation(lightning_attention_packed_chunked, _torch_obstacle, TORCH_REASON),
}
STATE_IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(
        triton_attention.lightning_state_triton, triton_attention.obstacle, "one pass over k and v", auto_on=("cuda",)
    ),
    "torch": Implementation(document_states_torch, _torch_obstacle, "products of blocks in PyTorch"),
}
READ_IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(_read_states_triton, triton_attention.obstacle, "one pass in place", auto_on=("cuda",)),
    "torch": Implementation(read_states_torch, _torch_obstacle, "products of blocks in PyTorch"),
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
    strategy: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, H, D] in the dtype of q, or (o, final_state [S, H, D, D]) with return_final_state.

        S_t = exp(-slope) S_{t-1} + k_t^T v_t          o_t = q_t S_t          (no 1/sqrt(D), no normaliser)

    q, k, v: [B, T, H, D], any strides (views of a packed projection are read in place), bf16, fp16, fp32 or fp64.
        Take them apart with torch.split or unbind, whose backward is one concatenation, rather than by slicing, or use
        `lightning_attention_packed`, whose backward needs none.
    slopes: float32 [H], >= 0, see `m1_kernels.slopes`; not differentiated. The g_gamma of flash-linear-attention is -slopes.
    cu_seqlens: int32 [S+1], cumulative document lengths in a pack of B = 1; the state starts anew at each document.
        Documents may be empty. Tokens at and beyond cu_seqlens[-1] are padding: never read, zero output and gradient.
    initial_state: [S, H, D, D] (key dimension first), S = B without cu_seqlens; float32, or float64 for fp64 inputs.
    implementation: "auto", or a name in `dispatch.IMPLEMENTATIONS`. "auto" logs its choice once.
    strategy: of the Triton kernels: "fused" (a document in one sweep), "segmented" (spans of `triton_attention.SEGMENT`
        tokens at once, after a pass over k and v for their states), or "auto" (by the shapes, to fill the device).

    Accumulates in float32 (float64 for fp64 inputs), states included. Differentiable in q, k, v and
    initial_state, from gradients of o and of final_state. Tensors are local; nothing communicates.
    float16 on the Triton kernels: products q.k, those of the backward likewise, and states are operands in float16, so that one beyond
    65504 makes infinities even where o itself would fit. bfloat16 and the torch path have the range of float32.
    What a document's neighbours hold, NaN included, cannot change one bit of its results, and repeated runs are bitwise
    equal. Under a named strategy a packed document equals the same one alone, and a prefill resumed at a multiple of
    `triton_attention.CHUNK` ("segmented": of `SEGMENT`) the whole one, bit for bit; else to tolerance (2e-6 relative RMS per
    head in float32): another batch of products may be summed in another order.
    The Triton kernels never synchronise with the host, so they cannot refuse cu_seqlens that do not rise from 0 to at most T. They
    leave no tensor then: edges count as if moved into it, tokens before the first document as padding; where edges fall, results are
    unspecified. Slopes below 0 are refused on the CPU alone, for the same reason.
    Raises ValueError, with the remedy, for shapes, dtypes or devices that break the above and for an impossible implementation.
    Source: MiniMax-01 report (arXiv 2501.08313), Lightning Attention-2 (arXiv 2401.04658).
    """
    _check(q, k, v, slopes, initial_state, cu_seqlens)
    chosen = choose("lightning_attention", IMPLEMENTATIONS, implementation, q)
    return chosen.run(
        q, k, v, slopes, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state,
        **_strategy(chosen, strategy),
    )  # fmt: skip


def lightning_attention_packed(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = "silu",
    recompute_activation: bool = False,
    implementation: str = "auto",
    strategy: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`lightning_attention` of the parts [q|k|v] of activation(qkv); qkv [B, T, H, 3D] is the projection as it comes.

    activation: "silu", rounded to the dtype of qkv, or None; on Hopper in 16 bits that is torch's to a rounding, and a NaN makes its
    neighbour in a pair of channels NaN too. The backward writes one gradient [B, T, H, 3D], the activation's
    derivative included. o is time-major where qkv is.
    recompute_activation: saves qkv alone, and the backward computes the activation again, a pass that reads and writes a tensor
    like qkv. Else the Triton kernels save activation(qkv) too; the torch path never does.
    The rest as in `lightning_attention`.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r} must be 'silu' or None")
    if qkv.ndim != 4 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be [B, T, H, 3D]")
    q, k, v = qkv.detach().split(qkv.shape[-1] // 3, dim=-1)
    _check(q, k, v, slopes, initial_state, cu_seqlens)
    chosen = choose("lightning_attention_packed", PACKED_IMPLEMENTATIONS, implementation, qkv)
    options: dict[str, Any] = _strategy(chosen, strategy)
    if chosen.why == TRITON_REASON:
        options["recompute_activation"] = recompute_activation
    return chosen.run(
        qkv, slopes, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state,
        activation=activation, **options,
    )  # fmt: skip


@torch.no_grad()
def lightning_attention_state(
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> torch.Tensor:
    """[S, H, D, D], sum_j e^{-s (n-1-j)} k_j^T v_j over the n tokens of each document: its final state from a zero one.

    reverse: sum_j e^{-s (j+1)} k_j^T v_j instead; of (q, do) that is the gradient of the initial state.
    float32, or float64 for fp64 inputs. Arguments as in `lightning_attention`. No gradients: with G that of the result, those of
    v and k are `lightning_attention_read` of (k, G), and of (v, G) transposed, both with `reverse` the other way.
    """
    _check(k, k, v, slopes, None, cu_seqlens)
    chosen = choose("lightning_attention_state", STATE_IMPLEMENTATIONS, implementation, k)
    return chosen.run(k, v, slopes, cu_seqlens=cu_seqlens, reverse=reverse)


@torch.no_grad()
def lightning_attention_read(
    q: torch.Tensor,
    states: torch.Tensor,
    slopes: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    transposed: bool = False,
    implementation: str = "auto",
) -> None:
    """Adds e^{-s (i+1)} q_i S to token i of `out` [B, T, H, D], in place: the share of o of a document that starts from S.

    states: S of every document, [S, H, D, D], as initial_state of `lightning_attention`.  transposed: their transposes are read.
    reverse: e^{-s (n-1-i)} q_i S instead, n being the tokens of the document.
    Tokens beyond cu_seqlens[-1] stay as they are. No gradients: with do that of the output, the gradient of q is the same of
    (do, states) transposed, that of the states is `lightning_attention_state` of (q, do) with `reverse` the other way.
    """
    _check(q, q, q, slopes, states, cu_seqlens)
    check_devices({"q": q, "out": out})
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"out {out.dtype} {tuple(out.shape)} must be like q, {q.dtype} {tuple(q.shape)}")
    chosen = choose("lightning_attention_read", READ_IMPLEMENTATIONS, implementation, q)
    chosen.run(q, states, slopes, out=out, cu_seqlens=cu_seqlens, reverse=reverse, transposed=transposed)


def _strategy(chosen: Implementation, strategy: str) -> dict[str, str]:
    if strategy not in triton_attention.STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(triton_attention.STRATEGIES)}")
    if chosen.why == TRITON_REASON:
        return {"strategy": strategy}
    if strategy != "auto":
        raise ValueError(
            f"strategy={strategy!r} is one of the Triton kernels, which do not run here; leave it at 'auto'"
        )
    return {}


def _check(q, k, v, slopes, initial_state, cu_seqlens) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must share one shape [B, T, H, D]; "
            "lightning attention has as many key and value heads as query heads"
        )
    given = {"q": q, "k": k, "v": v, "slopes": slopes, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    check_devices(given)
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
    check_slopes(slopes)
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
