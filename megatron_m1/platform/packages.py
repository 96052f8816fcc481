"""What is installed here, and which backend is used for what."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform as python_platform
import shutil
from dataclasses import dataclass, fields

import torch
from m1_kernels.dispatch import IMPLEMENTATIONS

__all__ = ["Backends", "Package", "doctor_report", "probe"]


@dataclass(frozen=True)
class Package:
    """One optional package: whether it can be used, its version ("" if absent), and the reason in words."""

    present: bool
    version: str
    reason: str


@dataclass(frozen=True)
class Backends:
    """Optional packages found by `probe()`."""

    transformer_engine: Package
    apex: Package
    flash_attn: Package
    triton: Package
    grouped_mm: Package


@functools.cache
def probe() -> Backends:
    """What can be used in this process; looked up once, without importing megatron."""
    return Backends(
        transformer_engine=_importable("transformer_engine", "transformer_engine.pytorch", needs_cuda=True),
        # The `apex` of PyPI is another project; NVIDIA's has the fused optimizers.
        apex=_importable("apex", "apex.optimizers", needs_cuda=True),
        flash_attn=_importable("flash_attn", "flash_attn", needs_cuda=True),
        triton=_importable("triton", "triton", needs_cuda=True),
        grouped_mm=_grouped_mm(),
    )


def _importable(distribution: str, module: str, *, needs_cuda: bool) -> Package:
    root = module.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        return Package(False, "", "not installed")
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    if needs_cuda and not torch.cuda.is_available():
        return Package(False, version, "installed, but there is no CUDA device")
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return Package(False, version, f"installed, but `import {module}` fails: {error}")
    return Package(True, version, "usable")


def _grouped_mm() -> Package:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return Package(
            False, "", f"torch {torch.__version__} has no torch.nn.functional.grouped_mm; torch >= 2.11 does"
        )
    return Package(True, torch.__version__, "part of torch")


def doctor_report() -> str:
    """Several lines for a reader: versions, devices, optional packages, and which backend will be used and why."""
    found = probe()
    cuda = torch.cuda.is_available()
    lines = ["Versions"]
    lines += [f"  {'python':<20}{python_platform.python_version()} on {python_platform.machine()}"]
    lines += [f"  {name:<20}{_version(name)}" for name in ("torch", "megatron-core", "transformers", "numpy")]
    lines += ["Devices", f"  {'CPU':<20}{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    if cuda:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines += [f"  {f'cuda:{index}':<20}{properties.name}, {properties.total_memory / 2**30:.0f} GiB"]
    else:
        lines += [f"  {'CUDA':<20}none ({_no_cuda_reason()})"]
    lines += ["Optional packages"]
    for field in fields(found):
        package = getattr(found, field.name)
        lines += [f"  {field.name:<20}{package.version or '-'}: {package.reason}"]
    lines += ["Backends that will be used"]
    lines += [f"  {name:<20}{choice}" for name, choice in _choices(found, cuda=cuda)]
    return "\n".join(lines)


def _choices(found: Backends, *, cuda: bool) -> list[tuple[str, str]]:
    if found.transformer_engine.present:
        adam = "Transformer Engine's FusedAdam"
    elif found.apex.present:
        adam = "Apex's FusedAdam"
    else:
        adam = "megatron_m1's AdamW on torch's fused kernel (no Transformer Engine, no Apex)"
    patches = "none (CUDA is present)" if cuda else "megatron_m1/platform/cpu.py (no CUDA)"
    return [
        ("device", "cuda:LOCAL_RANK" if cuda else "cpu (no CUDA device)"),
        ("collectives", "nccl (CUDA)" if cuda else "gloo (no CUDA)"),
        ("megatron patches", patches),
        ("lightning attention", _lightning("cuda" if cuda else "cpu")),
        ("experts", "torch grouped_mm" if found.grouped_mm.present else f"none: {found.grouped_mm.reason}"),
        ("AdamW", adam),
        ("C++ compiler", shutil.which("c++") or shutil.which("g++") or "none found; not needed"),
    ]


def _lightning(device: str) -> str:
    """What implementation="auto" of m1_kernels.lightning_attention takes here."""
    q = torch.empty(1, 64, 1, 128, dtype=torch.bfloat16, device=device)
    for name, implementation in IMPLEMENTATIONS.items():
        if device in implementation.auto_on and implementation.obstacle(q) is None:
            return f"{name} ({implementation.why})"
    return "none can run here"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _no_cuda_reason() -> str:
    return (
        f"torch is built for CUDA {torch.version.cuda}, no device found" if torch.version.cuda else "CPU build of torch"
    )
