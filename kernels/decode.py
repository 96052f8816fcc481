"""One decoding step of lightning attention."""

import torch

__all__ = ["lightning_attention_step"]


@torch.no_grad()
def lightning_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    slopes: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output of the next token, [B, H, D] in the dtype of q. `state` is updated IN PLACE. No gradients.

    q, k, v: [B, H, D], the new token of each of B slots, any strides.  state: [B, H, D, D], float32 (float64 with
    float64 inputs).  slopes: float32 [H].  active: bool [B]; a False slot keeps its state and yields zeros, whatever
    its q, k, v hold.  No host synchronisation.
    """
    batch, heads, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state.shape != (batch, heads, dim, dim) or state.dtype != dtype:
        raise ValueError(
            f"state is {state.dtype} {tuple(state.shape)}; it must be {dtype} {(batch, heads, dim, dim)}, "
            "as lightning_attention(..., return_final_state=True) returns it"
        )
    decay = torch.exp(-slopes.to(dtype))[None, :, None, None]
    out_dtype = q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if active is not None:
        keep = active[:, None, None]
        q, k, v = q.where(keep, 0.0), k.where(keep, 0.0), v.where(keep, 0.0)
        decay = decay.where(keep[..., None], 1.0)
    state.mul_(decay).addcmul_(k[..., :, None], v[..., None, :])
    return torch.matmul(q[..., None, :], state).squeeze(-2).to(out_dtype)
