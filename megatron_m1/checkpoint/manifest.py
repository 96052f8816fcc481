"""Sizes and checksums of the files of a checkpoint, so that damage is found before a value is used.

manifest.json: {"files": {name: {"bytes": size, "crc32": [...]}}}, one checksum per stored chunk of a .distcp file in the order of
the chunks in the file (`.metadata` says which tensor each belongs to), one for any other file.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_m1.checkpoint.folders import sync
from megatron_m1.config.errors import ConfigError

__all__ = ["MANIFEST", "checksums", "read_metadata", "verify", "write_manifest"]

MANIFEST = "manifest.json"
READ_BYTES = 1 << 24
REMEDY = "use another checkpoint, or restore the file"

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Chunk:
    """Bytes [offset, offset + length) of a .distcp file hold a part of `tensor`."""

    tensor: str
    offset: int
    length: int


def checksums(path: Path, lengths: Sequence[int]) -> dict[str, Any]:
    """Entry of the manifest for one file, whose consecutive chunks have these lengths in bytes."""
    with open(path, "rb") as stream:
        return {"bytes": path.stat().st_size, "crc32": [_crc32(stream, length) for length in lengths]}


def write_manifest(folder: Path, files: Files) -> None:
    """files: entries of all .distcp files. Those of core's two metadata files are added, so write them before."""
    for name in (".metadata", "metadata.json"):
        files[name] = checksums(folder / name, [(folder / name).stat().st_size])
    (folder / MANIFEST).write_text(json.dumps({"files": files}), encoding="utf-8")
    sync(folder / MANIFEST)


def read_metadata(folder: Path) -> Metadata:
    """PyTorch's `.metadata`, after its checksum was compared. Raises ConfigError if it is missing or damaged."""
    path = folder / ".metadata"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {folder} is no complete checkpoint, use another.")
    files = _read_manifest(folder)
    if files is not None:
        for name in (".metadata", "metadata.json"):
            _check_plain(folder / name, files[name])
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({_line(error)}); {REMEDY}.") from None


def verify(folder: Path, metadata: Metadata, *, share: int = 0, shares: int = 1, contents: bool = True) -> None:
    """Raise ConfigError, naming file and tensor, if a file of the checkpoint is missing, short or altered.

    share of shares: only every shares-th file is looked at, beginning with that number. contents: compare checksums, which
    reads the files; otherwise only presence and size. Without a manifest (imported weights) contents cannot be compared.
    """
    files = _read_manifest(folder)
    stored = chunks_by_file(metadata)
    if files is None and any(name.startswith("optimizer.") for name in metadata.state_dict_metadata):
        raise ConfigError(f"{folder / MANIFEST} is missing; {REMEDY}.")
    for name in sorted(stored)[share::shares]:
        path, chunks = folder / name, stored[name]
        _check_length(path, chunks)
        if contents and files is not None:
            _check_contents(path, chunks, files[name]["crc32"])


def chunks_by_file(metadata: Metadata) -> dict[str, list[Chunk]]:
    """File name -> its chunks in the order in which they lie in the file."""
    files: dict[str, list[Chunk]] = {}
    for index, place in metadata.storage_data.items():
        files.setdefault(place.relative_path, []).append(Chunk(index.fqn, place.offset, place.length))
    for chunks in files.values():
        chunks.sort(key=lambda chunk: chunk.offset)
    return files


def _read_manifest(folder: Path) -> Files | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read ({_line(error)}); {REMEDY}.") from None


def _check_plain(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {REMEDY}.")
    if checksums(path, [path.stat().st_size]) != entry:
        raise ConfigError(f"{path} is damaged: its checksum is not that of {MANIFEST}; {REMEDY}.")


def _check_length(path: Path, chunks: list[Chunk]) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}, which holds {_names(chunks)}, is missing; {REMEDY}.")
    size, needed = path.stat().st_size, chunks[-1].offset + chunks[-1].length
    if size < needed:
        cut = [chunk for chunk in chunks if chunk.offset + chunk.length > size]
        raise ConfigError(f"{path} has {size:,} of {needed:,} bytes; it lacks (part of) {_names(cut)}; {REMEDY}.")


def _check_contents(path: Path, chunks: list[Chunk], expected: list[int]) -> None:
    with open(path, "rb") as stream:
        damaged = [
            chunk for chunk, crc32 in zip(chunks, expected, strict=True) if _crc32(stream, chunk.length) != crc32
        ]
    if damaged:
        raise ConfigError(f"{path} is damaged: the checksum of {_names(damaged)} is not that of {MANIFEST}; {REMEDY}.")


def _crc32(stream: Any, length: int) -> int:
    crc32 = 0
    while length > 0 and (block := stream.read(min(length, READ_BYTES))):
        crc32 = zlib.crc32(block, crc32)
        length -= len(block)
    return crc32


def _names(chunks: list[Chunk]) -> str:
    first, others = chunks[0].tensor, len({chunk.tensor for chunk in chunks}) - 1
    return f"{first} and {others} other tensors" if others else first


def _line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
