"""Triton kernels of the scaled SwiGLU between the experts' two products. float32 inside, every row offset 64-bit."""

import torch
import triton
import triton.language as tl

__all__ = ["backward", "compile_cases", "forward"]

BLOCK = 2048
NUM_WARPS = 4


def forward(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * scale [n, F], contiguous; see `pointwise.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = _dense_rows(gate_up)
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _forward_kernel[(rows, triton.cdiv(width, BLOCK))](
            gate_up, scale, out, gate_up.stride(0), scale.stride(0), F=width, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def backward(grad: torch.Tensor, gate_up: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of (gate_up, scale), contiguous; see `pointwise.swiglu`. One kernel; a program sums the scale gradient of its row."""
    rows, width = grad.shape
    grad, gate_up = _dense_rows(grad), _dense_rows(gate_up)
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    dscale = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
    if rows:
        _backward_kernel[(rows,)](
            grad, gate_up, scale, dgate_up, dscale, grad.stride(0), gate_up.stride(0), scale.stride(0),
            F=width, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dgate_up, dscale


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _forward_kernel(gate_up, scale, out, gate_up_row, scale_row, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    source = gate_up + row * gate_up_row + cols
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(scale + row * scale_row).to(tl.float32)
    tl.store(out + row * F + cols, gate * tl.sigmoid(gate) * up * factor, mask=mask)


@triton.jit
def _backward_kernel(
    grad, gate_up, scale, dgate_up, dscale, grad_row, gate_up_row, scale_row, F: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row * scale_row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, F, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < F
        source = gate_up + row * gate_up_row + cols
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + F, mask=mask, other=0.0).to(tl.float32)
        grads = tl.load(grad + row * grad_row + cols, mask=mask, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        activated = gate * share
        total += grads * activated * up
        target = dgate_up + row * 2 * F + cols
        scaled = grads * factor
        tl.store(target, scaled * up * (share + activated * (1.0 - share)), mask=mask)
        tl.store(target + F, scaled * activated, mask=mask)
    tl.store(dscale + row, tl.sum(total))


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) at M1's expert width, for offline compilation; see `triton_norm`."""
    constants: dict[str, object] = {"F": 9216, "BLOCK": BLOCK}
    kinds = {
        "scale": "*fp32:16",
        "dscale": "*fp32:16",
        "scale_row": "i32",
        "grad_row": "i32:16",
        "gate_up_row": "i32:16",
    }
    cases = []
    for kernel in (_forward_kernel, _backward_kernel):
        signature = {a: "constexpr" if a in constants else kinds.get(a, "*bf16:16") for a in kernel.arg_names}
        name = f"swiglu{kernel.__name__.removesuffix('_kernel')}[9216 bf16]"
        cases.append((name, kernel, signature, dict(constants), {"num_warps": NUM_WARPS}))
    return cases
