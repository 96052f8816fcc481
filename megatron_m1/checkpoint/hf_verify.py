"""Comparison of a native checkpoint with a Hugging Face directory, bit by bit."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_m1.checkpoint.hf_common import Log, Progress, native_units, open_hf, open_native, size
from megatron_m1.checkpoint.hf_files import HfReader
from megatron_m1.checkpoint.names import HfFormat, Piece, split
from megatron_m1.config.schema import ModelConfig

__all__ = ["Verification", "verify_hf"]


@dataclass
class Verification:
    """Outcome of `verify_hf`; it holds if `mismatches` is empty."""

    compared: int = 0
    rounded: list[str] = field(default_factory=list)
    """Tensors equal only after rounding the native one to the dtype of the file."""
    mismatches: list[str] = field(default_factory=list)


def verify_hf(checkpoint: Path, hf: Path, format: HfFormat, *, log: Log = print) -> Verification:
    """Compare every tensor of a native checkpoint and a Hugging Face directory bit by bit, and the two configurations.

    Dtypes may differ: values are compared in the wider one; a file that holds the rounded native value is counted apart.
    Raises ConfigError where either side is incomplete or damaged.
    """
    hf_model, hf_reader = open_hf(hf, format)
    native = open_native(checkpoint)
    model, reader = native.config.model, native.reader
    result = Verification(mismatches=config_differences(model, hf_model, native.step, hf))
    if result.mismatches:
        return result
    progress = Progress(sum(map(size, hf_reader.tensors.values())), log)
    for tensor in native.layout:
        for start, stop in native_units(tensor, reader):
            for piece, ours in split(tensor, reader.read(tensor.name, start, stop), model, start=start):
                compare(piece, ours, hf_reader, result)
                progress.add(size(hf_reader.tensors[piece.name]))
    return result


def compare(piece: Piece, ours: Tensor, reader: HfReader, result: Verification) -> None:
    theirs = reader.read(piece.name)
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    result.compared += 1
    if same_bits(ours.to(wide), theirs.to(wide)):
        return
    if ours.dtype == wide and same_bits(ours.to(theirs.dtype), theirs):
        result.rounded.append(piece.name)
        return
    difference = (ours.to(wide) - theirs.to(wide)).abs()
    result.mismatches.append(
        f"{piece.name} in {reader.folder / reader.tensors[piece.name].file}: {int((difference != 0).sum()):,} of "
        f"{difference.numel():,} values differ, by {difference.max().item():.3g} at most"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def config_differences(ours: ModelConfig, theirs: ModelConfig, step: Path, hf: Path) -> list[str]:
    same_form = [asdict(replace(model, attn_type_list=model.layer_types())) for model in (ours, theirs)]
    return [
        f"model.{key}={value!r} in {step / 'config.yaml'}, {same_form[1][key]!r} in {hf / 'config.json'}"
        for key, value in same_form[0].items()
        if value != same_form[1][key] and key not in ("init", "init_std")
    ]
