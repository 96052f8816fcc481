"""Text to token files with worker processes.

The input is cut into pieces (inputs.plan_pieces); each worker takes the next piece and writes its tokens to a shard
file of its own; the parent appends the shards in input order.  The result does not depend on the number of workers.
"""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.inputs import BadRecord, Piece, PieceReader, plan_pieces
from megatron_m1.data.token_file import TokenFileWriter, token_dtype
from megatron_m1.data.tokenizer import Tokenizer

__all__ = ["PreprocessError", "PreprocessOptions", "Summary", "preprocess"]

BATCH_CHARS = 1 << 18


class PreprocessError(RuntimeError):
    """The run could not finish though its input may be good: a worker died, or a file could not be read or written."""


@dataclass
class PreprocessOptions:
    input: list[str]
    tokenizer: str
    output_prefix: str
    workers: int = 1
    globs: list[str] = field(default_factory=lambda: ["*.txt", "*.jsonl", "*.jsonl.gz"])
    """File names taken from input directories."""
    json_key: str = "text"
    append_eod: bool = False
    eod_token: str | None = None
    dtype: str | None = None
    """uint16 or int32; None: by the vocabulary."""
    max_bad_lines: int = 100
    overwrite: bool = False


@dataclass
class Summary:
    """What a run read and wrote; seconds are of tokenizing and merging, without planning."""

    input_bytes: int = 0
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    bad_records: int = 0
    seconds: float = 0.0


@dataclass
class _Result:
    """What a worker tells the parent about one piece."""

    lengths: np.ndarray
    max_token_id: int
    lines: int
    empty: int
    bad: list[BadRecord]


def preprocess(
    options: PreprocessOptions,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Summary, after writing OUTPUT_PREFIX.bin, .idx and .meta.json.

    Empty documents are left out.  Bad records go to OUTPUT_PREFIX.quarantine.jsonl and, as `file:line: reason`, to
    `report`; `progress` is told (bytes done, bytes in all).
    Raises ConfigError for wrong options, damaged input, input without text and more than options.max_bad_lines bad
    records, and PreprocessError if a worker dies or a file cannot be read or written; then no output appears and an
    older one stays as it was.
    """
    tokenizer = Tokenizer(options.tokenizer, eod_token=options.eod_token)
    dtype = _output_dtype(options, tokenizer)
    pieces = plan_pieces(options.input, options.globs)
    metadata = {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "append_eod": options.append_eod,
    }
    writer = TokenFileWriter(options.output_prefix, dtype, metadata=metadata, overwrite=options.overwrite)
    quarantine = Path(f"{options.output_prefix}.quarantine.jsonl")
    quarantine.unlink(missing_ok=True)
    summary = Summary(input_bytes=sum(piece.size for piece in pieces))
    shards = tempfile.mkdtemp(
        prefix=os.path.basename(options.output_prefix) + ".shards-", dir=os.path.dirname(options.output_prefix) or "."
    )
    start = time.perf_counter()
    pool = _Pool(options, dtype, shards)
    try:
        with writer:
            merge = _Merge(writer, shards, quarantine, options.max_bad_lines, summary, report)
            done = 0
            for index, result in pool.run(pieces):
                merge.add(index, pieces[index], result)
                done += pieces[index].size
                progress(done, summary.input_bytes)
            summary.tokens = writer.num_tokens
            if summary.documents == 0:
                raise ConfigError("the input holds no document with text; nothing was written.")
    finally:
        pool.close()
        shutil.rmtree(shards, ignore_errors=True)
    summary.seconds = time.perf_counter() - start
    return summary


def _output_dtype(options: PreprocessOptions, tokenizer: Tokenizer) -> np.dtype:
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} must be at least 1.")
    if options.append_eod and tokenizer.eod_id is None:
        raise ConfigError(f"--append-eod: {tokenizer.path} names no end-of-document token; pass --eod-token TOKEN.")
    if options.dtype is None:
        return token_dtype(tokenizer.vocab_size)
    dtype = np.dtype(options.dtype)
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise ConfigError(
            f"--dtype {dtype} cannot hold the {tokenizer.vocab_size} tokens of {tokenizer.path}; use int32."
        )
    return dtype


class _Merge:
    """Takes results in any order and appends them in input order."""

    def __init__(
        self,
        writer: TokenFileWriter,
        shards: str,
        quarantine: Path,
        max_bad: int,
        summary: Summary,
        report: Callable[[str], None],
    ) -> None:
        self.writer, self.shards, self.quarantine = writer, shards, quarantine
        self.max_bad, self.summary, self.report = max_bad, summary, report
        self.waiting: dict[int, tuple[Piece, _Result]] = {}
        self.next = 0
        self.lines_before: dict[str, int] = {}

    def add(self, index: int, piece: Piece, result: _Result) -> None:
        self.waiting[index] = (piece, result)
        while self.next in self.waiting:
            self._append(*self.waiting.pop(self.next))
            self.next += 1

    def _append(self, piece: Piece, result: _Result) -> None:
        self._quarantine(piece, result)
        shard = _shard_path(self.shards, self.next)
        self.writer.add_shard(shard, result.lengths, result.max_token_id)
        os.remove(shard)
        self.summary.documents += len(result.lengths)
        self.summary.empty_documents += result.empty

    def _quarantine(self, piece: Piece, result: _Result) -> None:
        before = self.lines_before.get(piece.files[0], 0) if piece.start else 0
        self.lines_before = {piece.files[0]: before + result.lines}
        if not result.bad:
            return
        with open(self.quarantine, "a", encoding="utf-8") as stream:
            for bad in result.bad:
                line = before + bad.line
                self.summary.bad_records += 1
                self.report(f"{bad.file}:{line}: {bad.reason}")
                record = {"file": bad.file, "line": line, "reason": bad.reason, "raw": bad.raw}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                if self.summary.bad_records > self.max_bad:
                    raise ConfigError(
                        f"more than --max-bad-lines {self.max_bad} bad records, the last one at "
                        f"{bad.file}:{line}; see {self.quarantine}, mend the input or raise the "
                        "limit. No token file was written."
                    )


class _Pool:
    """Worker processes, each with one piece at a time; a dead worker is an error, never a wait."""

    def __init__(self, options: PreprocessOptions, dtype: np.dtype, shards: str) -> None:
        self.options, self.dtype, self.shards = options, dtype, shards
        self.processes: dict[Connection, multiprocessing.process.BaseProcess] = {}

    def run(self, pieces: list[Piece]) -> Iterator[tuple[int, _Result]]:
        """Yields (index, _Result) as pieces finish.  Raises PreprocessError."""
        todo = iter(enumerate(pieces))
        running: dict[Connection, Piece] = {}
        for _ in range(min(self.options.workers, len(pieces))):
            self._hand_out(self._start(), todo, running)
        while running:
            ready = wait(list(running))
            for connection in [connection for connection in running if connection in ready]:
                try:
                    index, result = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(connection, running[connection]) from None
                if isinstance(result, Exception):
                    raise type(result)(f"{result} No token file was written.")
                del running[connection]
                self._hand_out(connection, todo, running)
                yield index, result

    def close(self) -> None:
        """End the workers this pool started."""
        for connection, process in self.processes.items():
            connection.close()
            process.terminate()
        for process in self.processes.values():
            process.join()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.options, self.dtype, self.shards), daemon=True)
        process.start()
        theirs.close()
        self.processes[ours] = process
        return ours

    def _hand_out(
        self, connection: Connection, todo: Iterator[tuple[int, Piece]], running: dict[Connection, Piece]
    ) -> None:
        task = next(todo, None)
        if task is None:
            return
        running[connection] = task[1]
        try:
            connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(connection, task[1]) from None

    def _death(self, connection: Connection, piece: Piece) -> PreprocessError:
        process = self.processes[connection]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? use fewer --workers)" if code == -signal.SIGKILL else ""
        return PreprocessError(
            f"worker process {process.pid} {how}{hint} while it tokenized {piece}. "
            "No token file was written; run again."
        )


def _shard_path(shards: str, index: int) -> str:
    return os.path.join(shards, f"{index:08d}.bin")


def _work(connection: Connection, options: PreprocessOptions, dtype: np.dtype, shards: str) -> None:
    """A worker: tokenizes the pieces it is sent until the parent closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(options.tokenizer, eod_token=options.eod_token)
    while True:
        try:
            index, piece = connection.recv()
        except EOFError:
            return
        result: _Result | ConfigError | PreprocessError
        try:
            result = _tokenize(piece, tokenizer, options, dtype, _shard_path(shards, index))
        except ConfigError as error:
            result = error
        except OSError as error:
            result = PreprocessError(f"{_shard_path(shards, index)}: {error.strerror or error}.")
        try:
            connection.send((index, result))
        except BrokenPipeError:
            return


def _tokenize(piece: Piece, tokenizer: Tokenizer, options: PreprocessOptions, dtype: np.dtype, shard: str) -> _Result:
    reader = PieceReader(piece, options.json_key)
    lengths, bad = array("i"), []
    empty, max_token_id = 0, -1
    eod = tokenizer.eod_id if options.append_eod else None
    batch: list[str] = []
    chars = 0
    with open(shard, "wb") as stream:

        def flush() -> None:
            nonlocal empty, max_token_id
            tokens = array("i")
            for encoding in tokenizer.encode_batch(batch):
                ids = encoding.ids
                if not ids:
                    empty += 1
                    continue
                if eod is not None:
                    ids.append(eod)
                tokens.fromlist(ids)
                lengths.append(len(ids))
            flat = np.frombuffer(tokens, np.int32)
            max_token_id = max(max_token_id, int(flat.max(initial=-1)))
            stream.write(flat.astype(dtype).tobytes())
            batch.clear()

        for item in reader:
            if isinstance(item, BadRecord):
                bad.append(item)
                if len(bad) > options.max_bad_lines:
                    break
                continue
            batch.append(item)
            chars += len(item)
            if chars >= BATCH_CHARS:
                flush()
                chars = 0
        flush()
    return _Result(np.array(lengths, np.int32), max_token_id, reader.lines, empty, bad)
