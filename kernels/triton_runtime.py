"""Whether Triton kernels can run here: on a CUDA device, or in Triton's interpreter on the CPU."""

import functools
import os

import torch

__all__ = ["gpu", "interpreting", "obstacle"]


def interpreting() -> bool:
    """True when Triton was told to interpret its kernels in Python: TRITON_INTERPRET=1, set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def gpu(device: torch.device) -> tuple[int, int]:
    """(Compute capability times ten, multiprocessors); of a small sm_90 for the interpreter."""
    if device.type != "cuda":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def obstacle(x: torch.Tensor) -> str | None:
    """Why a Triton kernel cannot take x, with the remedy, or None when it can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; pip install triton"
    if x.dtype == torch.float64:
        return "its kernels accumulate in float32; use bf16, fp16 or fp32"
    if x.is_cuda:
        if gpu(x.device)[0] < 80:
            return "its kernels need compute capability 8.0 (A100) or newer"
        return None
    if x.device.type == "cpu" and interpreting():
        return None
    return f"its kernels run on cuda, or on cpu in Triton's interpreter (TRITON_INTERPRET=1), not on {x.device.type}"
