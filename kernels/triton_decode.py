"""The Triton kernel of one decoding step: the state of every slot is read and written once. float32 inside, offsets 64-bit."""

import torch
import triton
import triton.language as tl

__all__ = ["compile_cases", "step"]

BLOCK_V = 32
"""Value columns of a program: one cache line of each of the state's rows."""


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    slopes: torch.Tensor,
    active: torch.Tensor | None,
    slots: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """[B, H, D], contiguous; see `decode.lightning_attention_step`. One launch, fit for CUDA graphs."""
    batch, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block = max(16, triton.next_power_of_2(dim))
    columns = min(block, BLOCK_V)
    if out.numel():
        _step_kernel[(batch * heads * triton.cdiv(dim, columns),)](
            q, k, v, state, slopes.contiguous(), active, slots, out, heads, len(state),
            *q.stride(), *k.stride(), *v.stride(), *state.stride()[:2],
            D=dim, BLOCK_K=block, BLOCK_V=columns, SILU=silu, num_warps=_num_warps(block),
        )  # fmt: skip
    return out


def _num_warps(block: int) -> int:
    return max(1, min(8, block // 32))


@triton.jit
def _one_minus_exp(s):
    """1 - exp(-s) for s >= 0 to a relative error of about 1e-7, where 1 - exp(-s) would cancel."""
    series = s * (1 - s / 2 * (1 - s / 3 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6 * (1 - s / 7))))))
    return tl.where(s < 0.25, series, 1 - tl.exp(-s))


@triton.jit
def _silu(x, source):
    """Rounded to the type that `source` points to."""
    return (x * tl.sigmoid(x)).to(source.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _step_kernel(
    q, k, v, state, slopes, active, slots, out, heads, rows,
    q_slot, q_head, q_dim, k_slot, k_head, k_dim, v_slot, v_head, v_dim,
    state_slot, state_head,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    cols = (program % columns) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = (program // columns % heads).to(tl.int64)
    entry = (program // columns // heads).to(tl.int64)
    slot = entry
    live = entry >= 0
    if slots is not None:
        slot = tl.load(slots + entry).to(tl.int64)
        live = (slot >= 0) & (slot < rows)
    if active is not None:
        live = live & (tl.load(active + entry) != 0)
    keys = tl.arange(0, BLOCK_K)
    live_keys = live & (keys < D)
    live_cols = live & (cols < D)
    qs = tl.load(q + entry * q_slot + head * q_head + keys * q_dim, mask=live_keys, other=0.0).to(tl.float32)
    ks = tl.load(k + entry * k_slot + head * k_head + keys * k_dim, mask=live_keys, other=0.0).to(tl.float32)
    vs = tl.load(v + entry * v_slot + head * v_head + cols * v_dim, mask=live_cols, other=0.0).to(tl.float32)
    if SILU:
        qs, ks, vs = _silu(qs, q), _silu(ks, k), _silu(vs, v)
    at = state + slot * state_slot + head * state_head + keys[:, None] * D + cols[None, :]
    tile = live_keys[:, None] & live_cols[None, :]
    values = tl.load(at, mask=tile, other=0.0)
    values = values - values * _one_minus_exp(tl.load(slopes + head)) + ks[:, None] * vs[None, :]
    tl.store(at, values, mask=tile)
    # A masked slot loads zeros only, so that its output is zero.
    result = tl.sum(qs[:, None] * values, axis=0)
    tl.store(out + (entry * heads + head) * D + cols, result, mask=cols < D)


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of every kernel at M1's shapes, for offline compilation; see `triton_norm`."""
    types = {
        "state": "*fp32:16",
        "slopes": "*fp32:16",
        "active": "*i1:16",
        "slots": "*i32:16",
        "heads": "i32:16",
        "rows": "i32",
    }
    cases = []
    for dim, dtype, given in ((128, "bf16", {"active": None, "slots": None}), (128, "bf16", {}), (256, "fp32", {})):
        constants: dict[str, object] = {"D": dim, "BLOCK_K": dim, "BLOCK_V": BLOCK_V, "SILU": bool(given), **given}
        constants |= {"q_dim": 1, "k_dim": 1, "v_dim": 1}
        tensors = dict.fromkeys("q k v out".split(), f"*{dtype}:16")
        signature = {
            name: "constexpr" if name in constants else {**types, **tensors}.get(name, "i32:16")
            for name in _step_kernel.arg_names
        }
        options = {"num_warps": _num_warps(dim)}
        name = f"decode_step[{dim} {dtype}{', slots' if not given else ''}]"
        cases.append((name, _step_kernel, signature, constants, options))
    return cases
