"""SiLU of 16-bit pairs on Hopper (sm_90): inside the forward sweep (`gluon_lightning`), and with the same bits as a pass of its own.

Units that compute powers and reciprocals have a fourth of the rate of those that multiply, so two neighbours a, b share a
reciprocal. From float32, with e = 2^(-x log2(e)), rounded once:

    r = 1 / ((1 + e_a)(1 + e_b))    silu(a) = a (r + e_b r)    silu(b) = b (r + e_a r)

7.5 instructions an element, within 1e-6 (relative) of the exact value before it is rounded. Of max(x, -43), so that products of two
denominators stay below 2^126; silu(-43) = -9e-18 is -0 in float16. A NaN makes its neighbour NaN as well.
"""

import torch
import triton
import triton.language as tl

__all__ = ["assembly", "compile_cases", "forward"]

MINUS_LOG2_E, ONE = "0fBFB8AA3B", "0f3F800000"
LEAST = {"bf16": "0xC22CC22C", "fp16": "0xD160D160"}
"""-43 twice."""
BLOCK = 2048
NUM_WARPS = 4


def assembly(dtype: str) -> str:
    """PTX for two elements of "bf16" or "fp16": $0 of $1."""
    kind = "bf16x2" if dtype == "bf16" else "f16x2"
    lines = [".reg .f32 x0, x1, e0, e1, d0, d1, r0, r1;", ".reg .b32 p, t;", ".reg .b16 s, u;"]
    lines += [f"mov.b32 t, {LEAST[dtype]};", f"max.NaN.{kind} p, $1, t;"]
    if dtype == "bf16":
        lines += ["shl.b32 t, p, 16;", "mov.b32 x0, t;", "and.b32 t, p, 0xffff0000;", "mov.b32 x1, t;"]
    else:
        lines += ["mov.b32 {s, u}, p;", "cvt.f32.f16 x0, s;", "cvt.f32.f16 x1, u;"]
    for i in range(2):
        lines += [f"mul.rn.f32 e{i}, x{i}, {MINUS_LOG2_E};", f"ex2.approx.ftz.f32 e{i}, e{i};"]
    lines += [f"add.rn.f32 d1, e1, {ONE};", "fma.rn.f32 d0, e0, d1, d1;", "rcp.approx.ftz.f32 r1, d0;"]
    lines += ["mul.rn.f32 r0, r1, d1;", "fma.rn.f32 r1, e0, r1, r1;"]
    lines += [f"mul.rn.f32 x{i}, x{i}, r{i};" for i in range(2)]
    lines += [f"cvt.rn.{kind}.f32 $0, x1, x0;"]
    return "{\n" + "\n".join(lines) + "\n}"


BF16 = tl.constexpr(assembly("bf16"))
FP16 = tl.constexpr(assembly("fp16"))


def forward(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write SiLU of x into out: 16-bit, dense, of the same order in memory, which starts at multiples of 16 bytes. May be one tensor."""
    if x.numel():
        _forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)


@triton.jit
def silu(x):
    """Of x, bfloat16 or float16, in Triton or Gluon; its threads hold two elements in a row."""
    text: tl.constexpr = BF16 if x.dtype == tl.bfloat16 else FP16
    return tl.inline_asm_elementwise(text, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _forward_kernel(x, out, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + places, silu(tl.load(x + places, mask=places < size, other=0.0)), mask=places < size)


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) for offline compilation for sm_90."""
    return [
        (
            f"silu_forward[{kind}]",
            _forward_kernel,
            {"x": f"*{kind}:16", "out": f"*{kind}:16", "size": f"{size}:16", "BLOCK": "constexpr"},
            {"BLOCK": BLOCK},
            {"num_warps": NUM_WARPS},
        )
        for kind, size in (("bf16", "i64"), ("fp16", "i32"))
    ]
