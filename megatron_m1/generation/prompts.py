"""Prompts in, completions out: JSON lines."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.tokenizer import Tokenizer

__all__ = ["PromptLimits", "check_output", "read_prompts", "write_lines"]


@dataclass(frozen=True)
class PromptLimits:
    vocab_size: int
    max_tokens: int
    """Tokens of a prompt at most."""


def read_prompts(path: Path, tokenizer: Tokenizer | None, limits: PromptLimits) -> list[list[int]]:
    """Token ids of every prompt, none empty. One JSON object per line with `text` or `token_ids`; blank lines are passed over.

    Raises ConfigError naming file and line for anything else.
    """
    prompts = []
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    prompts.append(_prompt(line, f"{path}:{number}", tokenizer, limits))
    except OSError as error:
        raise ConfigError(f"--prompts={path} cannot be read: {error.strerror}; name a file of JSON lines.") from None
    if not prompts:
        raise ConfigError(f'--prompts={path} holds no prompt; write lines such as {{"text": "Once upon"}}.')
    return prompts


def check_output(path: Path) -> None:
    """Raises ConfigError if a file could not be put at `path`, before any work is done."""
    if path.is_dir():
        raise ConfigError(f"--output={path} is a folder; name a file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"--output={path}: {path.parent} is no folder that can be written to; create it or name another."
        )


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Put one JSON object per line at `path`; a reader sees the old file or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"--output={path} cannot be written: {error.strerror}; the file there is as it was."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _prompt(line: bytes, where: str, tokenizer: Tokenizer | None, limits: PromptLimits) -> list[int]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); write one object per line.") from None
    if not isinstance(record, dict) or ("text" in record) == ("token_ids" in record):
        raise ConfigError(f"{where} must be an object with either `text` or `token_ids`; correct the line.")
    tokens = (
        _encode(record["text"], where, tokenizer) if "text" in record else _checked(record["token_ids"], where, limits)
    )
    if not tokens:
        raise ConfigError(f"{where}: the prompt is empty; give it at least one token.")
    if len(tokens) > limits.max_tokens:
        raise ConfigError(
            f"{where}: the prompt has {len(tokens)} tokens, which with --max-new-tokens exceeds "
            f"model.max_position_embeddings; shorten it to {limits.max_tokens}."
        )
    return tokens


def _encode(text: object, where: str, tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: text={text!r} must be a string.")
    if tokenizer is None:
        raise ConfigError(f"{where}: `text` needs a tokenizer; pass --tokenizer DIR, or give `token_ids`.")
    return tokenizer.encode(text)


def _checked(tokens: object, where: str, limits: PromptLimits) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ConfigError(f"{where}: token_ids must be a list of integers.")
    for token in tokens:
        if not 0 <= token < limits.vocab_size:
            raise ConfigError(
                f"{where}: token id {token} must lie in 0..{limits.vocab_size - 1} (model.vocab_size={limits.vocab_size}); "
                "use the tokenizer of this model."
            )
    return tokens
