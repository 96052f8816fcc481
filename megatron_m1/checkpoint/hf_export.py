"""Native checkpoint -> Hugging Face directory, tensor by tensor, whatever layout wrote the checkpoint."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from m1_kernels import slopes
from torch import Tensor

from megatron_m1.checkpoint.hf_common import (
    SOURCE_DTYPES,
    Log,
    Native,
    Plan,
    Progress,
    export_dtypes,
    free_bytes,
    is_buffer,
    native_units,
    open_native,
    report,
    row_bytes,
)
from megatron_m1.checkpoint.hf_config import semantic_differences, semantic_notes, to_hf_config
from megatron_m1.checkpoint.hf_files import HfWriter, plan_shards, weight_files, write_atomically
from megatron_m1.checkpoint.names import HF_BLOCK_SIZE, HfFormat, hf_buffers, split
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import ModelConfig

__all__ = ["export_hf", "plan_export"]


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt "
    "tokenizer.model chat_template.jinja chat_template.json generation_config.json"
).split()


@dataclass(frozen=True)
class Export:
    """An export, planned in full."""

    native: Native
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
    for native in export.native.layout:
        stored = export.native.reader.dtypes[native.name]
        largest = max(math.prod(piece.shape) * export.tensors[piece.name][1].itemsize for piece in native.pieces)
        for start, stop in native_units(native, export.native.reader):
            unit = (stop - start) * row_bytes(native, stored)
            peak = max(peak, unit + export.native.reader.largest_chunk_bytes(native.name) + largest)
    return Plan(
        tensors=len(export.tensors),
        read_bytes=sum(n.shape[0] * row_bytes(n, export.native.reader.dtypes[n.name]) for n in export.native.layout),
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
    model = export.native.config.model
    if format == "minimax":
        differences = semantic_differences(model, dtype=str(export.config["dtype"]))
        report([f"transformers differs: {text}" for text in differences], strict, log)
    for text in semantic_notes(model, format):
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
    log(f"exported {len(export.tensors):,} tensors of {export.native.step} to {hf} in {len(shards)} files")


def pieces(export: Export, progress: "Progress") -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the export with its values in the native dtype, each native chunk read once."""
    for native in export.native.layout:
        for start, stop in native_units(native, export.native.reader):
            data = export.native.reader.read(native.name, start, stop)
            for piece, part in split(native, data, export.native.config.model, start=start):
                yield piece.name, part
                progress.add(math.prod(piece.shape) * export.tensors[piece.name][1].itemsize)
    for name in export.tensors:
        if is_buffer(name):
            yield name, decay_buffer(name, export.native.config.model)


def prepare_export(checkpoint: Path, format: HfFormat, dtype: str | None) -> Export:
    native = open_native(checkpoint)
    model = native.config.model
    record = read_source_dtypes(native.step) if dtype is None else {}
    dtypes = export_dtypes(model, native.reader.dtypes, DTYPES[dtype] if dtype is not None else None, record)
    tensors = {piece.name: (piece.shape, dtypes[piece.name]) for tensor in native.layout for piece in tensor.pieces}
    if format == "minimax":
        tensors |= {name: (shape, torch.float32) for name, shape in hf_buffers(model).items()}
    main = str(dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    return Export(
        native, tensors, to_hf_config(model, format, dtype=main, eos_token_id=native.config.data.eod_token_id)
    )


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
