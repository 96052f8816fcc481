"""SiLU of 16-bit tiles in registers, for Hopper (sm_90): x / (1 + e^-x) from float32, rounded once.

    e = 2^(-|x| log2(e))    silu(x) = max(x, x e) / (1 + e)

so that 1 + e lies in [1, 2] and one reciprocal serves a group of GROUP elements, taken of the product of their denominators: units
that compute e and reciprocals have a fourth of the rate of those that multiply. c = (1 - e) / 2, with 1 + e = 2 (1 - c), is
clamped to [0, 1], which makes it 0 where x is NaN: a NaN spoils no other element of its group.

Within 1e-6 of the exact value before it is rounded. Zero where x < -126 / log2(e) (-87.3), |silu(x)| < 1e-36; -inf stays -inf.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["assembly"]

MINUS_LOG2_E, MINUS_TWO, MINUS_HALF, HALF, TWO = "0fBFB8AA3B", "0fC0000000", "0fBF000000", "0f3F000000", "0f40000000"


def assembly(dtype: str, group: int) -> str:
    """PTX for 2 or 4 elements of "bf16" or "fp16" in pairs: of $0, $1.. are written as many as are read behind them."""
    pairs = group // 2
    lines = [f".reg .f32 {', '.join(f'x{i}, e{i}, c{i}' for i in range(group))};"]
    lines += [f".reg .f32 {', '.join(f'd{p}, r{p}' for p in range(pairs))};", ".reg .b32 t;", ".reg .b16 s, u;"]
    for p in range(pairs):
        low, high, packed = f"x{2 * p}", f"x{2 * p + 1}", f"${pairs + p}"
        if dtype == "bf16":
            lines += [f"shl.b32 t, {packed}, 16;", f"mov.b32 {low}, t;"]
            lines += [f"and.b32 t, {packed}, 0xffff0000;", f"mov.b32 {high}, t;"]
        else:
            lines += [f"mov.b32 {{s, u}}, {packed};", f"cvt.f32.f16 {low}, s;", f"cvt.f32.f16 {high}, u;"]
    for i in range(group):
        lines += [
            f"abs.f32 c{i}, x{i};",
            f"mul.rn.f32 c{i}, c{i}, {MINUS_LOG2_E};",
            f"ex2.approx.ftz.f32 e{i}, c{i};",
            f"fma.rn.sat.f32 c{i}, e{i}, {MINUS_HALF}, {HALF};",
            f"mul.rn.f32 e{i}, x{i}, e{i};",
            f"max.f32 x{i}, x{i}, e{i};",
            f"neg.f32 c{i}, c{i};",
        ]
    for p in range(pairs):
        # d = (1 + e)(1 + e') / 2 of the pair.
        first, second = f"c{2 * p}", f"c{2 * p + 1}"
        lines += [f"fma.rn.f32 r{p}, {second}, {TWO}, {TWO};", f"fma.rn.f32 d{p}, {first}, r{p}, r{p};"]
    if pairs == 1:
        lines += ["rcp.approx.ftz.f32 r0, d0;"]
    else:
        lines += ["mul.rn.f32 e0, d0, d1;", "rcp.approx.ftz.f32 e0, e0;"]
        lines += ["mul.rn.f32 r0, e0, d1;", "mul.rn.f32 r1, e0, d0;"]
    for p in range(pairs):
        a, b = 2 * p, 2 * p + 1
        lines += [f"fma.rn.f32 e{a}, r{p}, c{b}, r{p};", f"fma.rn.f32 e{b}, r{p}, c{a}, r{p};"]
        lines += [f"mul.rn.f32 x{a}, x{a}, e{a};", f"mul.rn.f32 x{b}, x{b}, e{b};"]
        lines += [f"cvt.rn.{dtype if dtype == 'bf16' else 'f16'}x2.f32 ${p}, x{b}, x{a};"]
    return "{\n" + "\n".join(lines) + "\n}"


BF16_2 = gl.constexpr(assembly("bf16", 2))
BF16_4 = gl.constexpr(assembly("bf16", 4))
FP16_2 = gl.constexpr(assembly("fp16", 2))
FP16_4 = gl.constexpr(assembly("fp16", 4))


@gluon.jit
def silu(x, GROUP: gl.constexpr):
    """Of x, bfloat16 or float16, whose threads hold GROUP elements in a row."""
    if x.dtype == gl.bfloat16:
        text: gl.constexpr = BF16_2 if GROUP == 2 else BF16_4
    else:
        text: gl.constexpr = FP16_2 if GROUP == 2 else FP16_4
    constraints: gl.constexpr = "=&r,r" if GROUP == 2 else "=&r,=&r,r,r"
    return gl.inline_asm_elementwise(text, constraints, [x], dtype=x.dtype, is_pure=True, pack=GROUP)
