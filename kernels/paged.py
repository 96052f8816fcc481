"""One decoding step of softmax attention over keys and values in blocks."""

import torch
from m1_kernels import triton_runtime
from m1_kernels.choice import Implementation, choose
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["softmax_attention_step"]


@torch.no_grad()
def softmax_attention_step(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    implementation: str = "auto",
) -> torch.Tensor:
    """Attention of the newest token of each of B sequences to its past and itself, [B, Hq, D] in the dtype of q. No gradients.

    q: [B, Hq, D].  keys, values: [blocks, block_tokens, Hkv, D], last dimension contiguous, dtype of q, Hkv dividing Hq: query head h
    reads key head h // (Hq / Hkv).  tables: int32 [B, W], row b the blocks of sequence b in order; those behind its last token are
    looked up by "torch" but count for nothing, so they must name blocks without NaN.  positions: int64 [B], place of the newest
    token, whose key and value are in the pool; -1 for no sequence, whose output is zero.
    implementation: "auto", "triton" (keys and values read once, in place, by spans of blocks whose number depends on the shapes
    alone) or "torch" (gathers W blocks of every sequence).  No host synchronisation.
    """
    batch, heads, dim = q.shape
    if keys.ndim != 4 or keys.shape != values.shape or keys.shape[3] != dim or heads % keys.shape[2]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be [blocks, tokens, Hkv, {dim}], Hkv dividing {heads}"
        )
    if q.dtype != keys.dtype or q.dtype != values.dtype or keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError(
            f"q {q.dtype}, keys {keys.dtype}, values {values.dtype} must share one dtype and have adjacent channels"
        )
    if tables.ndim != 2 or len(tables) != batch or tables.dtype != torch.int32:
        raise ValueError(f"tables {tables.dtype} {tuple(tables.shape)} must be int32 [{batch}, W]")
    if positions.shape != (batch,) or positions.dtype != torch.int64:
        raise ValueError(f"positions {positions.dtype} {tuple(positions.shape)} must be int64 [{batch}]")
    chosen = choose("softmax_attention_step", PAGED, implementation, q)
    return chosen.run(q, keys, values, tables, positions, scale)


def _torch_step(q, keys, values, tables, positions, scale: float) -> torch.Tensor:
    tokens, groups = keys.shape[1:3]
    k, v = (
        pool.index_select(0, tables.flatten()).view(len(q), -1, *pool.shape[2:]).transpose(1, 2)
        for pool in (keys, values)
    )
    places = torch.arange(tables.shape[1] * tokens, device=q.device)
    # A row without a sequence sees its first key, since attention to nothing is NaN.
    visible = (places <= positions.clamp(min=0)[:, None])[:, None, None]
    out = scaled_dot_product_attention(q.unflatten(1, (groups, -1)), k, v, attn_mask=visible, scale=scale)
    return out.flatten(1, 2).where((positions >= 0)[:, None, None], 0.0)


def _triton_step(q, keys, values, tables, positions, scale: float) -> torch.Tensor:
    from m1_kernels import triton_paged

    return triton_paged.step(q, keys, values, tables, positions, scale)


PAGED = {
    "triton": Implementation(
        _triton_step, triton_runtime.obstacle, "blocks read in place by Triton kernels", auto_on=("cuda",)
    ),
    "torch": Implementation(_torch_step, lambda q: None, "blocks gathered for PyTorch's attention"),
}
