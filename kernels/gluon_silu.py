"""SiLU of 16-bit tiles in registers, for Hopper (sm_90): x / (1 + e^-x) from float32, rounded once.

With e = 2^(-x log2(e)), of elements one by one or of two neighbours a, b with one reciprocal, as units that compute powers and
reciprocals have a fourth of the rate of those that multiply:

    silu(a) = a r                   r = 1 / (1 + e)
    silu(a) = a (r + e_b r)         r = 1 / ((1 + e_a)(1 + e_b))

Both are within 1e-6 of the exact value before it is rounded, and both are inf at inf. One by one: zero where x < -126 / log2(e)
(-87.3), |silu(x)| < 1e-36, and NaN at -inf, as x / (1 + e^-x) is. In pairs: of max(x, -43), so that products of two denominators
stay below 2^126; silu(-43) = -9e-18 is -0 in float16. A NaN makes its neighbour NaN as well.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["assembly"]

MINUS_LOG2_E, ONE = "0fBFB8AA3B", "0f3F800000"
LEAST = {"bf16": "0xC22CC22C", "fp16": "0xD160D160"}
"""-43 twice."""


def assembly(dtype: str, group: int) -> str:
    """PTX for two elements of "bf16" or "fp16", of which `group`, 1 or 2, share a reciprocal: $0 of $1."""
    kind = "bf16x2" if dtype == "bf16" else "f16x2"
    lines = [".reg .f32 x0, x1, e0, e1, d0, d1, r0, r1;", ".reg .b32 p, t;", ".reg .b16 s, u;"]
    lines += ["mov.b32 p, $1;"] if group == 1 else [f"mov.b32 t, {LEAST[dtype]};", f"max.NaN.{kind} p, $1, t;"]
    if dtype == "bf16":
        lines += ["shl.b32 t, p, 16;", "mov.b32 x0, t;", "and.b32 t, p, 0xffff0000;", "mov.b32 x1, t;"]
    else:
        lines += ["mov.b32 {s, u}, p;", "cvt.f32.f16 x0, s;", "cvt.f32.f16 x1, u;"]
    for i in range(2):
        lines += [f"mul.rn.f32 e{i}, x{i}, {MINUS_LOG2_E};", f"ex2.approx.ftz.f32 e{i}, e{i};"]
    if group == 1:
        for i in range(2):
            lines += [f"add.rn.f32 d{i}, e{i}, {ONE};", f"rcp.approx.ftz.f32 r{i}, d{i};"]
    else:
        lines += [f"add.rn.f32 d1, e1, {ONE};", "fma.rn.f32 d0, e0, d1, d1;", "rcp.approx.ftz.f32 r1, d0;"]
        lines += ["mul.rn.f32 r0, r1, d1;", "fma.rn.f32 r1, e0, r1, r1;"]
    lines += [f"mul.rn.f32 x{i}, x{i}, r{i};" for i in range(2)]
    lines += [f"cvt.rn.{kind}.f32 $0, x1, x0;"]
    return "{\n" + "\n".join(lines) + "\n}"


BF16_1 = gl.constexpr(assembly("bf16", 1))
BF16_2 = gl.constexpr(assembly("bf16", 2))
FP16_1 = gl.constexpr(assembly("fp16", 1))
FP16_2 = gl.constexpr(assembly("fp16", 2))


@gluon.jit
def silu(x, GROUP: gl.constexpr):
    """Of x, bfloat16 or float16, whose threads hold two elements in a row. GROUP: of `assembly`."""
    if x.dtype == gl.bfloat16:
        text: gl.constexpr = BF16_1 if GROUP == 1 else BF16_2
    else:
        text: gl.constexpr = FP16_1 if GROUP == 1 else FP16_2
    return gl.inline_asm_elementwise(text, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
