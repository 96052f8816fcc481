"""tools/preprocess_data.py and tools/train_tokenizer.py as a user runs them."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_m1.data.inputs import PieceReader, plan_pieces
from megatron_m1.data.token_file import TokenFile
from megatron_m1.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
WORDS = "def return self value list index error import from class naïve 中文 \n    \t".split(" ")


def run(*arguments: object, tool: str = "preprocess_data.py", timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def document(seed: int, length: int) -> str:
    rng = np.random.default_rng(seed)
    return "# " + " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts/ (a tree of .txt), lines.jsonl (3 MB: several pieces), lines.jsonl.gz and a tokenizer."""
    folder = tmp_path_factory.mktemp("preprocess")
    for name in ("b/one.txt", "a/two.txt", "a/deep/three.txt", "empty.txt", "a/not-taken.md"):
        path = folder / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.txt" else name + document(len(name), 50), encoding="utf-8")
    # Lines of 1 to 40,000 words, so that lines straddle the cuts between pieces.
    lengths = np.random.default_rng(0).choice([1, 20, 500, 40_000], 60).tolist()
    lines = [json.dumps({"id": i, "text": document(i, n)}, ensure_ascii=i % 2 == 0) for i, n in enumerate(lengths)]
    lines[7:7] = ["", "   "]
    (folder / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with gzip.open(folder / "more.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines[:5]) + "\n")
    done = run(
        "--input",
        folder / "texts",
        folder / "more.jsonl.gz",
        "--vocab-size",
        400,
        "--output",
        folder / "tok",
        tool="train_tokenizer.py",
    )
    assert done.returncode == 0, done.stderr
    return folder


def inputs(folder: Path) -> list[object]:
    return [folder / "texts", folder / "lines.jsonl", folder / "more.jsonl.gz"]


def expected_documents(folder: Path) -> list[str]:
    def lines(text: str) -> list[str]:
        return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]

    texts = [folder / "texts" / name for name in ("a/deep/three.txt", "a/two.txt", "b/one.txt")]
    return [
        *(path.read_text(encoding="utf-8") for path in texts),
        *lines((folder / "lines.jsonl").read_text(encoding="utf-8")),
        *lines(gzip.decompress((folder / "more.jsonl.gz").read_bytes()).decode()),
    ]


def outputs(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "meta.json")}


def left_over(prefix: Path) -> list[str]:
    return sorted(path.name for path in prefix.parent.glob(prefix.name + "*"))


def test_same_bytes_for_any_worker_count_and_as_core_writes(folder: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    assert sum(piece.kind == "jsonl" for piece in plan_pieces([str(folder / "lines.jsonl")], [])) >= 3
    results = []
    for workers in (1, 2, 3):
        prefix = tmp_path / f"w{workers}"
        done = run(
            "--input",
            *inputs(folder),
            "--tokenizer",
            folder / "tok",
            "--output-prefix",
            prefix,
            "--workers",
            workers,
            "--append-eod",
        )
        assert done.returncode == 0, done.stderr
        assert "1 empty documents, 0 bad records" in done.stdout and "MB/s" in done.stdout
        results.append(outputs(prefix))
        assert left_over(prefix) == [f"w{workers}.bin", f"w{workers}.idx", f"w{workers}.meta.json"]
    assert results[0] == results[1] == results[2]

    tokenizer = Tokenizer(folder / "tok")
    documents = [[*tokenizer.encode(text), tokenizer.eod_id] for text in expected_documents(folder)]
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "core.idx"))
    assert (tmp_path / "core.bin").read_bytes() == results[0]["bin"]
    assert (tmp_path / "core.idx").read_bytes() == results[0]["idx"]
    read = IndexedDataset(str(tmp_path / "w2"))
    assert [ids.tolist() for ids in read] == documents
    assert TokenFile(tmp_path / "w1", vocab_size=tokenizer.vocab_size).metadata["tokenizer_sha256"] == tokenizer.sha256


@pytest.mark.parametrize("target", [1, 2, 7, 16, 10_000])
def test_every_line_is_in_one_piece(tmp_path: Path, target: int) -> None:
    """Cuts at every offset, also just before, on and after line ends."""
    from megatron_m1.data.inputs import Piece

    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "é" * n}) for n in (0, 3, 1, 9)]
    path.write_text("\n".join([*lines, "", "nope"]), encoding="utf-8")
    size = path.stat().st_size
    found, count = [], 0
    for start in range(0, size, target):
        reader = PieceReader(Piece("jsonl", (str(path),), start, min(start + target, size)), "text")
        found += [item if isinstance(item, str) else count + item.line for item in reader]
        count += reader.lines
    assert found == ["", "ééé", "é", "ééééééééé", 6] and count == 6


def test_dtype_glob_key_and_list(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"body": "one"}\n{"body": "two"}\n')
    (tmp_path / "list").write_text(f"{source}\n{folder / 'texts'}\n")
    done = run(
        "--input-list",
        tmp_path / "list",
        "--tokenizer",
        folder / "tok",
        "--output-prefix",
        tmp_path / "p",
        "--json-key",
        "body",
        "--dtype",
        "int32",
        "--glob",
        "*.md",
    )
    assert done.returncode == 0, done.stderr
    file = TokenFile(tmp_path / "p")
    tokenizer = Tokenizer(folder / "tok")
    texts = ["one", "two", (folder / "texts/a/not-taken.md").read_text(encoding="utf-8")]
    assert file.dtype == np.int32
    assert file.tokens.tolist() == [i for text in texts for i in tokenizer.encode(text)]


BAD = {
    3: ('{"text": "cut', "not valid JSON"),
    5: ('{"txt": "x"}', "no key 'text'"),
    6: ('{"text": 5}', "key 'text' is int, not a string"),
    7: ('["text"]', "not a JSON object but list"),
    8: ('{"text": "\\ud800"}', "not valid JSON"),
    9: ("17", "not a JSON object but int"),
    10: ('{"text": null}', "key 'text' is NoneType, not a string"),
}


def test_bad_lines_are_quarantined(folder: Path, tmp_path: Path) -> None:
    lines = [BAD[i][0] if i in BAD else json.dumps({"text": f"good {i}"}) for i in range(1, 13)]
    source = tmp_path / "bad.jsonl"
    # The last line is not UTF-8; the second piece of the file begins after 1 MiB of blanks.
    source.write_bytes("\n".join(lines).encode() + b"\n" + b" " * (1 << 20) + b'\n{"text": "late"}\n{"text": "\xff"}')
    (tmp_path / "latin.txt").write_bytes(b"first\nsecond \xe9 line\n")
    arguments = [
        "--input",
        source,
        tmp_path / "latin.txt",
        "--tokenizer",
        folder / "tok",
        "--output-prefix",
        tmp_path / "out",
        "--workers",
        2,
    ]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert f" bad records (see {tmp_path / 'out'}.quarantine.jsonl)\n" in done.stdout
    expected = {(str(source), line): reason for line, (_, reason) in BAD.items()}
    expected |= {(str(source), 15): "not valid JSON", (str(tmp_path / "latin.txt"), 2): "not UTF-8"}
    records = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert [(record["file"], record["line"]) for record in records] == list(expected)
    for record in records:
        assert record["reason"].startswith(expected[record["file"], record["line"]])
        assert f"{record['file']}:{record['line']}: {record['reason']}\n" in done.stderr
    assert [record["raw"].strip() for record in records][:7] == [line for line, _ in BAD.values()]
    tokenizer = Tokenizer(folder / "tok")
    good = [f"good {i}" for i in range(1, 13) if i not in BAD] + ["late"]
    assert TokenFile(tmp_path / "out").tokens.tolist() == [i for text in good for i in tokenizer.encode(text)]

    done = run(*arguments, "--overwrite", "--max-bad-lines", 9)
    assert done.returncode == 0, done.stderr
    before = outputs(tmp_path / "out")
    done = run(*arguments, "--overwrite", "--max-bad-lines", 4)
    assert done.returncode == 2
    assert f"error: more than --max-bad-lines 4 bad records, the last one at {source}:8; see" in done.stderr
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 5
    assert outputs(tmp_path / "out") == before
    assert left_over(tmp_path / "out") == ["out.bin", "out.idx", "out.meta.json", "out.quarantine.jsonl"]


def test_refusals(folder: Path, tmp_path: Path) -> None:
    text = folder / "texts"
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    (tmp_path / "blank.txt").write_text("")
    prefix = tmp_path / "out"
    for arguments, message in [
        (["--input", tmp_path / "nowhere"], "nowhere is neither a file nor a directory"),
        (["--input", text, "--glob", "*.py"], "holds no file that matches *.py"),
        (["--input", tmp_path / "broken.jsonl.gz"], "broken.jsonl.gz is damaged after line"),
        (["--input", tmp_path / "blank.txt"], "no document with text"),
        (["--input", text, "--eod-token", "</s>"], "'</s>' is not in"),
        (["--input", text, "--workers", 0], "--workers 0 must be at least 1"),
        (["--input", text, "--tokenizer", tmp_path], "tokenizer.json does not exist"),
        (["--input", text, "--output-prefix", f"{tmp_path}/"], "names a folder; add the name of the files, e.g."),
    ]:
        done = run("--tokenizer", folder / "tok", "--output-prefix", prefix, *arguments)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and left_over(prefix) == []
    prefix.with_suffix(".bin").write_bytes(b"precious")
    done = run("--input", text, "--tokenizer", folder / "tok", "--output-prefix", prefix)
    assert done.returncode == 2 and "out.bin exists; choose another --output-prefix or pass --overwrite" in done.stderr
    assert prefix.with_suffix(".bin").read_bytes() == b"precious"


@pytest.fixture(scope="module")
def long_input(folder: Path) -> Path:
    """Enough text that a run is still busy when it is disturbed."""
    path = folder / "long.jsonl"
    line = json.dumps({"text": document(1, 5000)}) + "\n"
    path.write_text(line * (24_000_000 // len(line)))
    return path


def test_a_full_disk_is_named_and_leaves_nothing(folder: Path, long_input: Path, tmp_path: Path) -> None:
    """With a limit on the size of a file in place of a full disk."""
    arguments = ["--input", long_input, "--tokenizer", folder / "tok", "--output-prefix", tmp_path / "out"]
    command = [sys.executable, ROOT / "tools/preprocess_data.py", *arguments]
    limited = ["bash", "-c", 'ulimit -f 100 && exec "$@"', "bash", *map(str, command)]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(
        r"^error: \S+/out\.shards-\w+/\d{8}\.bin: File too large\. No token file was written\.$", done.stderr, re.M
    )
    assert left_over(tmp_path / "out") == []


def interrupts_are_taken() -> None:
    """Signals that a process ignores are ignored in its children too: SIGINT in a suite that a shell script started with `&`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_long(folder: Path, long_input: Path, prefix: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A running tool with two workers that have both begun to write."""
    command = [
        sys.executable,
        ROOT / "tools/preprocess_data.py",
        "--input",
        long_input,
        "--tokenizer",
        folder / "tok",
        "--output-prefix",
        prefix,
        "--workers",
        2,
    ]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=interrupts_are_taken
    )
    deadline = time.monotonic() + 120
    while len(list(prefix.parent.glob(prefix.name + ".shards-*/*.bin"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    return process, [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_a_killed_worker_ends_the_run(folder: Path, long_input: Path, tmp_path: Path) -> None:
    process, workers = start_long(folder, long_input, tmp_path / "out")
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    message = f"error: worker process {workers[0].pid} was killed by SIGKILL (out of memory? use fewer --workers) while"
    assert message in errors and errors.count("error: ") == 1 and "Traceback" not in errors
    assert left_over(tmp_path / "out") == [] and not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("sent,code", [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_nothing(
    folder: Path, long_input: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    process, workers = start_long(folder, long_input, tmp_path / "out")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == code and errors.count("error: ") == 1 and "Traceback" not in errors
    assert left_over(tmp_path / "out") == [] and not any(worker.is_running() for worker in workers)


def test_workers_end_when_the_parent_is_killed(folder: Path, long_input: Path, tmp_path: Path) -> None:
    process, workers = start_long(folder, long_input, tmp_path / "out")
    process.kill()
    process.communicate(timeout=90)
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)
    assert not any((tmp_path / f"out.{ending}").exists() for ending in ("bin", "idx"))
