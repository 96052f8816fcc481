"""Triton kernels of one decoding step of softmax attention: spans of a sequence's blocks at once, then their merge.

The grid depends on shapes alone, and no program reads beyond its sequence's last token, so that one CUDA graph serves sequences
of any length.
"""

import torch
import triton
import triton.language as tl

__all__ = ["compile_cases", "step"]

LOG2E = 1.4426950408889634
PROGRAMS = 528
"""Programs to aim for: four on each of the 132 multiprocessors of an H100 or H200."""
MAX_SPANS = 64


def step(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[B, Hq, D], contiguous; see `paged.softmax_attention_step`. Two launches, fit for CUDA graphs."""
    batch, heads, dim = q.shape
    tokens, groups = keys.shape[1:3]
    if tokens != triton.next_power_of_2(tokens) or tokens < 16:
        raise ValueError(f"blocks of {tokens} tokens must be a power of two and 16 or more; use implementation='torch'")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not batch:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    spans = _spans(tables.shape[1], batch * groups)
    parts = torch.empty(batch, heads, spans, dim, dtype=torch.float32, device=q.device)
    largest, total = torch.empty(2, batch, heads, spans, dtype=torch.float32, device=q.device)
    queries, block = heads // groups, max(16, triton.next_power_of_2(dim))
    _span_kernel[(batch * groups, spans)](
        q, keys, values, tables, positions, parts, largest, total, scale * LOG2E, groups,
        *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], tables.stride(0),
        SPANS=spans, R=queries, D=dim, BLOCK_R=max(16, triton.next_power_of_2(queries)), BLOCK_D=block, BLOCK_T=tokens,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge_kernel[(batch * heads,)](
        parts,
        largest,
        total,
        out,
        SPANS=spans,
        D=dim,
        BLOCK_S=triton.next_power_of_2(spans),
        BLOCK_D=block,
        num_warps=4,
    )
    return out


def _spans(blocks: int, pairs: int) -> int:
    """Spans into which the blocks of a sequence are cut, given how many pairs of sequences and key heads there are."""
    return max(1, min(blocks, MAX_SPANS, PROGRAMS // pairs))


@triton.jit
def _span_kernel(
    q, keys, values, tables, positions, parts, largest, total, scale_log2, groups,
    q_seq, q_head, keys_block, keys_token, keys_head, values_block, values_token, values_head, table_row,
    SPANS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Over the span's keys: max m of the scores (base 2), sum of 2^(score - m), and the values weighted so."""
    sequence = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    span = tl.program_id(1)
    length = tl.load(positions + sequence).to(tl.int32) + 1
    blocks = tl.cdiv(length, BLOCK_T)
    each = tl.cdiv(blocks, SPANS)
    first = span * each
    last = tl.minimum(first + each, blocks)
    rows, dims, tokens = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    head = group * R + rows
    wanted = (rows < R)[:, None] & (dims < D)[None, :]
    qs = tl.load(q + sequence * q_seq + head[:, None] * q_head + dims[None, :], mask=wanted, other=0.0)
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for index in range(first, last):
        block = tl.load(tables + sequence * table_row + index).to(tl.int64)
        seen = index * BLOCK_T + tokens < length
        tile = seen[:, None] & (dims < D)[None, :]
        at = keys + block * keys_block + group * keys_head
        ks = tl.load(at + tokens[:, None] * keys_token + dims[None, :], mask=tile, other=0.0)
        scores = tl.dot(qs, tl.trans(ks), input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Finite: a block of the span has a token that is seen.
        new = tl.maximum(m, tl.max(scores, axis=1))
        old = tl.exp2(m - new)
        weights = tl.exp2(scores - new[:, None])
        sums = sums * old + tl.sum(weights, axis=1)
        at = values + block * values_block + group * values_head
        vs = tl.load(at + tokens[:, None] * values_token + dims[None, :], mask=tile, other=0.0)
        acc = acc * old[:, None] + tl.dot(weights.to(vs.dtype), vs, input_precision="ieee")
        m = new
    place = (sequence * groups * R + head) * SPANS + span
    tl.store(parts + place[:, None] * D + dims[None, :], acc, mask=wanted)
    tl.store(largest + place, m, mask=rows < R)
    tl.store(total + place, sums, mask=rows < R)


@triton.jit
def _merge_kernel(
    parts, largest, total, out,
    SPANS: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    spans, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m = tl.load(largest + row * SPANS + spans, mask=spans < SPANS, other=float("-inf"))
    sums = tl.load(total + row * SPANS + spans, mask=spans < SPANS, other=0.0)
    # Without any key every m is -inf, where m - max would be NaN; the output is then 0.
    weights = tl.exp2(m - tl.maximum(tl.max(m, axis=0), -1e30))
    tile = (spans < SPANS)[:, None] & (dims < D)[None, :]
    acc = tl.load(parts + (row * SPANS + spans[:, None]) * D + dims[None, :], mask=tile, other=0.0)
    whole = tl.sum(weights * sums, axis=0)
    result = tl.sum(weights[:, None] * acc, axis=0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out + row * D + dims, result, mask=dims < D)


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of both kernels at M1's shapes, for offline compilation; see `triton_norm`."""
    kinds = {"tables": "*i32:16", "positions": "*i64:16", "scale_log2": "fp32", "groups": "i32", "table_row": "i32"}
    kinds |= dict.fromkeys(("parts", "largest", "total"), "*fp32:16")
    cases = []
    for spans in (1, MAX_SPANS):
        constants: dict[str, object] = {"SPANS": spans, "D": 128, "BLOCK_D": 128}
        span = {**constants, "R": 8, "BLOCK_R": 16, "BLOCK_T": 64}
        merge = {**constants, "BLOCK_S": spans}
        for kernel, given, options in (
            (_span_kernel, span, {"num_warps": 4, "num_stages": 2}),
            (_merge_kernel, merge, {"num_warps": 4}),
        ):
            signature = {}
            for name in kernel.arg_names:
                tensor = name in ("q", "keys", "values", "out")
                kind = kinds.get(name, "*bf16:16" if tensor else "i32:16")
                signature[name] = "constexpr" if name in given else kind
            name = f"paged{kernel.__name__.removesuffix('_kernel')}[128 bf16, {spans} spans]"
            cases.append((name, kernel, signature, given, options))
    return cases
