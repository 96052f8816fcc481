"""Hugging Face directory -> native checkpoint, tensor by tensor: no model is built, memory is about one expert."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from m1_kernels import slopes

from megatron_m1.checkpoint import folders
from megatron_m1.checkpoint.dcp import NativeWriter
from megatron_m1.checkpoint.hf_common import (
    SOURCE_DTYPES,
    Log,
    Plan,
    Progress,
    export_dtypes,
    free_bytes,
    open_hf,
    report,
    require_space,
    row_bytes,
    size,
)
from megatron_m1.checkpoint.hf_files import HfReader
from megatron_m1.checkpoint.manifest import write_manifest
from megatron_m1.checkpoint.names import HfFormat, NativeTensor, join, native_layout
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import ModelConfig

__all__ = ["import_hf", "plan_import"]


def plan_import(hf: Path, checkpoint: Path, format: HfFormat) -> Plan:
    """Plan of `import_hf`, from config.json and the headers alone; raises what it would raise before writing."""
    model, reader = open_hf(hf, format)
    units = [(native, unit) for native in native_layout(model) for unit in import_units(native)]
    peak = 0
    for native, (start, stop) in units:
        largest = max(size(reader.tensors[piece.name]) for piece in native.within(start, stop))
        peak = max(peak, (stop - start) * row_bytes(native, native_dtype(native, reader)) + largest)
    return Plan(
        tensors=len(reader.tensors),
        read_bytes=sum(map(size, reader.tensors.values())),
        write_bytes=sum(
            native.shape[0] * row_bytes(native, native_dtype(native, reader)) for native in native_layout(model)
        ),
        files=model.num_hidden_layers + 8,
        peak_bytes=peak,
        free_bytes=free_bytes(checkpoint),
    )


def import_hf(
    hf: Path, checkpoint: Path, format: HfFormat, *, strict: bool = False, overwrite: bool = False, log: Log = print
) -> Path:
    """Write `checkpoint`/step_00000000 from the directory `hf` and point `latest` at it; returns that folder.

    Values are stored as they are (float16 as float32; router and head as float32, which loses nothing). The folder holds the
    weights and config.yaml with the `model` section: load it with `checkpoint.weights_only: true`.
    Raises ConfigError, before anything is written, for a tensor that is missing, unexpected or of a wrong shape, an expert
    id outside 0..E-1, a damaged header; and, unless `overwrite`, if `checkpoint` already has a `latest` or this step.
    strict: decay buffers that differ from MiniMax-M1's are an error instead of a warning.
    """
    model, reader = open_hf(hf, format)
    report(slope_differences(model, reader), strict, log)
    for path in (checkpoint / "latest", checkpoint / folders.step_name(0)):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; name another --checkpoint or pass --overwrite.")
    require_space(checkpoint, plan_import(hf, checkpoint, format).write_bytes)
    partial = folders.new_partial(checkpoint, 0)
    try:
        write_native(partial, model, reader, log)
        write_source_dtypes(partial, model, reader)
        (partial / "config.yaml").write_text(
            yaml.safe_dump({"model": asdict(model)}, sort_keys=False), encoding="utf-8"
        )
        final = folders.publish(partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(f"imported {len(reader.tensors):,} tensors into {final}")
    return final


def slope_differences(model: ModelConfig, reader: HfReader) -> list[str]:
    """Lightning layers whose stored slopes are not MiniMax-M1's (beyond the 1e-5 by which transformers' formula differs)."""
    found = []
    for layer in range(model.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn.slope_rate"
        if name in reader.tensors:
            stored = reader.read(name).flatten().float()
            ours = slopes(model.num_attention_heads, layer, model.num_hidden_layers)
            tolerance = 1e-2 if reader.tensors[name].dtype != torch.float32 else 1e-4
            if stored.shape != ours.shape or not torch.allclose(stored, ours, rtol=tolerance, atol=0):
                found.append(
                    f"{name}: these weights were trained with other decays than MiniMax-M1's, which will be used."
                )
    return found


def import_units(native: NativeTensor) -> list[tuple[int, int]]:
    rows = native.shape[0]
    return [(expert, expert + 1) for expert in range(rows)] if native.per_expert else [(0, rows)]


def native_dtype(native: NativeTensor, reader: HfReader) -> torch.dtype:
    """bfloat16 if every piece is and the model does not keep the tensor in float32; else float32, which holds all."""
    pieces = {reader.tensors[piece.name].dtype for piece in native.pieces}
    return torch.bfloat16 if pieces == {torch.bfloat16} and not native.fp32 else torch.float32


def write_native(folder: Path, model: ModelConfig, reader: HfReader, log: Log) -> None:
    layout = native_layout(model)
    progress = Progress(sum(map(size, reader.tensors.values())), log)
    layer: int | None = -1
    with NativeWriter(folder) as writer:
        for native in layout:
            if native.layer != layer:
                writer.start_file()
                layer = native.layer
            dtype = native_dtype(native, reader)
            for start, stop in import_units(native):
                data = join(native, lambda piece: reader.read(piece.name), model, start=start, stop=stop, dtype=dtype)
                writer.write(native.name, native.shape, start, data)
                progress.add(sum(size(reader.tensors[piece.name]) for piece in native.within(start, stop)))
        writer.finish({})
    write_manifest(folder, writer.files)


def write_source_dtypes(folder: Path, model: ModelConfig, reader: HfReader) -> None:
    natives = {native.name: native_dtype(native, reader) for native in native_layout(model)}
    chosen = export_dtypes(model, natives, None, {})
    other = {
        name: str(reader.tensors[name].dtype).removeprefix("torch.")
        for name, dtype in chosen.items()
        if reader.tensors[name].dtype != dtype
    }
    if other:
        (folder / SOURCE_DTYPES).write_text(json.dumps(other, indent=1), encoding="utf-8")
