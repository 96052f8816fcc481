"""Prompt files: what is read, what is refused, and how the output is put in place."""

import json

import pytest
import tokenizers

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.generation.prompts import PromptLimits, check_output, read_prompts, write_lines

LIMITS = PromptLimits(vocab_size=10, max_tokens=4)


@pytest.fixture
def tokenizer(tmp_path):
    words = {"<eod>": 0, "a": 1, "b": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eod>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer")


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_text_and_token_ids_in_order(tmp_path, tokenizer):
    path = write(tmp_path, '{"text": "b a"}', "", '{"token_ids": [9, 0], "note": 1}')
    assert read_prompts(path, tokenizer, LIMITS) == [[2, 1], [9, 0]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "either `text` or `token_ids`"),
        ('{"prompt": "a"}', "either `text` or `token_ids`"),
        ('{"text": "a", "token_ids": [1]}', "either `text` or `token_ids`"),
        ('{"text": 3}', "must be a string"),
        ('{"token_ids": "1"}', "list of integers"),
        ('{"token_ids": [1, 2.0]}', "list of integers"),
        ('{"token_ids": [true]}', "list of integers"),
        ('{"token_ids": [1, 10]}', "token id 10 must lie in 0..9"),
        ('{"token_ids": [-1]}', "token id -1 must lie in 0..9"),
        ('{"token_ids": []}', "the prompt is empty"),
        ('{"text": ""}', "the prompt is empty"),
        ('{"token_ids": [1, 2, 3, 4, 5]}', "shorten it to 4"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, said):
    path = write(tmp_path, '{"token_ids": [1]}', "", line)
    with pytest.raises(ConfigError) as error:
        read_prompts(path, tokenizer, LIMITS)
    assert f"{path}:3" in str(error.value) and said in str(error.value)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts.jsonl:1: `text` needs a tokenizer; pass --tokenizer"):
        read_prompts(write(tmp_path, '{"text": "a"}'), None, LIMITS)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.jsonl", None, LIMITS)
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(write(tmp_path, "", " "), None, LIMITS)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"latin.jsonl:1 is not JSON"):
        read_prompts(tmp_path / "latin.jsonl", None, LIMITS)


def test_output_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    with pytest.raises(ValueError):
        write_lines(path, [{"x": 1}, {"x": float("nan")}])
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    write_lines(path, [{"text": "é"}, {"x": [1]}])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [{"text": "é"}, {"x": [1]}]
    assert list(tmp_path.iterdir()) == [path]


def test_impossible_outputs_are_found_beforehand(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(ConfigError, match="create it"):
        check_output(tmp_path / "none" / "out.jsonl")
