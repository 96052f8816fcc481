"""What import, export and verify share: plans, opening both sides with checks, progress."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_m1.checkpoint import folders
from megatron_m1.checkpoint.dcp import NativeReader
from megatron_m1.checkpoint.hf_config import read_hf_config
from megatron_m1.checkpoint.hf_files import HfReader, Stored
from megatron_m1.checkpoint.names import HfFormat, NativeTensor, native_layout
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import from_yaml
from megatron_m1.config.schema import Config, ModelConfig

__all__ = [
    "SOURCE_DTYPES",
    "Log",
    "Native",
    "Plan",
    "Progress",
    "export_dtypes",
    "free_bytes",
    "is_buffer",
    "native_units",
    "open_hf",
    "open_native",
    "report",
    "require_space",
    "row_bytes",
    "size",
]

Log = Callable[[str], None]
SOURCE_DTYPES = "hf_dtypes.json"
"""In an imported checkpoint: dtypes of the source that an export would not choose by itself, for a bitwise round trip."""


@dataclass(frozen=True)
class Plan:
    """What a conversion would read and write; nothing has been done."""

    tensors: int
    read_bytes: int
    write_bytes: int
    files: int
    peak_bytes: int
    """Largest set of tensors in memory at once (the interpreter itself, about 0.4 GB, comes on top)."""
    free_bytes: int
    """Free space where the output goes."""

    def lines(self) -> list[str]:
        fits = "enough" if self.free_bytes >= self.write_bytes else "NOT ENOUGH"
        return [
            f"tensors: {self.tensors:,} (Hugging Face names)",
            f"read:    {self.read_bytes:,} bytes",
            f"write:   {self.write_bytes:,} bytes in {self.files:,} files; {self.free_bytes:,} bytes are free: {fits}",
            f"memory:  {self.peak_bytes:,} bytes of tensors at most",
        ]


def open_hf(hf: Path, format: HfFormat) -> tuple[ModelConfig, HfReader]:
    """Configuration and headers of a directory, checked against each other."""
    model = read_hf_config(hf, format)
    reader = HfReader(hf)
    expected = {piece.name: piece.shape for native in native_layout(model) for piece in native.pieces}
    found = {name: stored for name, stored in reader.tensors.items() if not is_buffer(name)}
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise ConfigError(
            f"{unexpected[0]} in {hf / found[unexpected[0]].file} ({len(unexpected)} such tensors) is unknown to a model with "
            f"num_hidden_layers={model.num_hidden_layers}, num_local_experts={model.num_local_experts}, "
            f"shared_intermediate_size={model.shared_intermediate_size}; correct config.json."
        )
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{name} is missing from {hf}: no file holds it, but config.json asks for it.")
        if found[name].shape != shape:
            raise ConfigError(
                f"{name} in {hf / found[name].file} has shape {found[name].shape}; config.json implies {shape}."
            )
    return model, reader


def is_buffer(name: str) -> bool:
    return name.endswith((".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay", ".inv_freq"))


@dataclass(frozen=True)
class Native:
    """A native checkpoint, opened and checked against its own configuration."""

    step: Path
    config: Config
    reader: NativeReader
    layout: list[NativeTensor]


def open_native(checkpoint: Path) -> Native:
    """checkpoint: a save folder (its `latest` is taken) or a step folder.

    Raises ConfigError for a missing checkpoint or configuration and for a tensor that is missing or of another shape.
    """
    step = folders.resolve(checkpoint, option="--checkpoint")
    config = from_yaml(step / "config.yaml")
    native = Native(step, config, NativeReader(step), native_layout(config.model))
    check_native(step, native.layout, native.reader)
    return native


def check_native(step: Path, layout: list[NativeTensor], reader: NativeReader) -> None:
    for native in layout:
        if native.name not in reader.shapes:
            raise ConfigError(
                f"{native.name} is missing from {step}, though its config.yaml asks for it; wrong checkpoint?"
            )
        if reader.shapes[native.name] != native.shape:
            raise ConfigError(
                f"{native.name} in {step} has shape {reader.shapes[native.name]}; its config.yaml implies {native.shape}."
            )


def native_units(native: NativeTensor, reader: NativeReader) -> list[tuple[int, int]]:
    return reader.cuts(native.name) if native.per_expert else [(0, native.shape[0])]


def export_dtypes(
    model: ModelConfig, natives: dict[str, torch.dtype], dtype: torch.dtype | None, record: dict[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Hugging Face name -> dtype to write. natives: dtypes of the native tensors; record: exceptions of an import."""
    chosen: dict[str, torch.dtype] = {}
    for native in native_layout(model):
        if native.name.endswith("router.weight"):
            default = torch.float32
        else:
            default = dtype or natives["embedding.word_embeddings.weight" if native.fp32 else native.name]
        chosen |= {piece.name: record.get(piece.name, default) for piece in native.pieces}
    return chosen


def report(differences: list[str], strict: bool, log: Log) -> None:
    for text in differences:
        log(f"warning: {text}")
    if differences and strict:
        raise ConfigError(
            f"--strict: {len(differences)} warning{'s' * (len(differences) > 1)} above; nothing was written."
        )


def row_bytes(native: NativeTensor, dtype: torch.dtype) -> int:
    return math.prod(native.shape[1:]) * dtype.itemsize


def size(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def free_bytes(path: Path) -> int:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def require_space(path: Path, needed: int) -> None:
    free = free_bytes(path)
    if free < needed:
        raise ConfigError(f"{path} has {free:,} bytes free, {needed:,} are needed; free some or name another place.")


class Progress:
    """Logs bytes done at most every ten seconds."""

    def __init__(self, total: int, log: Log):
        self.total, self.log = total, log
        self.done, self.started = 0, time.monotonic()
        self.last = self.started

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= 10:
            self.last = now
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate if rate else math.inf
            self.log(f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left")
