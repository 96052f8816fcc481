"""Token files: `PREFIX.bin` (token ids) and `PREFIX.idx` (lengths, offsets, documents), Megatron-Core's IndexedDataset.

Layout of .idx, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1,
int32 length per sequence (tokens), int64 offset per sequence (bytes), int64 first sequence of each document and, last,
the number of sequences.  Source: megatron/core/datasets/indexed_dataset.py (0.19.2).

`PREFIX.meta.json`, which Megatron does not know, states which tokenizer made the pair; it is optional on reading.
"""

import json
import os
import shutil
import struct
from bisect import bisect_left
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_m1.config.errors import ConfigError

__all__ = ["TokenFile", "TokenFileWriter", "token_dtype"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20
ENDINGS = ("bin", "meta.json", "idx")
SCAN_BYTES = 1 << 28
"""Files without a .meta.json that are at most this large are read once at opening to find their largest token id."""


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 tokens, else int32: the rule of Megatron's DType.optimal_dtype."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenFile:
    """Memory-mapped pair PREFIX.bin / PREFIX.idx, checked at opening.

    tokens: [num_tokens] all documents end to end, in the file's dtype.
    The index stays on the disk, but for the pages in use.
    metadata: dict of PREFIX.meta.json, empty if there is none.
    Raises ConfigError, naming the file and the remedy, for a missing, truncated or foreign file, a .bin that does not
    match its .idx and, when vocab_size is given, token ids outside [0, vocab_size).  Ids are checked at opening through
    the .meta.json or, without one, by reading files of at most 256 MiB; `read` checks every range it returns.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, vocab_size: int | None = None) -> None:
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.idx_path, self.bin_path = self.prefix + ".idx", self.prefix + ".bin"
        for path in (self.idx_path, self.bin_path):
            if not os.path.isfile(path):
                hint = (
                    "give the prefix without .bin or .idx"
                    if self.prefix.endswith((".bin", ".idx"))
                    else ("make it with tools/preprocess_data.py or correct the prefix")
                )
                raise ConfigError(f"{path} does not exist; {hint}.")
        self._read_index()
        self._map_tokens()
        self._check_offsets()
        self.metadata = self._read_metadata()
        if vocab_size is not None:
            self._check_vocabulary(vocab_size)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64 [count], ids checked against vocab_size."""
        ids = self.tokens[start : start + count].astype(np.int64)
        if len(ids) != count:
            raise IndexError(f"{self.bin_path}: tokens [{start}, {start + count}) of {self.num_tokens}")
        if self.vocab_size is not None and count:
            self._check_range(int(ids.min()), int(ids.max()), self.vocab_size)
        return ids

    def starts_within(self, start: int, count: int) -> np.ndarray:
        """Offsets from `start` (int64, strictly increasing) of the documents that begin in [start, start + count)."""
        # bisect instead of np.searchsorted, which would copy the whole array because the file does not align it.
        low, high = (bisect_left(self._offsets, place * self.dtype.itemsize) for place in (start, start + count))
        first, last = bisect_left(self._documents, low), bisect_left(self._documents, high)
        return np.unique(self._offsets[self._documents[first:last]]) // self.dtype.itemsize - start

    def _read_index(self) -> None:
        size = os.path.getsize(self.idx_path)
        with open(self.idx_path, "rb") as stream:
            header = stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise ConfigError(
                f"{self.idx_path} does not start with MMIDIDX, so it is not a token index; "
                "make it again with tools/preprocess_data.py."
            )
        if len(header) < HEADER.size:
            raise self._truncated_index(size, HEADER.size)
        _, version, code, sequences, entries = HEADER.unpack(header)
        if version != 1 or code not in DTYPES or entries < 1:
            raise ConfigError(
                f"{self.idx_path} has version {version} (known: 1), dtype code {code} (known: "
                f"{sorted(DTYPES)}) and {entries} document entries (at least 1); make it again with "
                "tools/preprocess_data.py."
            )
        expected = HEADER.size + sequences * (4 + 8) + entries * 8
        if size != expected:
            raise self._truncated_index(size, expected)
        self.dtype = np.dtype(DTYPES[code])
        data = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        self._lengths = np.frombuffer(data, np.int32, sequences, HEADER.size)
        self._offsets = np.frombuffer(data, np.int64, sequences, HEADER.size + 4 * sequences)
        self._documents = np.frombuffer(data, np.int64, entries, HEADER.size + 12 * sequences)

    def _truncated_index(self, size: int, expected: int) -> ConfigError:
        return ConfigError(
            f"{self.idx_path} has {size} bytes, its header asks for {expected}: it is truncated or "
            "damaged; copy it again or make it again with tools/preprocess_data.py."
        )

    def _map_tokens(self) -> None:
        size = os.path.getsize(self.bin_path)
        expected = 0
        if len(self._lengths):
            expected = int(self._offsets[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size != expected:
            raise ConfigError(
                f"{self.bin_path} has {size} bytes, {self.idx_path} describes {expected}: the pair is "
                "truncated or does not belong together; copy both again or make them again with "
                "tools/preprocess_data.py."
            )
        self.tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype) if size else np.empty(0, self.dtype)

    def _check_offsets(self) -> None:
        position = 0
        for begin in range(0, len(self._lengths), BLOCK):
            lengths = self._lengths[begin : begin + BLOCK].astype(np.int64) * self.dtype.itemsize
            ends = position + np.cumsum(lengths)
            if lengths.min() < 0 or not np.array_equal(self._offsets[begin : begin + BLOCK], ends - lengths):
                raise self._damaged_index("offsets that do not follow from its lengths")
            position = int(ends[-1])
        documents = self._documents
        increasing = all(
            np.all(part[1:] >= part[:-1])
            for part in (documents[begin : begin + BLOCK + 1] for begin in range(0, len(documents), BLOCK))
        )
        if documents[0] != 0 or documents[-1] != len(self._lengths) or not increasing:
            raise self._damaged_index("document entries that do not run from 0 to its number of sequences")

    def _damaged_index(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.idx_path} holds {what}: it is damaged; copy it again or make it again with "
            "tools/preprocess_data.py."
        )

    def _read_metadata(self) -> dict[str, Any]:
        path = self.prefix + ".meta.json"
        if not os.path.isfile(path):
            return {}
        try:
            metadata = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}); make the files again with tools/preprocess_data.py or delete it."
            ) from None
        if not isinstance(metadata, dict) or metadata.get("tokens") != self.num_tokens:
            raise ConfigError(
                f"{path} does not describe {self.bin_path} ({self.num_tokens} tokens); copy the three "
                "files again or delete the .meta.json."
            )
        return metadata

    def _check_vocabulary(self, vocab_size: int) -> None:
        if "max_token_id" in self.metadata:
            self._check_range(0, self.metadata["max_token_id"], vocab_size)
        elif 0 < self.tokens.nbytes <= SCAN_BYTES:
            self._check_range(int(self.tokens.min()), int(self.tokens.max()), vocab_size)

    def _check_range(self, smallest: int, largest: int, vocab_size: int) -> None:
        if smallest < 0 or largest >= vocab_size:
            bad = smallest if smallest < 0 else largest
            raise ConfigError(
                f"{self.bin_path} holds token id {bad}, outside [0, model.vocab_size={vocab_size}); set "
                "model.vocab_size to the tokenizer's size or use the files of the right tokenizer."
            )


class TokenFileWriter:
    """Writes PREFIX.bin, .meta.json and .idx; a context manager.

    Everything goes to temporary names first; leaving the block without an error renames .bin, .meta.json and, last, .idx;
    leaving it with an error removes the temporary files.  dtype: see `token_dtype`.
    metadata: stored in PREFIX.meta.json together with `tokens`, `documents`, `dtype` and `max_token_id`.
    Raises ConfigError if the files exist and `overwrite` is not set, and for a prefix without a file name.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: np.dtype,
        *,
        metadata: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.prefix, self.dtype = os.fspath(prefix), np.dtype(dtype)
        if self.dtype not in CODES:
            raise ConfigError(f"dtype {self.dtype} is not one of {[str(d) for d in CODES]}.")
        self.metadata = dict(metadata or {})
        if not os.path.basename(self.prefix):
            raise ConfigError(
                f"--output-prefix {self.prefix} names a folder; add the name of the files, e.g. {self.prefix}train."
            )
        if not overwrite:
            for path in [f"{self.prefix}.{ending}" for ending in ENDINGS]:
                if os.path.exists(path):
                    raise ConfigError(f"{path} exists; choose another --output-prefix or pass --overwrite.")
        parent = os.path.dirname(self.prefix) or "."
        os.makedirs(parent, exist_ok=True)
        self._temporary = {ending: f"{self.prefix}.{ending}.tmp-{os.getpid()}" for ending in ENDINGS}
        self._lengths: list[np.ndarray] = []
        self._max_token_id = -1
        self.num_tokens = 0

    def __enter__(self) -> Self:
        self._stream = open(self._temporary["bin"], "wb")
        return self

    def add_document(self, ids: list[int] | np.ndarray) -> None:
        """Append one document, stored as one sequence."""
        wide = np.asarray(ids, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if len(wide) and (wide.min() < 0 or wide.max() > limits.max):
            raise ConfigError(
                f"{self.prefix}.bin: token ids {wide.min()}..{wide.max()} do not fit {self.dtype}; use int32."
            )
        self._stream.write(wide.astype(self.dtype).tobytes())
        self._lengths.append(np.array([len(wide)], np.int32))
        self.num_tokens += len(wide)
        self._max_token_id = max(self._max_token_id, int(wide.max(initial=-1)))

    def add_shard(self, path: str | os.PathLike[str], lengths: np.ndarray, max_token_id: int) -> None:
        """Append the tokens of the file `path`, in this writer's dtype, as documents of the int32 `lengths`."""
        size = os.path.getsize(path)
        expected = int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if size != expected:
            raise OSError(f"{os.fspath(path)} has {size} bytes instead of {expected}; is the disk full?")
        with open(path, "rb") as shard:
            shutil.copyfileobj(shard, self._stream, 1 << 23)
        self._lengths.append(lengths)
        self.num_tokens += expected // self.dtype.itemsize
        self._max_token_id = max(self._max_token_id, max_token_id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._stream.close()
            for path in self._temporary.values():
                Path(path).unlink(missing_ok=True)

    def _finish(self) -> None:
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        sizes = lengths.astype(np.int64) * self.dtype.itemsize
        with open(self._temporary["idx"], "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            for part in (lengths, np.cumsum(sizes) - sizes, np.arange(len(lengths) + 1, dtype=np.int64)):
                part.tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
        self.metadata |= {
            "tokens": self.num_tokens,
            "documents": len(lengths),
            "dtype": str(self.dtype),
            "max_token_id": self._max_token_id,
        }
        Path(self._temporary["meta.json"]).write_text(json.dumps(self.metadata, indent=2) + "\n", encoding="utf-8")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        # Without its .idx an older pair that is being replaced cannot be read: no moment shows a mixed pair.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        for ending in ENDINGS:
            os.replace(self._temporary[ending], f"{self.prefix}.{ending}")
