"""Triton kernels of the gated RMSNorm: the epilogue of lightning attention. float32 inside, every offset 64-bit.

A program holds a whole row of channels in registers, so that without tensor parallelism each pass reads every input once.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from m1_kernels.triton_runtime import gpu

__all__ = ["MAX_CHANNELS", "backward", "compile_cases", "forward"]

MAX_CHANNELS = 8192
SUM_ROWS, SUM_COLUMNS = 32, 64
"""Tile of the sum over programs."""


def forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    channels: int,
    all_reduce: Callable[[torch.Tensor], object] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out in x's dtype, contiguous, 1 / sqrt(mean square + eps) fp32 [..., 1]); see `pointwise.gated_rms_norm`.

    One kernel that reads x and gate once; with all_reduce a kernel before it that reads x.
    """
    shape, width = x.shape, x.shape[-1]
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    rows = scale.numel()
    block, options = _block(width), _options(width)
    x, gate = _rows(x), _rows(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner, squares = x.shape[1], None
    if all_reduce is not None:
        squares = torch.empty_like(scale)
        if rows:
            _squares_kernel[(rows,)](x, squares, inner, *x.stride()[:2], C=width, BLOCK=block, **options)
        all_reduce(squares)
    if rows:
        _forward_kernel[(min(rows, _programs(x.device, options["num_warps"])),)](
            x, gate, weight.contiguous(), squares, out, scale, rows, eps, channels, inner,
            *x.stride()[:2], *gate.stride()[:2], *out.stride()[:2],
            C=width, BLOCK=block, STAGES=_stages(2, width, x.dtype), **options,
        )  # fmt: skip
    return out.view(shape), scale


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    channels: int,
    all_reduce: Callable[[torch.Tensor], object] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (x, gate, weight); see `pointwise.gated_rms_norm`. That of x has the strides of x where its channels are adjacent.

    One kernel that reads grad, x and gate once; with all_reduce a kernel before it that reads them too. The gradient of weight is summed
    per program, then over programs in a fixed order: bitwise repeatable on one kind of device.
    """
    shape, width, rows = x.shape, x.shape[-1], scale.numel()
    block, options, weight_rows = _block(width), _options(width), weight.contiguous()
    grad, x, gate = _rows(grad), _rows(x), _rows(gate)
    dx, dgate = torch.empty_like(x), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    inner, products = x.shape[1], None
    strides = [*grad.stride()[:2], *x.stride()[:2], *gate.stride()[:2]]
    if all_reduce is not None:
        products = torch.empty_like(scale)
        if rows:
            _products_kernel[(rows,)](
                grad, x, gate, weight_rows, products, inner, *strides, C=width, BLOCK=block, **options
            )  # fmt: skip
        all_reduce(products)
    programs = min(rows, _programs(x.device, options["num_warps"]))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if rows:
        _backward_kernel[(programs,)](
            grad, x, gate, weight_rows, scale, products, dx, dgate, partial, rows, channels, inner,
            *strides, *dx.stride()[:2], *dgate.stride()[:2], C=width, BLOCK=block, STAGES=_stages(3, width, x.dtype), **options,
        )  # fmt: skip
    dweight = torch.empty_like(weight_rows)
    _sum_kernel[(triton.cdiv(width, SUM_COLUMNS),)](
        partial, dweight, programs, C=width, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4
    )
    return dx.view(shape), dgate.view(shape), dweight


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as [R1, R2, C] with channels next to each other; a view unless its strides cannot be expressed so."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x.reshape(-1, 1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _options(width: int) -> dict[str, int]:
    return {"num_warps": min(max(_block(width) // 512, 4), 16)}


def _stages(inputs: int, width: int, dtype: torch.dtype) -> int:
    """Stages of a pipeline over rows: up to two rows of so many inputs on their way, in at most 100 KiB."""
    return 1 + min(2, 100 * 1024 // (inputs * _block(width) * dtype.itemsize))


def _programs(device: torch.device, num_warps: int) -> int:
    """As many programs that go through rows as their registers (at most 128 a thread) let the device hold at once."""
    if device.type != "cuda":
        return 2
    return gpu(device)[1] * (16 // num_warps)


@triton.jit
def _row_offset(row, inner, outer_stride, inner_stride):
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _squares_kernel(x, squares, inner, x_outer, x_inner, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    xs = tl.load(x + _row_offset(row, inner, x_outer, x_inner) + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(squares + row, tl.sum(xs * xs))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, gate, weight, squares, out, scale, rows, eps, channels, inner,
    x_outer, x_inner, gate_outer, gate_inner, out_outer, out_inner,
    C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    weights = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        xs = tl.load(x + _row_offset(row, inner, x_outer, x_inner) + cols, mask=mask, other=0.0).to(tl.float32)
        at = _row_offset(row, inner, gate_outer, gate_inner) + cols
        share = tl.sigmoid(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
        if squares is None:
            total = tl.sum(xs * xs)
        else:
            total = tl.load(squares + row)
        inverse = tl.rsqrt(total / channels + eps)
        tl.store(scale + row, inverse)
        tl.store(out + _row_offset(row, inner, out_outer, out_inner) + cols, share * xs * inverse * weights, mask=mask)


@triton.jit
def _products_kernel(
    grad, x, gate, weight, products, inner,
    grad_outer, grad_inner, x_outer, x_inner, gate_outer, gate_inner,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    grads = tl.load(grad + _row_offset(row, inner, grad_outer, grad_inner) + cols, mask=mask, other=0.0).to(tl.float32)
    xs = tl.load(x + _row_offset(row, inner, x_outer, x_inner) + cols, mask=mask, other=0.0).to(tl.float32)
    gates = tl.load(gate + _row_offset(row, inner, gate_outer, gate_inner) + cols, mask=mask, other=0.0).to(tl.float32)
    weights = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(products + row, tl.sum(grads * tl.sigmoid(gates) * weights * xs))


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad, x, gate, weight, scale, products, dx, dgate, partial, rows, channels, inner,
    grad_outer, grad_inner, x_outer, x_inner, gate_outer, gate_inner, dx_outer, dx_inner, dgate_outer, dgate_inner,
    C: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With share = sigmoid(gate), g = grad * share * weight, P = sum over all channels of g * x, s = scale:
    dx = s * (g - x * s^2 * P / channels), dgate = g * x * s * (1 - share), dweight = sum over rows of grad * share * x * s.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    weights = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    dweights = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        at = _row_offset(row, inner, grad_outer, grad_inner) + cols
        grads = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        xs = tl.load(x + _row_offset(row, inner, x_outer, x_inner) + cols, mask=mask, other=0.0).to(tl.float32)
        at = _row_offset(row, inner, gate_outer, gate_inner) + cols
        share = tl.sigmoid(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
        inverse = tl.load(scale + row)
        shared = grads * share
        flow = shared * weights
        if products is None:
            product = tl.sum(flow * xs)
        else:
            product = tl.load(products + row)
        normed = xs * inverse
        dweights += shared * normed
        at = _row_offset(row, inner, dgate_outer, dgate_inner) + cols
        tl.store(dgate + at, flow * normed * (1.0 - share), mask=mask)
        at = _row_offset(row, inner, dx_outer, dx_inner) + cols
        tl.store(dx + at, inverse * (flow - normed * (inverse * product / channels)), mask=mask)
    tl.store(partial + program.to(tl.int64) * C + cols, dweights, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(partial, out, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [C] = sum over the rows of partial [rows, C]."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        at = first + tl.arange(0, ROWS)
        inside = (at < rows)[:, None] & (cols < C)[None, :]
        total += tl.load(partial + at[:, None] * C + cols[None, :], mask=inside, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0), mask=cols < C)


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of every kernel at M1's shapes, for offline compilation.

    A type that ends in ":16" is that of a pointer or number which 16 divides.
    """
    types = {"eps": "fp32", "channels": "i32:16", "inner": "i32", "rows": "i32"}
    types |= dict.fromkeys(("scale", "squares", "products", "partial"), "*fp32:16")

    def case(kernel, width, dtype, **constants):
        constants |= {"C": width} if kernel is _sum_kernel else {"C": width, "BLOCK": _block(width)}
        if "STAGES" in kernel.arg_names:
            inputs = 3 if kernel is _backward_kernel else 2
            constants["STAGES"] = _stages(inputs, width, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        signature = {}
        for name in kernel.arg_names:
            stride = name.endswith(("_outer", "_inner"))
            kind = "constexpr" if name in constants else "i32:16" if stride else types.get(name, f"*{dtype}:16")
            signature[name] = kind
        name = f"gated_norm{kernel.__name__.removesuffix('_kernel')}[{width} {dtype}]"
        return name, kernel, signature, constants, _options(width)

    cases = []
    for width, dtype in ((8192, "bf16"), (8192, "fp32")):
        cases.append(case(_forward_kernel, width, dtype, squares=None, inner=1))
        cases.append(case(_backward_kernel, width, dtype, products=None, inner=1))
    for kernel in (_squares_kernel, _forward_kernel, _products_kernel, _backward_kernel):
        cases.append(case(kernel, 1024, "bf16"))
    cases.append(case(_sum_kernel, 8192, "bf16", ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS))
    return cases
