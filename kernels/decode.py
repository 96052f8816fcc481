"""One decoding step of lightning attention."""

import torch
from m1_kernels import triton_runtime
from m1_kernels.checks import check_devices, check_slopes
from m1_kernels.choice import Implementation, choose

__all__ = ["lightning_attention_step", "lightning_attention_step_packed"]


@torch.no_grad()
def lightning_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    slopes: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Output of the next token, [B, H, D] in the dtype of q. `state` is updated IN PLACE. No gradients.

    q, k, v: [B, H, D], the new token of each of B sequences, any strides.  slopes: float32 [H].
    state: [S, H, D, D], float32 (float64 with float64 inputs), each [D, D] contiguous; S = B without `slots`.
    slots: int32 or int64 [B], the row of `state` that each sequence owns, no two the same; -1 for none. A slot past the pool is a
        ValueError in "torch" and as -1 in "triton", which cannot look at it.
    active: bool [B]. Where it is False, or the slot is -1, the state keeps every bit and the output is zero, whatever q, k, v hold.
    implementation: "auto", "triton" (one kernel, bound by reading and writing the state) or "torch".

    The decay is applied as state - state * (1 - exp(-slope)): exp(-slope) alone, rounded to float32, drifts over thousands of tokens.
    No host synchronisation, except in "torch" on CUDA with active or slots.
    """
    _check(q, k, v, state, slopes, active, slots)
    return choose("lightning_attention_step", STEP, implementation, q).run(q, k, v, state, slopes, active, slots, False)


@torch.no_grad()
def lightning_attention_step_packed(
    qkv: torch.Tensor,
    state: torch.Tensor,
    slopes: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    activation: str | None = "silu",
    implementation: str = "auto",
) -> torch.Tensor:
    """`lightning_attention_step` of the parts [q|k|v] of activation(qkv); qkv [B, H, 3D] is the projection as it comes.

    activation: "silu", rounded to the dtype of qkv, or None. The rest as above.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r} must be 'silu' or None")
    if qkv.ndim != 3 or qkv.shape[-1] % 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be [B, H, 3D]")
    silu = activation == "silu"
    chosen = choose("lightning_attention_step", STEP, implementation, qkv)
    if silu and chosen is STEP["torch"]:
        qkv, silu = torch.nn.functional.silu(qkv), False
    q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
    _check(q, k, v, state, slopes, active, slots)
    return chosen.run(q, k, v, state, slopes, active, slots, silu)


def _check(q, k, v, state, slopes, active, slots) -> None:
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"q {q.dtype} {tuple(q.shape)}, k {k.dtype} {tuple(k.shape)}, v {v.dtype} {tuple(v.shape)} "
            "must share one dtype and one shape [B, H, D]"
        )
    check_devices({"q": q, "k": k, "v": v, "state": state, "slopes": slopes, "active": active, "slots": slots})
    batch, heads, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = batch if slots is None else state.shape[0]
    if state.shape != (rows, heads, dim, dim) or state.dtype != dtype:
        raise ValueError(
            f"state is {state.dtype} {tuple(state.shape)}; it must be {dtype} {(rows, heads, dim, dim)}, "
            "as lightning_attention(..., return_final_state=True) returns it"
        )
    if state.stride()[2:] != (dim, 1):
        raise ValueError(f"state has strides {state.stride()}; each [D, D] of it must be contiguous")
    if slopes.shape != (heads,) or slopes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"slopes {slopes.dtype} {tuple(slopes.shape)} must be float32 [{heads}]")
    check_slopes(slopes)
    if active is not None and (active.shape != (batch,) or active.dtype != torch.bool):
        raise ValueError(f"active {active.dtype} {tuple(active.shape)} must be bool [{batch}]")
    if slots is not None and (slots.shape != (batch,) or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"slots {slots.dtype} {tuple(slots.shape)} must be int32 [{batch}]")


def _torch_step(q, k, v, state, slopes, active, slots, silu: bool) -> torch.Tensor:
    assert not silu, "the packed operator has applied it"
    if active is None and slots is None:
        return _torch_step_of_all(q, k, v, state, slopes)
    slots = torch.arange(len(q), device=q.device) if slots is None else slots
    live = slots >= 0 if active is None else (slots >= 0) & active
    chosen = live.nonzero().squeeze(-1)
    rows = slots[chosen]
    if len(rows) and int(rows.max()) >= len(state):
        raise ValueError(
            f"slot {int(rows.max())} is past the {len(state)} rows of state; pass a row below, or -1 for none"
        )
    part, out = state[rows], torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    out[chosen] = _torch_step_of_all(q[chosen], k[chosen], v[chosen], part, slopes)
    state[rows] = part
    return out


def _torch_step_of_all(q, k, v, state, slopes) -> torch.Tensor:
    out_dtype = q.dtype
    q, k, v = (x.to(state.dtype) for x in (q, k, v))
    decay_minus_one = torch.expm1(-slopes.to(state.dtype))[:, None, None]
    state.addcmul_(state, decay_minus_one).addcmul_(k[..., :, None], v[..., None, :])
    return torch.matmul(q[..., None, :], state).squeeze(-2).to(out_dtype)


def _triton_step(q, k, v, state, slopes, active, slots, silu: bool) -> torch.Tensor:
    from m1_kernels import triton_decode

    return triton_decode.step(q, k, v, state, slopes, active, slots, silu)


STEP = {
    "triton": Implementation(_triton_step, triton_runtime.obstacle, "one fused kernel", auto_on=("cuda",)),
    "torch": Implementation(_torch_step, lambda q: None, "passes over the state in place"),
}
