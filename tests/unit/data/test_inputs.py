"""Lists of inputs, as the tools read them."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.inputs import plan_pieces, read_input_list

ROOT = Path(__file__).parents[3]


def test_read_input_list(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a b.txt\n\nc.jsonl\n")
    assert read_input_list(str(path)) == ["a b.txt", "c.jsonl"]
    for content, message in ((b"\n", "names no input"), (b"\xff\n", "cannot be read: it is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_input_list(str(path))


def test_json_lines_under_another_ending_are_not_taken_for_one_document(tmp_path: Path) -> None:
    for name in ("corpus.json", "corpus.ndjson"):
        (tmp_path / name).write_text('{"text": "a"}\n{"text": "b"}\n')
        for entry in (tmp_path / name, tmp_path):
            with pytest.raises(ConfigError, match=rf"{name} holds JSON lines.*give it the ending .jsonl"):
                plan_pieces([str(entry)], ["*.json", "*.ndjson"])
        (tmp_path / name).unlink()
    for text in ('{\n  "a": 1\n}\n', '{"a": 1}\n', "[1]\n[2]\n", ""):
        (tmp_path / "one.json").write_text(text)
        assert [piece.kind for piece in plan_pieces([str(tmp_path)], ["*.json"])] == ["text"]


@pytest.mark.parametrize(
    "tool, arguments",
    [
        ("preprocess_data.py", ["--tokenizer", "none", "--output-prefix", "out"]),
        ("train_tokenizer.py", ["--vocab-size", "300", "--output", "out"]),
    ],
)
def test_a_missing_list_is_one_line_and_exit_code_2(tool: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--input-list", "missing", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --input-list missing cannot be read: No such file")
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())
