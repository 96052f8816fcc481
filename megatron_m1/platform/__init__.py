"""The only place that knows CUDA from CPU: device, backend, optional packages, and megatron-core's CPU patches.

Every entry point calls `setup()` before anything imports megatron.
"""

import ctypes
import functools
import logging
import os
import resource
import sys
import warnings

import torch

from megatron_m1.platform.packages import Backends, doctor_report, probe

__all__ = [
    "Backends",
    "device",
    "device_count",
    "device_name",
    "distributed_backend",
    "doctor_report",
    "is_cuda",
    "peak_memory_bytes",
    "probe",
    "select_device",
    "setup",
    "synchronize",
    "use_deterministic_algorithms",
]


@functools.cache
def setup() -> None:
    """Make megatron.core importable and correct on this machine. Idempotent.

    Without CUDA the patches of `platform/cpu.py` are installed; with CUDA only those for a missing Transformer Engine
    (none if it is present).
    Raises ConfigError if megatron-core is missing, of another version, or imported too early.
    """
    from megatron_m1.platform import cpu

    cpu.check_version()
    if not is_cuda():
        _keep_freed_memory()
    # Import-time remarks of core about Transformer Engine, Apex and its own experiments; `doctor` tells which backends run.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not is_cuda():
        logging.getLogger("torch.utils.cpp_extension").setLevel(
            logging.ERROR
        )  # warns where nvcc is found without a GPU
    without_te = not probe().transformer_engine.present
    if without_te or not is_cuda():
        cpu.install(without_cuda=not is_cuda(), without_te=without_te)


@functools.cache
def is_cuda() -> bool:
    """Whether this process computes on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank: cpu, or cuda:LOCAL_RANK (cuda:0 without that variable)."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_cuda() else torch.device("cpu")


def device_count() -> int | None:
    """GPUs of this machine, each of which takes one rank; None on CPU, which any number of ranks share."""
    return torch.cuda.device_count() if is_cuda() else None


def _keep_freed_memory() -> None:
    """Have glibc reuse freed blocks: by default it gives a step's activations back to the kernel and faults them in again."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, (1 << 31) - 1)


def device_name() -> str:
    """The model name of this rank's device, such as `NVIDIA H200`; `cpu` on CPU."""
    return torch.cuda.get_device_name(device()) if is_cuda() else "cpu"


def select_device() -> None:
    """Make `device()` the current device of this process; call it before the process group is initialised."""
    if is_cuda():
        torch.cuda.set_device(device())


def use_deterministic_algorithms(flag: bool) -> None:
    """Whether torch takes only algorithms that repeat bit by bit, raising RuntimeError for an operation that has none. Call it
    before the first work on the device: cuBLAS reads its workspace setting once."""
    if flag and is_cuda():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(flag)


def distributed_backend() -> str:
    """Backend for torch.distributed.init_process_group: "nccl" or "gloo"."""
    return "nccl" if is_cuda() else "gloo"


def synchronize() -> None:
    """Return when all work queued on `device()` is done (at once on CPU)."""
    if is_cuda():
        torch.cuda.synchronize(device())


def peak_memory_bytes() -> int:
    """Highest memory use so far: of torch's allocator on `device()`, or of the resident process on CPU."""
    if is_cuda():
        return torch.cuda.max_memory_allocated(device())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
