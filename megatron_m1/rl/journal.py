"""Append-only journal of samples that survives kill -9 and power loss: JSON lines with a length and a checksum each.

A record is one line of valid JSON with a fixed head, so a reader needs no index and `jq .record` works:

    {"crc32":"1c291ca3","bytes":"0000000012","record":{"id": "a"}}\\n

crc32 (of the record's bytes) and bytes (their number) are written before the record in the same write.
"""

import base64
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Journal", "JournalCorrupt", "decode_array", "encode_array", "read_journal"]

_HEAD = '{{"crc32":"{crc:08x}","bytes":"{length:010d}","record":'
_HEAD_BYTES = len(_HEAD.format(crc=0, length=0))
_TAIL = b"}\n"


class JournalCorrupt(RuntimeError):
    """A damaged record with sound records after it: not the torn end of a crash, so nothing is dropped."""


class Journal:
    """The one writer of a journal file. Opening it drops a torn last record (`dropped_bytes` says how much) and nothing else.

    path: made if missing (its folder must exist).  sync_every: records between fsyncs; 1: a record that `append` returned
    from survives power loss; 0: only `sync` and `close` fsync; None: as often as takes a twentieth of the time, so after every
    record where they come slowly. Whatever the value, an appended record survives the death of this process. One record is written
    by one write call: readers see it whole or torn, never mixed.
    Raises JournalCorrupt for damage before the end, BlockingIOError if another process has the journal open.
    """

    def __init__(self, path: str | Path, *, sync_every: int | None = 1) -> None:
        self.path = Path(path)
        self._next_sync = time.monotonic()
        self._sync_every = sync_every
        self._since_sync = 0
        existed = self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scan = _Scan(self.path)
            for _ in scan:
                pass
            self._size = scan.end
            self.records = scan.records
            self.dropped_bytes = os.fstat(self._fd).st_size - scan.end
            if self.dropped_bytes:
                os.ftruncate(self._fd, self._size)
                os.fsync(self._fd)
            if not existed:
                _sync_folder(self.path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Write one record of JSON values (no NaN or infinity: ValueError; arrays: `encode_array`).

        If the write fails (a full disk), what it left is cut off again and the OSError is raised.
        """
        payload = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
        line = _head(payload) + payload + _TAIL
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)
        self.records += 1
        self._since_sync += 1
        if self._sync_every is None:
            due = time.monotonic() >= self._next_sync
        else:
            due = 0 < self._sync_every <= self._since_sync
        if due:
            self.sync()

    def sync(self) -> None:
        """Return when every appended record is on disk."""
        started = time.monotonic()
        os.fsync(self._fd)
        done = time.monotonic()
        self._since_sync, self._next_sync = 0, done + 19 * (done - started)

    def close(self) -> None:
        """Sync and close; further calls do nothing."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """The sound records in order; a torn last record is left out. Raises JournalCorrupt for damage before the end."""
    yield from _Scan(Path(path))


def encode_array(array: np.ndarray, *, compress: bool = False) -> dict[str, Any]:
    """A JSON value that holds a number or bool array bit for bit (base64 of its little-endian bytes, or of their zlib stream)."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = zlib.compress(little.tobytes()) if compress else little.tobytes()
    return {
        "dtype": little.dtype.str,
        "shape": list(array.shape),
        "zlib" if compress else "base64": base64.b64encode(data).decode("ascii"),
    }


def decode_array(value: dict[str, Any]) -> np.ndarray:
    """The array of `encode_array`, writable."""
    data = base64.b64decode(value["zlib"] if "zlib" in value else value["base64"], validate=True)
    flat = np.frombuffer(zlib.decompress(data) if "zlib" in value else data, dtype=np.dtype(value["dtype"]))
    return flat.reshape(value["shape"]).copy()


@dataclass
class _Scan:
    """Iterates over the sound records from the start; `end` is the byte after the last one seen, `records` their number."""

    path: Path
    end: int = 0
    records: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for line in file:
                payload = _payload(line)
                if payload is None:
                    if any(_payload(later) is not None for later in file):
                        raise JournalCorrupt(
                            f"{self.path}: record {self.records} (byte {self.end}) is damaged and sound records follow it; "
                            "the disk or another program changed it. Restore the file from a copy, or move it away to start anew."
                        )
                    return
                self.end += len(line)
                self.records += 1
                yield json.loads(payload)


def _head(payload: bytes) -> bytes:
    return _HEAD.format(crc=zlib.crc32(payload), length=len(payload)).encode()


def _payload(line: bytes) -> bytes | None:
    """The record's bytes if head, length, checksum and end are right."""
    payload = line[_HEAD_BYTES : -len(_TAIL)]
    return payload if line == _head(payload) + payload + _TAIL else None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
