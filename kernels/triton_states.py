"""The Triton kernel by which tokens read the state that their document starts from, or the gradient of the one it leaves behind."""

import torch
import triton
import triton.language as tl
from m1_kernels.triton_lightning import LOG2_E, _dot, _locate
from m1_kernels.triton_runtime import interpreting

__all__ = ["compile_cases", "read_states_triton"]

SEGMENT = 1024
"""Tokens of a program; any number gives the same bits."""


def read_states_triton(
    q: torch.Tensor,
    states: torch.Tensor,
    slopes: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    transposed: bool = False,
    horizon: bool = True,
) -> None:
    """Adds to `out`; see `lightning_attention_read`. The state is an operand in the dtype of q, all sums are in float32.

    horizon: tokens whose weight is exactly zero in float32 are neither read nor written; False takes them, with bitwise equal results.
    """
    batch, tokens, heads, dim = q.shape
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if not q.numel() or not documents:
        return
    q, out_rows = _with_unit_stride(q), _with_unit_stride(out)
    spans = batch * triton.cdiv(tokens, SEGMENT) if cu_seqlens is None else tokens // SEGMENT + documents + 1
    tile = _tile(q.dtype, _padded(dim))
    _read_states[(spans * heads * triton.cdiv(dim, tile["BV"]),)](
        q, states.contiguous(), out_rows, slopes.float().contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        *q.stride()[:3], *out_rows.stride()[:3], tokens, heads, SEGMENT, documents,
        D=dim, DP=_padded(dim), REVERSE=reverse, TRANSPOSED=transposed, HORIZON=horizon, PRECISION=_precision(q.dtype),
        num_warps=4, **tile,
    )  # fmt: skip
    if out_rows is not out:
        out.copy_(out_rows)


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(dim: int) -> int:
    return triton.next_power_of_2(dim)


def _tile(dtype: torch.dtype, padded_dim: int) -> dict[str, int]:
    """Tokens of a chunk, channels of the value side."""
    return {"C": 32, "BV": min(padded_dim, 32)} if dtype == torch.float32 else {"C": 64, "BV": min(padded_dim, 64)}


def _precision(dtype: torch.dtype) -> str:
    if interpreting():
        return "upcast"
    return "tf32x3" if dtype == torch.float32 else "ieee"


@triton.jit(do_not_specialize=["T", "documents"])
def _read_states(
    A, States, Out, Slopes, Cu,
    a_row, a_token, a_head, o_row, o_token, o_head,
    T, H, SEGMENT, documents,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, HORIZON: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i += e^{-s (i+1)} a_i S, or e^{-s (n-1-i)} a_i S (REVERSE), of one head, value block and span.

    Grid: spans * H * ceil(D / BV).
    """
    BLOCKS: tl.constexpr = (D + BV - 1) // BV
    VARLEN: tl.constexpr = Cu is not None
    pid = tl.program_id(0)
    w = pid // (H * BLOCKS)
    h = pid // BLOCKS % H
    columns = pid % BLOCKS * BV + tl.arange(0, BV)
    row, document, start, tokens, _, _, begin, end = _locate(w, Cu, T, SEGMENT, documents, VARLEN)
    if (document < documents) & (tokens > 0):
        s = tl.load(Slopes + h) * LOG2_E
        first = start
        last = start + tokens
        if HORIZON:
            # 2^-150 rounds to zero in float32, denormals included
            reach = tl.minimum(150.0 / tl.maximum(s, 1e-30) + 2.0, 1e9).to(tl.int32)
            if REVERSE:
                first = start + tl.maximum(end - reach - start, 0) // C * C
            else:
                last = tl.minimum(last, begin + reach)
        channels = tl.arange(0, DP)
        places = channels[:, None] * D + columns[None, :]
        if TRANSPOSED:
            places = channels[:, None] + columns[None, :] * D
        inside = (channels < D)[:, None] & (columns < D)[None, :]
        state = tl.load(States + (document.to(tl.int64) * H + h) * D * D + places, mask=inside, other=0.0)
        state = state.to(A.dtype.element_ty)
        a_rows = A + row.to(tl.int64) * a_row + h * a_head + channels[None, :]
        out_rows = Out + row.to(tl.int64) * o_row + h * o_head + columns[None, :]
        for t in range(first, last, C):
            i = t + tl.arange(0, C)
            there = (i < last)[:, None]
            a = tl.load(a_rows + i.to(tl.int64)[:, None] * a_token, mask=there & (channels < D)[None, :], other=0.0)
            gap = i - begin + 1
            if REVERSE:
                gap = end - 1 - i
            weight = tl.exp2(-s * tl.maximum(gap, 0).to(tl.float32))
            read = _dot(a, state, None, PRECISION) * weight[:, None]
            place = out_rows + i.to(tl.int64)[:, None] * o_token
            mask = there & (columns < D)[None, :]
            before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, (before + read).to(Out.dtype.element_ty), mask=mask)


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) at M1's shapes, for offline compilation; see `triton_norm`."""
    types = {"States": "*fp32:16", "Slopes": "*fp32:16", "Cu": "*i32:16"}
    types |= dict.fromkeys(("T", "documents", "SEGMENT"), "i32")
    cases = []
    shapes = (
        (128, torch.bfloat16, False, False),
        (128, torch.bfloat16, True, True),
        (128, torch.float32, False, False),
        (256, torch.bfloat16, False, True),
    )
    for dim, dtype, reverse, packed in shapes:
        tile = _tile(dtype, dim)
        constants: dict[str, object] = {
            "D": dim,
            "DP": dim,
            "REVERSE": reverse,
            "TRANSPOSED": reverse,
            "HORIZON": True,
            **tile,
        }
        constants |= {"PRECISION": "tf32x3" if dtype == torch.float32 else "ieee"} | ({} if packed else {"Cu": None})
        kind = "fp32" if dtype == torch.float32 else "bf16"
        tensors = dict.fromkeys(("A", "Out"), f"*{kind}:16")
        signature = {
            name: "constexpr" if name in constants else {**types, **tensors}.get(name, "i32:16")
            for name in _read_states.arg_names
        }
        name = f"read_states{' reverse' if reverse else ''}[{dim} {kind}{' packed' if packed else ''}]"
        cases.append((name, _read_states, signature, constants, {"num_warps": 4}))
    return cases
