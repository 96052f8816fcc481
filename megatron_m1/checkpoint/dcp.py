"""The model part of a native checkpoint, read and written without a model, without Megatron and without process groups.

The format is megatron-core's `torch_dist` (core 0.19.2: dist_checkpointing/serialization.py), that is PyTorch's distributed
checkpoint: `.metadata` says which chunk of which tensor lies where in the *.distcp files.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Buffer
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, LoadPlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_m1.config.errors import ConfigError

__all__ = ["NativeReader", "NativeWriter"]

COMMON_STATE = "common_state/shard_0_1"
"""Unique key of core's ShardedObject("common_state", ..., (1,), (0,)), which every torch_dist checkpoint must have."""


class NativeReader:
    """Tensors of one step_XXXXXXXX folder, however many ranks wrote them.

    shapes, dtypes: by native name.  Raises ConfigError naming tensor and file for anything missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:
            raise ConfigError(
                f"{folder / '.metadata'} cannot be read ({error!r}); is {folder} a complete checkpoint?"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        tensors = {
            name: stored
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(stored.size) for name, stored in tensors.items()}
        self.dtypes = {name: stored.properties.dtype for name, stored in tensors.items()}
        self._chunks = {name: stored.chunks for name, stored in tensors.items()}

    def cuts(self, name: str) -> list[tuple[int, int]]:
        """Ranges of the leading dimension that no stored chunk straddles; they can be read one by one, each chunk once."""
        spans = sorted((chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in self._chunks[name])
        ranges: list[tuple[int, int]] = []
        for start, stop in spans:
            if ranges and start < ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
            else:
                ranges.append((start, stop))
        return ranges

    def largest_chunk_bytes(self, name: str) -> int:
        return max(math.prod(chunk.sizes) for chunk in self._chunks[name]) * self.dtypes[name].itemsize

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the leading dimension of the global tensor."""
        shape = (stop - start, *self.shapes[name][1:])
        target = torch.empty(shape, dtype=self.dtypes[name])
        wanted = ChunkStorageMetadata(torch.Size((start, *[0] * (len(shape) - 1))), torch.Size(shape))
        stored = self._metadata.state_dict_metadata[name]
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != target.numel():
            raise ConfigError(
                f"{name} in {self.folder} holds {covered:,} of {target.numel():,} elements; the save is incomplete."
            )
        for item in items:
            self._read_item(name, item, target)
        return target

    def _read_item(self, name: str, item: ReadItem, target: Tensor) -> None:
        place = self._metadata.storage_data.get(item.storage_index)
        if place is None:
            raise ConfigError(
                f"{name} in {self.folder}: .metadata does not say where its chunk lies; the save is incomplete."
            )
        file = self.folder / place.relative_path
        if not file.is_file():
            raise ConfigError(f"{file}, which holds {name}, is missing; restore it or use another checkpoint.")
        try:
            check_sums(file, place.offset, place.length)
            self._reader.read_data(LoadPlan([item]), IntoTensor(target)).wait()
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ConfigError(f"{name} cannot be read from {file} ({reason}); the file is damaged.") from None


def check_sums(file: Path, offset: int, length: int) -> None:
    """Raises if the zip archive that torch.save wrote at `offset` does not match its CRC-32 sums; torch.load ignores them."""
    with open(file, "rb") as stream, zipfile.ZipFile(Window(stream, offset, length)) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {wrong}")


class Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a file as a file of its own."""

    def __init__(self, stream: BinaryIO, offset: int, length: int):
        super().__init__()
        self.stream, self.offset, self.length = stream, offset, length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        self.position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer)[: max(self.length - self.position, 0)]
        self.stream.seek(self.offset + self.position)
        count = self.stream.readinto(target)
        self.position += count
        return count


class IntoTensor(DefaultLoadPlanner):
    """Receives what the storage reader reads into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class NativeWriter:
    """Writes chunks one after another; only the chunk at hand is in memory.

    folder: an existing empty folder. It becomes a checkpoint with `finish`, which writes `.metadata` last.
    files: what manifest.json says of each .distcp file, complete after `finish`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._storage = FileSystemWriter(folder)
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._stream: ChecksumStream | None = None
        self.files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "NativeWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_file()

    def start_file(self) -> None:
        """What follows goes into a new .distcp file."""
        self._close_file()
        name = f"__0_{len(self.files)}.distcp"
        self._stream = ChecksumStream(self.folder / name)
        self.files[name] = {"bytes": 0, "crc32": []}

    def write(self, name: str, shape: tuple[int, ...], start: int, data: Tensor) -> None:
        """data: rows from `start` on of the global tensor `name` of `shape`."""
        offsets = torch.Size((start, *[0] * (len(shape) - 1)))
        stored = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties.create_from_tensor(data), torch.Size(shape), [])
        )
        stored.chunks.append(ChunkStorageMetadata(offsets, data.shape))
        self._save(MetadataIndex(name, offsets), data)

    def finish(self, common: dict[str, object]) -> None:
        """common: the plain (non-tensor) state that core's `load` returns."""
        self.start_file()
        self._tensors[COMMON_STATE] = BytesStorageMetadata()
        self._save(MetadataIndex(COMMON_STATE), [common])
        self._close_file()
        core = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(core), encoding="utf-8")
        self._storage.finish(Metadata(self._tensors), [self._results])

    def _save(self, index: MetadataIndex, data: object) -> None:
        stream = self._stream
        assert stream is not None, "start_file comes before write"
        offset, stream.crc32 = stream.tell(), 0
        torch.save(data, stream)
        length = stream.tell() - offset
        self._results.append(WriteResult(index, length, _StorageInfo(stream.path.name, offset, length)))
        entry = self.files[stream.path.name]
        entry["bytes"] += length
        entry["crc32"].append(stream.crc32)

    def _close_file(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class ChecksumStream(io.RawIOBase):
    """A file written from beginning to end, with the CRC-32 of what was written since `crc32` was set to 0."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.crc32 = path, 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()
