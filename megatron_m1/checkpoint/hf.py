"""Hugging Face directory <-> native checkpoint, tensor by tensor: no model is built, memory is about one tensor.

Nothing bears a final name until it is complete: an import fills a hidden folder that is renamed, then `latest` is written; an
export fills hidden shard files, renames them, and writes the index last. Safetensors only.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import yaml
from m1_kernels import slopes
from torch import Tensor

from megatron_m1.checkpoint.dcp import NativeReader, NativeWriter
from megatron_m1.checkpoint.hf_config import read_hf_config, semantic_differences, semantic_notes, to_hf_config
from megatron_m1.checkpoint.hf_files import (
    HfReader,
    HfWriter,
    Stored,
    plan_shards,
    weight_files,
    write_atomically,
)
from megatron_m1.checkpoint.names import (
    HF_BLOCK_SIZE,
    HfFormat,
    NativeTensor,
    Piece,
    hf_buffers,
    join,
    native_layout,
    split,
)
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import from_yaml
from megatron_m1.config.schema import ModelConfig

__all__ = ["Plan", "Verification", "export_hf", "import_hf", "plan_export", "plan_import", "verify_hf"]

Log = Callable[[str], None]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEP = "step_00000000"
SOURCE_DTYPES = "hf_dtypes.json"
"""In an imported checkpoint: dtypes of the source that an export would not choose by itself, for a bitwise round trip."""
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt "
    "tokenizer.model chat_template.jinja chat_template.json generation_config.json"
).split()


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


@dataclass
class Verification:
    """Outcome of `verify_hf`; it holds if `mismatches` is empty."""

    compared: int = 0
    rounded: list[str] = field(default_factory=list)
    """Tensors equal only after rounding the native one to the dtype of the file."""
    mismatches: list[str] = field(default_factory=list)


# --- import ----------------------------------------------------------------------------------------------------------


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
        files=model.num_hidden_layers + 7,
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
    final = checkpoint / STEP
    for path in (checkpoint / "latest", final):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; name another --checkpoint or pass --overwrite.")
    require_space(checkpoint, plan_import(hf, checkpoint, format).write_bytes)
    partial = checkpoint / f".{STEP}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_native(partial, model, reader, log)
        write_source_dtypes(partial, model, reader)
        (partial / "config.yaml").write_text(
            yaml.safe_dump({"model": asdict(model)}, sort_keys=False), encoding="utf-8"
        )
        put_in_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_atomically(checkpoint / "latest", STEP + "\n")
    log(f"imported {len(reader.tensors):,} tensors into {final}")
    return final


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
        writer.finish({"step": 0})


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


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; what was there before is removed afterwards."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)


# --- export ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """An export, planned in full."""

    step: Path
    model: ModelConfig
    reader: NativeReader
    layout: list[NativeTensor]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Hugging Face name -> shape and dtype to write, buffers included."""
    config: dict[str, object]


def plan_export(
    checkpoint: Path, hf: Path, format: HfFormat, *, dtype: str | None = None, max_shard_bytes: int = 5 << 30
) -> Plan:
    """Plan of `export_hf`, from config.yaml and .metadata alone; raises what it would raise before writing."""
    export = prepare_export(checkpoint, format, dtype)
    shards = plan_shards(export.tensors, max_shard_bytes)
    peak = 0
    for native in export.layout:
        stored = export.reader.dtypes[native.name]
        largest = max(math.prod(piece.shape) * export.tensors[piece.name][1].itemsize for piece in native.pieces)
        for start, stop in export_units(native, export.reader):
            unit = (stop - start) * row_bytes(native, stored)
            peak = max(peak, unit + export.reader.largest_chunk_bytes(native.name) + largest)
    return Plan(
        tensors=len(export.tensors),
        read_bytes=sum(n.shape[0] * row_bytes(n, export.reader.dtypes[n.name]) for n in export.layout),
        write_bytes=sum(shard.size for shard in shards),
        files=len(shards) + 2,
        peak_bytes=peak,
        free_bytes=free_bytes(hf),
    )


def export_hf(
    checkpoint: Path,
    hf: Path,
    format: HfFormat,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 << 30,
    tokenizer: Path | None = None,
    strict: bool = False,
    overwrite: bool = False,
    log: Log = print,
) -> None:
    """Write the weights of `checkpoint` (a save folder with `latest`, or one step folder) to the directory `hf`.

    dtype: bf16 or fp32; None keeps the native dtype. Router gates are float32 in either case, as in the released files, and
    the head, float32 in training, takes the dtype of the embedding: the log says so where that rounds. A checkpoint from
    `import_hf` goes back with the dtypes it came with (None), so that the round trip is bitwise.
    strict: what transformers computes differently (semantic_differences, `minimax` only) is an error instead of a warning.
    Raises ConfigError for an incomplete or damaged checkpoint, and if `hf` already holds weights unless `overwrite`.
    """
    export = prepare_export(checkpoint, format, dtype)
    loaded = str(export.config.get("dtype", export.config.get("torch_dtype")))
    if format == "minimax":
        report(
            [f"transformers differs: {text}" for text in semantic_differences(export.model, dtype=loaded)], strict, log
        )
    for text in semantic_notes(export.model, format):
        log(f"note: {text}")
    existing = weight_files(hf) if hf.is_dir() else []
    if existing and not overwrite:
        raise ConfigError(f"{existing[0]} exists; name another --hf or pass --overwrite.")
    tokenizer_files = find_tokenizer(tokenizer) if tokenizer is not None else []
    shards = plan_shards(export.tensors, max_shard_bytes)
    hf.mkdir(parents=True, exist_ok=True)
    rounded = []
    progress = Progress(sum(math.prod(shape) * kind.itemsize for shape, kind in export.tensors.values()), log)
    with HfWriter(hf, shards, export.tensors) as writer:
        for piece_name, data in pieces(export, progress):
            target = export.tensors[piece_name][1]
            converted = data.to(target)
            if data.dtype != target and not torch.equal(converted.to(data.dtype), data):
                rounded.append(piece_name)
            writer.write(piece_name, converted)
        for file in tokenizer_files:
            shutil.copyfile(file, hf / file.name)
        write_atomically(hf / "config.json", json.dumps(export.config, indent=2, sort_keys=True) + "\n")
        writer.finish()
    if rounded:
        log(f"note: {len(rounded)} float32 tensors were rounded, e.g. {rounded[0]}; --dtype fp32 keeps them exact.")
    log(f"exported {len(export.tensors):,} tensors of {export.step} to {hf} in {len(shards)} files")


def pieces(export: Export, progress: "Progress") -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the export with its values in the native dtype, each native chunk read once."""
    for native in export.layout:
        for start, stop in export_units(native, export.reader):
            data = export.reader.read(native.name, start, stop)
            for piece, part in split(native, data, export.model, start=start):
                yield piece.name, part
                progress.add(math.prod(piece.shape) * export.tensors[piece.name][1].itemsize)
    for name in export.tensors:
        if is_buffer(name):
            yield name, decay_buffer(name, export.model)


def prepare_export(checkpoint: Path, format: HfFormat, dtype: str | None) -> Export:
    step = step_folder(checkpoint)
    config = from_yaml(step / "config.yaml")
    model = config.model
    reader = NativeReader(step)
    layout = native_layout(model)
    check_native(step, layout, reader)
    record = read_source_dtypes(step) if dtype is None else {}
    dtypes = export_dtypes(model, reader.dtypes, DTYPES[dtype] if dtype is not None else None, record)
    tensors = {piece.name: (piece.shape, dtypes[piece.name]) for native in layout for piece in native.pieces}
    if format == "minimax":
        tensors |= {name: (shape, torch.float32) for name, shape in hf_buffers(model).items()}
    main = str(dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    return Export(
        step,
        model,
        reader,
        layout,
        tensors,
        to_hf_config(model, format, dtype=main, eos_token_id=config.data.eod_token_id),
    )


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


def export_units(native: NativeTensor, reader: NativeReader) -> list[tuple[int, int]]:
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


def read_source_dtypes(step: Path) -> dict[str, torch.dtype]:
    path = step / SOURCE_DTYPES
    if not path.exists():
        return {}
    return {name: getattr(torch, dtype) for name, dtype in json.loads(path.read_text(encoding="utf-8")).items()}


def decay_buffer(name: str, model: ModelConfig) -> Tensor:
    """One decay buffer of transformers' `minimax`, float32, from the model's own slopes (float64 inside)."""
    layer, kind = int(name.split(".")[2]), name.rsplit(".", 1)[1]
    slope = slopes(model.num_attention_heads, layer, model.num_hidden_layers).double()[:, None, None]
    position = torch.arange(1, HF_BLOCK_SIZE + 1, dtype=torch.float64)
    if kind == "slope_rate":
        value = slope
    elif kind == "query_decay":
        value = torch.exp(-slope * position[:, None])
    elif kind == "key_decay":
        value = torch.exp(-slope * (HF_BLOCK_SIZE - position[:, None]))
    else:
        distance = position[:, None] - position[None, :]
        value = torch.exp(-slope * distance.clamp(min=0)).masked_fill(distance < 0, 0)[None]
    return value.float()


def find_tokenizer(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model") for file in files):
        raise ConfigError(
            f"--tokenizer={folder} holds neither tokenizer.json nor tokenizer.model; name a tokenizer directory."
        )
    return files


# --- verify ----------------------------------------------------------------------------------------------------------


def verify_hf(checkpoint: Path, hf: Path, format: HfFormat, *, log: Log = print) -> Verification:
    """Compare every tensor of a native checkpoint and a Hugging Face directory bit by bit, and the two configurations.

    Dtypes may differ: values are compared in the wider one; a file that holds the rounded native value is counted apart.
    Raises ConfigError where either side is incomplete or damaged.
    """
    hf_model, hf_reader = open_hf(hf, format)
    step = step_folder(checkpoint)
    model = from_yaml(step / "config.yaml").model
    result = Verification(mismatches=config_differences(model, hf_model, step, hf))
    if result.mismatches:
        return result
    reader, layout = NativeReader(step), native_layout(model)
    check_native(step, layout, reader)
    progress = Progress(sum(map(size, hf_reader.tensors.values())), log)
    for native in layout:
        for start, stop in export_units(native, reader):
            for piece, ours in split(native, reader.read(native.name, start, stop), model, start=start):
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


# --- shared ----------------------------------------------------------------------------------------------------------


def step_folder(checkpoint: Path) -> Path:
    """The step folder that `checkpoint` is, or that its `latest` names."""
    if (checkpoint / ".metadata").is_file():
        return checkpoint
    pointer = checkpoint / "latest"
    if not pointer.is_file():
        raise ConfigError(f"--checkpoint={checkpoint} has neither `latest` nor .metadata; name a checkpoint folder.")
    name = pointer.read_text(encoding="utf-8").strip()
    if Path(name).name != name or not (checkpoint / name).is_dir():
        raise ConfigError(f"{pointer} names {name!r}, which is no folder there; name a step_XXXXXXXX folder itself.")
    return checkpoint / name


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
