"""Input text: which files, cut into which pieces, and the documents of one piece.

A `.jsonl` or `.jsonl.gz` file holds one JSON object a line; every other file is one document of UTF-8 text.
"""

import fnmatch
import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import orjson

from megatron_m1.config.errors import ConfigError

__all__ = ["BadRecord", "Piece", "PieceReader", "plan_pieces", "read_input_list"]

BOM = b"\xef\xbb\xbf"
UNREADABLE = (".zst", ".xz", ".bz2", ".zip", ".gz", ".parquet", ".arrow", ".tar")


@dataclass(frozen=True)
class Piece:
    """A unit of work: bytes [start, end) of one JSON Lines file, one .jsonl.gz, or some text files."""

    kind: Literal["jsonl", "jsonl.gz", "text"]
    files: tuple[str, ...]
    start: int
    end: int
    """For kinds other than `jsonl`, the bytes on disk."""

    @property
    def size(self) -> int:
        """Input bytes."""
        return self.end - self.start

    def __str__(self) -> str:
        if self.kind == "text":
            return self.files[0] if len(self.files) == 1 else f"{self.files[0]} ... {self.files[-1]}"
        return f"{self.files[0]} bytes {self.start}-{self.end}"


@dataclass(frozen=True)
class BadRecord:
    """A line (JSON Lines) or file (text) that gives no document.  line: from 1, within the piece
    (JSON Lines) or the file (text)."""

    file: str
    line: int
    reason: str
    raw: str


def read_input_list(path: str) -> list[str]:
    """The inputs that the text file `path` names, one a line; empty lines are left out.  Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"--input-list {path} cannot be read: {reason}; name a text file with one input a line."
        ) from error
    inputs = [line for line in lines if line]
    if not inputs:
        raise ConfigError(f"--input-list {path} names no input; write one file or directory a line.")
    return inputs


def plan_pieces(inputs: list[str], globs: list[str]) -> list[Piece]:
    """Pieces in input order; they depend on the input alone, never on the number of workers.

    inputs: files, and directories that are searched for files (sorted by path) whose name matches one of `globs`.
    Raises ConfigError for missing inputs, unknown formats and directories without a match.
    """
    files = [path for entry in inputs for path in _expand(entry, globs)]
    sizes = [os.path.getsize(path) for path in files]
    target = min(max(sum(sizes) // 256, 1 << 20), 1 << 24)
    pieces: list[Piece] = []
    group: list[str] = []
    group_size = 0

    def close_group() -> None:
        nonlocal group_size
        if group:
            pieces.append(Piece("text", tuple(group), 0, group_size))
        group.clear()
        group_size = 0

    for path, size in zip(files, sizes, strict=True):
        if path.endswith((".jsonl", ".jsonl.gz")):
            close_group()
            if path.endswith(".gz"):
                pieces.append(Piece("jsonl.gz", (path,), 0, size))
            else:
                pieces += [Piece("jsonl", (path,), at, min(at + target, size)) for at in range(0, size, target)]
        else:
            group.append(path)
            group_size += size
            if group_size >= target:
                close_group()
    close_group()
    return pieces


def _expand(entry: str, globs: list[str]) -> list[str]:
    if os.path.isdir(entry):
        found = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(entry)
            for name in names
            if any(fnmatch.fnmatchcase(name, glob) for glob in globs) and os.path.isfile(os.path.join(folder, name))
        )
        if not found:
            raise ConfigError(f"--input {entry} holds no file that matches {' '.join(globs)}; set --glob.")
    elif os.path.isfile(entry):
        found = [entry]
    else:
        raise ConfigError(f"--input {entry} is neither a file nor a directory; correct the path.")
    for path in found:
        if path.endswith(UNREADABLE) and not path.endswith(".jsonl.gz"):
            raise ConfigError(f"--input {path} has a format that cannot be read; convert it to .jsonl or .jsonl.gz.")
        if path.endswith((".json", ".ndjson")) and _has_json_lines(path):
            raise ConfigError(
                f"--input {path} holds JSON lines, but would be read as one document; give it the ending .jsonl."
            )
    return found


def _has_json_lines(path: str) -> bool:
    """Whether each of the first two lines is a whole JSON object."""
    with open(path, "rb") as stream:
        lines = [stream.readline(1 << 24) for _ in range(2)]
    try:
        return all(isinstance(orjson.loads(line), dict) for line in lines)
    except orjson.JSONDecodeError:
        return False


class PieceReader:
    """Iterates over the documents (str) and BadRecords of a piece, in order.  Blank lines are skipped.

    lines: lines read so far (JSON Lines only).  Raises ConfigError for an unreadable or damaged file.
    """

    def __init__(self, piece: Piece, json_key: str) -> None:
        self.piece, self.json_key = piece, json_key
        self.lines = 0

    def __iter__(self) -> Iterator[str | BadRecord]:
        try:
            if self.piece.kind == "text":
                yield from map(self._text, self.piece.files)
            elif self.piece.kind == "jsonl.gz":
                with gzip.open(self.piece.files[0], "rb") as stream:
                    yield from self._json_lines(stream, at_start=True)
            else:
                with open(self.piece.files[0], "rb", buffering=1 << 20) as stream:
                    yield from self._json_lines(self._lines_of_range(stream), at_start=self.piece.start == 0)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ConfigError(
                f"{self.piece.files[0]} is damaged after line {self.lines} ({error}); copy it again or leave it out."
            ) from None
        except OSError as error:
            raise ConfigError(f"{error.filename or self.piece} cannot be read ({error.strerror or error}).") from None

    def _text(self, path: str) -> str | BadRecord:
        data = Path(path).read_bytes().removeprefix(BOM)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            return BadRecord(path, line, f"not UTF-8: {error.reason} at byte {error.start}", "")

    def _lines_of_range(self, stream: BinaryIO) -> Iterator[bytes]:
        """The lines that begin in [start, end)."""
        position = self.piece.start
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < self.piece.end and (line := stream.readline()):
            position += len(line)
            yield line

    def _json_lines(self, lines: Iterator[bytes], *, at_start: bool) -> Iterator[str | BadRecord]:
        key, file = self.json_key, self.piece.files[0]
        for line in lines:
            self.lines += 1
            if at_start and self.lines == 1:
                line = line.removeprefix(BOM)
            try:
                text = orjson.loads(line)[key]
            except (orjson.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                if not line.strip():
                    continue
                yield BadRecord(file, self.lines, _reason(error, line, key), line.decode("utf-8", "backslashreplace"))
                continue
            if isinstance(text, str):
                yield text
            else:
                reason = f"key {key!r} is {type(text).__name__}, not a string"
                yield BadRecord(file, self.lines, reason, line.decode("utf-8"))


def _reason(error: Exception, line: bytes, key: str) -> str:
    if isinstance(error, orjson.JSONDecodeError):
        return f"not valid JSON: {error}"
    if isinstance(error, KeyError):
        return f"no key {key!r}"
    return f"not a JSON object but {type(orjson.loads(line)).__name__}"
