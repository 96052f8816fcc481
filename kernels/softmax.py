"""Causal softmax attention with grouped key/value heads, for M1's ten softmax layers."""

import inspect
import itertools

import torch
from m1_kernels.checks import check_devices, document_edges
from m1_kernels.softmax_blocks import (
    check_shapes,
    longest_document,
    softmax_attention_backward,
    softmax_attention_forward,
)
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["softmax_attention"]


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, Hq, D] = softmax(scale * q k^T) v, in the dtype of q, or (o, lse) with return_lse; o is differentiable.

    q: [B, T, Hq, D]; k, v: [B, Tk, Hkv, D], Hkv dividing Hq: query head h reads key head h // (Hq / Hkv); any strides
    with a contiguous last dimension; bf16, fp16, fp32 or fp64.
    causal: with Tk > T the queries are the last T positions (a cache in front).
    cu_seqlens: int32 [S+1], document lengths of a pack with B = 1 and Tk = T: no attention across documents, and cost
        that of the documents, not of the pack. Tokens from cu_seqlens[-1] on are padding: not read, zero output.
        Read on the host, except on CUDA in half precision with max_seqlen (the longest document) given.
    Runs PyTorch's fused attention: flash on CPU; on CUDA what scaled_dot_product_attention prefers, in half precision cuDNN from its
    9.15.1 on, on compute capability 9 and 10 (torch 2.11 to 2.13, unless TORCH_CUDNN_SDPA_DEPRIORITIZED is set,
    torch.backends.cuda.enable_cudnn_sdp(False) or torch.use_deterministic_algorithms), else flash; the varlen flash kernel for packs
    in half precision on CUDA (D a multiple of 8 up to 256; else document by document). With return_lse the kernels of
    `softmax_attention_forward`.
    return_lse: also lse [B, Hq, T], the natural logarithm of sum exp(scale * q k^T) over a query's keys: fp32 (fp64 for fp64
        inputs), -inf in padding. A gradient that reaches lse raises NotImplementedError.
    Raises ValueError for shapes or devices that break the above, and where cu_seqlens is read for one that does not rise from 0 to at
    most T.
    """
    _check(q, k, v, cu_seqlens)
    if return_lse:
        return _WithLse.apply(q, k, v, scale, causal, cu_seqlens, max_seqlen)
    if cu_seqlens is None:
        return _dense(q, k, v, scale, causal)
    flash_takes_it = q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and flash_takes_it:
        return _varlen(q, k, v, scale, cu_seqlens, max_seqlen, causal)
    return _document_by_document(q, k, v, scale, cu_seqlens, causal)


def _dense(q, k, v, scale: float, causal: bool) -> torch.Tensor:
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if causal and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    o = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and queries == keys,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def _document_by_document(q, k, v, scale: float, cu_seqlens: torch.Tensor, causal: bool) -> torch.Tensor:
    edges = document_edges(cu_seqlens, q.shape[1])
    lengths = [end - start for start, end in itertools.pairwise(edges)] + [q.shape[1] - edges[-1]]
    # split, not slices: its backward is one concatenation instead of one pack-sized gradient per document
    *documents, padding = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
    outputs = [_dense(dq, dk, dv, scale, causal) if dq.shape[1] else dq for dq, dk, dv in documents]
    return torch.cat([*outputs, torch.zeros_like(padding[0])], dim=1)


def _varlen(q, k, v, scale: float, cu_seqlens, max_seqlen: int | None, causal: bool) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    max_seqlen = longest_document(cu_seqlens, max_seqlen)
    covered = (torch.arange(q.shape[1], device=q.device) < cu_seqlens[-1])[:, None, None]
    q, k, v = (_ZeroPaddingGradient.apply(x[0], covered) for x in (q, k, v))
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    window = (-1, 0) if causal else (-1, -1)
    o = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **grouped)
    return o.where(covered, 0.0)[None]


class _WithLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale: float, causal: bool, cu_seqlens, max_seqlen: int | None):
        ctx.options = {
            "scale": scale,
            "causal": causal,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
        }
        pack = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        o, lse = softmax_attention_forward(q, k, v, **ctx.options, **pack)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        if dlse is not None:
            raise NotImplementedError("lse of softmax_attention has no gradient; detach it, or use torch.logsumexp")
        if do is None:
            return (None,) * 7
        *tensors, cu_seqlens = ctx.saved_tensors
        pack = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return *softmax_attention_backward(do, *tensors, **ctx.options, **pack), None, None, None, None


class _ZeroPaddingGradient(torch.autograd.Function):
    """The identity; its backward zeroes rows outside `covered`, which the varlen kernel's backward leaves unwritten."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(covered)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (covered,) = ctx.saved_tensors
        return gradient.where(covered, 0.0), None


def _check(q, k, v, cu_seqlens) -> None:
    check_devices({"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens})
    check_shapes(q, k, v, causal=True)
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        raise ValueError(f"cu_seqlens needs B=1 and Tk=T, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or len(cu_seqlens) < 1):
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} must be int32 [S+1]")
