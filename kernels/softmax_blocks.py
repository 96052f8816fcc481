"""Softmax attention over one block of keys, forward and backward, for callers that merge blocks (ring attention).

No autograd. A query's keys may be spread over blocks: softmax_attention_forward gives each block's output and log-sum-exp,
merge_attention joins two of them, and softmax_attention_backward takes the joined pair for every block.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from m1_kernels.checks import document_edges
from m1_kernels.choice import Implementation, choose
from torch import Tensor

__all__ = [
    "check_shapes",
    "longest_document",
    "merge_attention",
    "softmax_attention_backward",
    "softmax_attention_forward",
]

HALF = (torch.float16, torch.bfloat16)
SCORES_AT_ONCE = 2**27
"""Scores that the plain path holds at a time (0.5 GiB in float32)."""
CUDNN_TOKENS = 1024
"""Queries and keys of the shortest block that "auto" gives to cuDNN, which plans every new shape on the host; shorter ones were not
timed."""
CUDNN_TILE = 128
"""Of what queries and keys must be multiples: with 64 keys over, cuDNN before 9.26 may make NaN of dq where all scores are below -88
(cudnn-frontend pull request 628)."""
CUDNN_VERSION = 91501
"""From here on torch prefers cuDNN to flash (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of 2.11 to 2.13)."""
CUDNN_ELEMENTS = 2**31
"""Of q, k or v, where 32-bit offsets end; the largest q that has run, 65,536 queries of 64 heads of 128, has a quarter of it."""
WHY = {
    "cudnn": "1.7 to 1.9 times flash on Hopper",
    "flash": "fused, scores never in memory",
    "plain": "products in slabs of queries",
}
"""The reason to log when "auto" picks an implementation."""

type Kernel = Callable[..., tuple[Tensor, ...]]


def softmax_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o [B, T, Hq, D] in the dtype of q, and lse [B, Hq, T], the natural logarithm of each query's sum of exponentials.

    q [B, T, Hq, D]; k, v [B, Tk, Hkv, D], Hkv dividing Hq; last dimension contiguous; bf16, fp16, fp32 or fp64. lse is fp32
    (fp64 for fp64 inputs).
    causal: the queries are the last positions of the keys (of each document), so there are at least as many keys.
    cu_seqlens_q, cu_seqlens_k: int32 [S+1], both or neither: documents of a pack with B = 1; each that has queries has keys.
        Rows from cu_seqlens[-1] on are padding: not read, zero output, lse -inf. Read on the host, except where the varlen flash
        kernel runs and max_seqlen_q and max_seqlen_k (the longest document's) are given.
    implementation: "auto", which logs every new choice once and takes the first that can run, or one of
        "cudnn": half precision with D a multiple of 8 up to 128, T and Tk of CUDNN_TILE, on compute capability 9 and 10; "auto" from
            CUDNN_TOKENS on. Its backward pass adds up dq in no fixed order: torch.use_deterministic_algorithms rules it out, and so
            does torch.backends.cuda.enable_cudnn_sdp(False).
        "flash": PyTorch's kernel on CPU, and on CUDA for half precision with D a multiple of 8 up to 256, varlen for packs. Repeatable
            under torch.use_deterministic_algorithms.
        "plain": matrix products in slabs of queries, on CUDA.
        Packs: flash, or document by document. Not cuDNN, whose varlen backward in torch 2.11 takes D for the longest document and
        writes out of bounds (pytorch pull request 186142); torch's own varlen_attn does not take it in 2.13 either.
    Without keys o is zero and lse -inf.
    Raises ValueError for shapes that break the above and for an implementation that cannot run.
    """
    check_shapes(q, k, v, causal=causal and cu_seqlens_q is None)
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(_lse_shape(q), -torch.inf, dtype=_computation_dtype(q))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense_forward(q, k, v, scale, causal, implementation)
    if _varlen_flash(q, implementation):
        longest = longest_document(cu_seqlens_q, max_seqlen_q), longest_document(cu_seqlens_k, max_seqlen_k)
        o, lse = _flash_cuda_forward(q[0], k[0], v[0], scale, causal, (cu_seqlens_q, cu_seqlens_k, *longest))
        covered = _covered(q, cu_seqlens_q)
        return o.where(covered[:, None, None], 0)[None], lse.where(covered, -torch.inf)[None]
    o, lse = torch.zeros_like(q), q.new_full(_lse_shape(q), -torch.inf, dtype=_computation_dtype(q))
    for at, keys in _documents(q, k, cu_seqlens_q, cu_seqlens_k):
        o[:, at], lse[:, :, at] = _dense_forward(q[:, at], k[:, keys], v[:, keys], scale, causal, implementation)
    return o, lse


def softmax_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of this block, shaped and typed like q, k, v; zero in padding.

    o, lse: of the query over ALL its keys, of which k, v may be a part: the block's probabilities are exp(scale q k^T - lse).
    do [B, T, Hq, D]: gradient of that o. The rest as for softmax_attention_forward.
    """
    check_shapes(q, k, v, causal=causal and cu_seqlens_q is None)
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense_backward(do, q, k, v, o, lse, scale, causal, implementation)
    if _varlen_flash(q, implementation):
        longest = longest_document(cu_seqlens_q, max_seqlen_q), longest_document(cu_seqlens_k, max_seqlen_k)
        pack = cu_seqlens_q, cu_seqlens_k, *longest
        gradients = _flash_cuda_backward(do[0], q[0], k[0], v[0], o[0], lse[0], scale, causal, pack)
        edges = cu_seqlens_q, cu_seqlens_k, cu_seqlens_k
        dq, dk, dv = (
            x.where(_covered(x[None], cu_seqlens)[:, None, None], 0)[None] for x, cu_seqlens in zip(gradients, edges)
        )
        return dq, dk, dv
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for at, keys in _documents(q, k, cu_seqlens_q, cu_seqlens_k):
        dq[:, at], dk[:, keys], dv[:, keys] = _dense_backward(
            do[:, at], q[:, at], k[:, keys], v[:, keys], o[:, at], lse[:, :, at], scale, causal, implementation
        )
    return dq, dk, dv


def check_shapes(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> None:
    """Raises ValueError unless Hkv divides Hq and, if causal, there are at least as many keys as queries."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} must be [B, T, Hq, D] and k {tuple(k.shape)}, v {tuple(v.shape)} [B, Tk, Hkv, D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads must divide {q.shape[2]} query heads")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"T={q.shape[1]} queries must not outnumber Tk={k.shape[1]} keys")


def merge_attention(o: Tensor, lse: Tensor, block_o: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) over the keys of both; o, block_o [B, T, H, D], lse, block_lse [B, H, T]. block_lse must be finite.

    Computed in the dtype of o and lse: float32 for half precision. Rows without keys so far have lse -inf and finite o.
    """
    share = torch.sigmoid(block_lse - lse).transpose(1, 2).unsqueeze(-1)
    return torch.lerp(o, block_o.to(o.dtype), share), torch.logaddexp(lse, block_lse)


def _dense_forward(q, k, v, scale: float, causal: bool, implementation: str) -> tuple[Tensor, Tensor]:
    before = k.shape[1] - q.shape[1]
    if not causal or before == 0 or q.shape[1] == 1:
        return _block_forward(q, k, v, scale, causal and before == 0, implementation)
    o, lse = _block_forward(q, k[:, :before], v[:, :before], scale, False, implementation)
    diagonal = _block_forward(q, k[:, before:], v[:, before:], scale, True, implementation)
    merged, lse = merge_attention(o.to(lse.dtype), lse, *diagonal)
    return merged.to(q.dtype), lse


def _dense_backward(
    do, q, k, v, o, lse, scale: float, causal: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    before = k.shape[1] - q.shape[1]
    if not causal or before == 0 or q.shape[1] == 1:
        return _block_backward(do, q, k, v, o, lse, scale, causal and before == 0, implementation)
    first = _block_backward(do, q, k[:, :before], v[:, :before], o, lse, scale, False, implementation)
    second = _block_backward(do, q, k[:, before:], v[:, before:], o, lse, scale, True, implementation)
    return first[0] + second[0], torch.cat([first[1], second[1]], 1), torch.cat([first[2], second[2]], 1)


def _block_forward(q, k, v, scale: float, causal: bool, implementation: str) -> tuple[Tensor, Tensor]:
    """Either all keys for every query, or as many keys as queries and the causal triangle."""
    kernels = {"cudnn": _cudnn_forward, "flash": _flash_forward, "plain": _plain_forward}
    return _choose("softmax attention of a block", kernels, implementation, q, k, v, causal)(q, k, v, scale, causal)


def _block_backward(
    do, q, k, v, o, lse, scale: float, causal: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = {"cudnn": _cudnn_backward, "flash": _flash_backward, "plain": _plain_backward}
    chosen = _choose("gradients of softmax attention of a block", kernels, implementation, q, k, v, causal)
    return chosen(do, q, k, v, o, lse, scale, causal)


def _choose(operator: str, kernels: dict[str, Kernel], implementation: str, q, k, v, causal: bool) -> Kernel:
    least = CUDNN_TOKENS if implementation == "auto" else CUDNN_TILE
    obstacles = {
        "cudnn": lambda x: _cudnn_obstacle(x, k, v, causal, least),
        "flash": _flash_obstacle,
        "plain": lambda x: None if x.is_cuda else f"it runs on cuda, not {x.device}",
    }
    implementations = {
        name: Implementation(
            kernel, obstacles[name], WHY[name], auto_on=("cpu", "cuda") if name == "flash" else ("cuda",)
        )
        for name, kernel in kernels.items()
    }
    return choose(operator, implementations, implementation, q).run


def _varlen_flash(q: Tensor, implementation: str) -> bool:
    """Whether a pack goes to the varlen flash kernel; else document by document."""
    if implementation == "cudnn":
        raise ValueError(
            "implementation='cudnn' takes dense blocks, no cu_seqlens; implementation='auto' picks another"
        )
    return q.is_cuda and implementation in ("auto", "flash") and _flash_obstacle(q) is None


def _flash_obstacle(q: Tensor) -> str | None:
    if q.device.type == "cpu":
        return None
    if not q.is_cuda:
        return f"it runs on cpu and cuda, not {q.device}"
    if q.dtype not in HALF:
        return f"it takes float16 and bfloat16 on cuda, not {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"D={q.shape[-1]} must be a multiple of 8 up to 256"
    return None


def _cudnn_obstacle(q, k, v, causal: bool, least: int) -> str | None:
    queries, keys, width = q.shape[1], k.shape[1], q.shape[-1]
    if not q.is_cuda or q.dtype not in HALF:
        return f"it takes float16 and bfloat16 on cuda, not {q.dtype} on {q.device}"
    if torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return "it leads on compute capability 9 and 10 alone"
    if (torch.backends.cudnn.version() or 0) < CUDNN_VERSION:
        return f"cuDNN {torch.backends.cudnn.version()} must be {CUDNN_VERSION} or newer"
    if width > 128 or width % 8:
        return f"D={width} must be a multiple of 8 up to 128"
    if min(queries, keys) < least or queries % CUDNN_TILE or keys % CUDNN_TILE:
        return f"T={queries} and Tk={keys} must be multiples of {CUDNN_TILE}, at least {least}"
    if max(q.numel(), k.numel()) >= CUDNN_ELEMENTS:
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} must have less than {CUDNN_ELEMENTS} elements each"
    heads_first = (x.detach().transpose(1, 2) for x in (q, k, v))
    block = torch.backends.cuda.SDPAParams(*heads_first, None, 0.0, causal, q.shape[2] != k.shape[2])
    if not torch.backends.cuda.can_use_cudnn_attention(block):
        return "torch refuses it (torch.use_deterministic_algorithms, torch.backends.cuda.enable_cudnn_sdp)"
    return None


def _flash_forward(q, k, v, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        return _flash_cuda_forward(q, k, v, scale, causal, None)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return o.transpose(1, 2), lse


def _flash_backward(do, q, k, v, o, lse, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        return _flash_cuda_backward(do, q, k, v, o, lse, scale, causal, None)
    heads_first = (x.transpose(1, 2) for x in (do, q, k, v, o))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, lse, 0.0, causal, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _flash_cuda_forward(q, k, v, scale: float, causal: bool, pack: tuple | None) -> tuple[Tensor, Tensor]:
    """pack: None for q [B, T, H, D], or (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) for q [T, H, D]."""
    pack = pack or (None, None, q.shape[1], k.shape[1])
    o, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *pack, 0.0, causal, False, scale=scale)
    return o, lse


def _flash_cuda_backward(do, q, k, v, o, lse, scale: float, causal: bool, pack: tuple | None):
    pack = pack or (None, None, q.shape[1], k.shape[1])
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        do.contiguous(), q, k, v, o.contiguous(), lse.contiguous(), *pack, 0.0, causal, *no_dropout, scale=scale
    )


def _cudnn_forward(q, k, v, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, causal, False, scale=scale
    )
    return o.transpose(1, 2), lse.view(_lse_shape(q))


def _cudnn_backward(do, q, k, v, o, lse, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    # contiguous: torch finds a plan again by the strides of q, k and v alone, not by those of do and o (2.11 to 2.13)
    heads_first = (x.transpose(1, 2) for x in (do.contiguous(), q, k, v, o.contiguous()))
    no_dropout = (torch.empty((), dtype=torch.int64, device=q.device),) * 2
    no_bias = no_pack = None
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse.contiguous().unsqueeze(-1), *no_dropout, no_bias, no_pack, no_pack, q.shape[1], k.shape[1],
        0.0, causal, scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _plain_forward(q, k, v, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    o, lse = torch.empty_like(q), q.new_empty(_lse_shape(q), dtype=_computation_dtype(q))
    for at in _slabs(q, k):
        scores = _scores(q[:, at], k, scale, at.start if causal else None)
        slab_lse = scores.logsumexp(-1)
        p = (scores - slab_lse.unsqueeze(-1)).exp()
        o[:, at] = torch.einsum("bgrqk,bkgd->bqgrd", p, v.to(p.dtype)).flatten(2, 3)
        lse[:, :, at] = slab_lse.flatten(1, 2)
    return o, lse


def _plain_backward(do, q, k, v, o, lse, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype, groups = _computation_dtype(q), (k.shape[2], -1)
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for at in _slabs(q, k):
        wide_q, wide_do, wide_o = (x[:, at].to(dtype).unflatten(2, groups) for x in (q, do, o))
        scores = _scores(q[:, at], k, scale, at.start if causal else None)
        p = (scores - lse[:, :, at].unflatten(1, groups).unsqueeze(-1)).exp()
        delta = (wide_do * wide_o).sum(-1).permute(0, 2, 3, 1).unsqueeze(-1)
        ds = p * (torch.einsum("bqgrd,bkgd->bgrqk", wide_do, wide_v) - delta) * scale
        dq[:, at] = torch.einsum("bgrqk,bkgd->bqgrd", ds, wide_k).flatten(2, 3)
        dk += torch.einsum("bgrqk,bqgrd->bkgd", ds, wide_q)
        dv += torch.einsum("bgrqk,bqgrd->bkgd", p, wide_do)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float, first: int | None) -> Tensor:
    """[B, Hkv, Hq/Hkv, T, Tk]; with `first`, the position of the first query, keys behind the query are masked."""
    dtype = _computation_dtype(q)
    scores = torch.einsum("bqgrd,bkgd->bgrqk", q.to(dtype).unflatten(2, (k.shape[2], -1)), k.to(dtype)) * scale
    if first is None:
        return scores
    position = torch.arange(first, first + q.shape[1], device=q.device)
    return scores.masked_fill(torch.arange(k.shape[1], device=q.device) > position.unsqueeze(1), -torch.inf)


def _slabs(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    return (slice(start, min(start + rows, q.shape[1])) for start in range(0, q.shape[1], rows))


def _documents(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    edges = zip(document_edges(cu_seqlens_q, q.shape[1]), document_edges(cu_seqlens_k, k.shape[1]), strict=True)
    for (start, first_key), (end, last_key) in itertools.pairwise(edges):
        if end > start:
            yield slice(start, end), slice(first_key, last_key)


def longest_document(cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    """An upper bound of the documents' lengths, at least 2: for single queries flash-attention takes q for [S, H, D], padding and all."""
    return max(2, int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen)


def _covered(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """bool [T]: False in the padding of x [B, T, ...]."""
    return torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1]


def _lse_shape(q: Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _computation_dtype(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype in HALF else q.dtype
