"""Safetensors directories: read by name, written shard by shard with every tensor at its planned offset."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1.config.errors import ConfigError

__all__ = ["INDEX", "HfReader", "HfWriter", "Stored", "plan_shards"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CODES = {dtype: code for code, dtype in DTYPES.items()}
WRITE_BYTES = 1 << 28
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a directory, known from the header of its file."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """First byte in the file."""


class HfReader:
    """The tensors of a Hugging Face directory; headers are read at once, data when asked for.

    tensors: name -> Stored.  Raises ConfigError naming tensor and file for a missing, truncated or unreadable shard, a
    tensor that the index promises and its file lacks, and a dtype other than bfloat16, float16 or float32. Nothing is
    unpickled, and nothing mapped: resident memory is what `read` returns.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(
                f"--hf={self.folder} is no directory; name one that holds config.json and safetensors files."
            )
        self.tensors: dict[str, Stored] = {}
        headers: dict[str, Header] = {}
        for name, file in read_weight_map(self.folder).items():
            if file not in headers:
                headers[file] = read_header(self.folder / file, f", which holds {name},")
            if name not in headers[file].entries:
                raise ConfigError(
                    f"{name} is not in {self.folder / file}, where {INDEX} places it; fetch that file again."
                )
            self.tensors[name] = stored(name, file, headers[file], self.folder)

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, as stored."""
        place = self.tensors[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        buffer = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with open(self.folder / place.file, "rb") as stream:
            stream.seek(place.offset)
            count = stream.readinto(buffer)
        if count != len(buffer):
            raise ConfigError(f"{name} cannot be read from {self.folder / place.file}: the file has become shorter.")
        return tensor


@dataclass(frozen=True)
class Header:
    """Header of one safetensors file. entries: name -> {dtype, shape, data_offsets}; data: offset of the data in the file."""

    entries: dict[str, dict[str, Any]]
    data: int


def read_header(path: Path, holds: str) -> Header:
    """The header, after checking that the file is as long as it says. holds: for the error, what the file is needed for."""
    if not path.is_file():
        raise ConfigError(f"{path}{holds} is missing; fetch it again.")
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if 8 + length > min(size, MAX_HEADER_BYTES):
                raise ValueError(f"header of {length:,} bytes in a file of {size:,}")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size:,} bytes instead of {8 + length + end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path}{holds} is damaged or truncated ({error}); fetch it again.") from None
    return Header(entries, 8 + length)


def stored(name: str, file: str, header: Header, folder: Path) -> Stored:
    entry = header.entries[name]
    code = entry.get("dtype")
    if code not in DTYPES:
        raise ConfigError(f"{name} in {folder / file} has dtype {code}; convert it to BF16, F16 or F32 first.")
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise ConfigError(
            f"{name} in {folder / file} has {end - begin:,} bytes, not those of shape {shape}; fetch it again."
        )
    return Stored(file, shape, DTYPES[code], header.data + begin)


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the header of a single file."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ConfigError(f"{folder} holds both {INDEX} and {SINGLE}; remove the one that is out of date.")
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged ({error!r}); it must hold a `weight_map`. Fetch it again.") from None
        for file in sorted(files, key=str):
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ConfigError(f"{index} names {file!r}; only .safetensors files of the same folder are read.")
        return weight_map
    if single.is_file():
        return dict.fromkeys(read_header(single, "").entries, SINGLE)
    raise ConfigError(
        f"{folder} holds neither {INDEX} nor {SINGLE}; pickled weights (.bin, .pt) are not read: convert them first."
    )


@dataclass(frozen=True)
class Shard:
    """One output file: its final name, its header, and where each tensor begins."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int
    """Bytes of the whole file."""


def plan_shards(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int) -> list[Shard]:
    """Files of at most `max_shard_bytes` of data (a larger tensor gets its own), tensors in the given order."""
    groups: list[dict[str, int]] = [{}]
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and sum(groups[-1].values()) + size > max_shard_bytes:
            groups.append({})
        groups[-1][name] = size
    return [
        lay_out(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, tensors)
        for number, group in enumerate(groups, start=1)
    ]


def lay_out(file: str, sizes: dict[str, int], tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, size in sizes.items():
        shape, dtype = tensors[name]
        begins[name], begin, end = end, end, end + size
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return Shard(file, prefix, {name: len(prefix) + begin for name, begin in begins.items()}, len(prefix) + end)


class HfWriter:
    """Writes planned shards in any order of tensors. Files bear final names only after `finish`.

    The space of every shard is reserved at the start, so that a full disk is met before any work is done. `finish` asserts
    that each tensor was written once, removes the weights that were there before, renames the shards and writes the index
    last; until then transformers finds no complete checkpoint. Leaving the `with` block by an error removes the temporaries.
    """

    def __init__(self, folder: Path, shards: list[Shard], tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.folder, self.shards, self.tensors = folder, shards, tensors
        self._place = {name: (shard, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._written: set[str] = set()

    def __enter__(self) -> "HfWriter":
        try:
            for shard in self.shards:
                with open(self._temporary(shard), "wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, shard.size)
                    stream.write(shard.header)
        except OSError as error:
            self._remove_temporaries()
            raise ConfigError(
                f"{self.folder} cannot take {total_bytes(self.shards):,} bytes: {error.strerror}."
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._remove_temporaries()

    def write(self, name: str, tensor: Tensor) -> None:
        """tensor: shape and dtype as planned."""
        shape, dtype = self.tensors[name]
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype, f"{name}: {tensor.shape} {tensor.dtype}"
        assert name not in self._written, f"{name} is written twice"
        shard, offset = self._place[name]
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        file = os.open(self._temporary(shard), os.O_WRONLY)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(file, data[done : done + WRITE_BYTES], offset + done)
        finally:
            os.close(file)
        self._written.add(name)

    def finish(self) -> None:
        missing = sorted(self._place.keys() - self._written)
        assert not missing, f"{len(missing)} tensors were never written, e.g. {missing[0]}"
        for shard in self.shards:
            with open(self._temporary(shard), "rb+") as stream:
                os.fsync(stream.fileno())
        remove_weights(self.folder)
        for shard in self.shards:
            os.replace(self._temporary(shard), self.folder / shard.file)
        index = {
            "metadata": {"total_size": sum(shard.size - len(shard.header) for shard in self.shards)},
            "weight_map": {name: shard.file for name, (shard, _) in self._place.items()},
        }
        write_atomically(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _temporary(self, shard: Shard) -> Path:
        return self.folder / f".{shard.file}.partial"

    def _remove_temporaries(self) -> None:
        for shard in self.shards:
            self._temporary(shard).unlink(missing_ok=True)


def total_bytes(shards: list[Shard]) -> int:
    return sum(shard.size for shard in shards)


def weight_files(folder: Path) -> list[Path]:
    """Index first, then the weights that a checkpoint in `folder` consists of."""
    return [path for path in (folder / INDEX, folder / SINGLE) if path.exists()] + sorted(
        folder.glob("model-*-of-*.safetensors")
    )


def remove_weights(folder: Path) -> None:
    for path in weight_files(folder):
        path.unlink()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
