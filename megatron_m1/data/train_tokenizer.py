"""Training of a byte-level BPE tokenizer."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.inputs import BadRecord, PieceReader, plan_pieces
from megatron_m1.data.tokenizer import EOD_TOKEN

__all__ = ["train_tokenizer"]


def train_tokenizer(
    inputs: list[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    globs: list[str],
    json_key: str = "text",
    overwrite: bool = False,
) -> tuple[int, int]:
    """(vocabulary size reached, records left out as malformed) after writing OUTPUT/tokenizer.json and
    tokenizer_config.json.

    Byte-level BPE (any text round-trips) with `<eod>` as token 0.  The same input gives the same bytes.  Little text
    may not yield vocab_size tokens.  inputs, globs, json_key: see inputs.plan_pieces.
    Raises ConfigError for wrong inputs, a vocab_size below 257 and an existing tokenizer.
    """
    directory = Path(output)
    if vocab_size < 257:
        raise ConfigError(f"--vocab-size {vocab_size} must be at least 257: 256 bytes and {EOD_TOKEN}.")
    if (directory / "tokenizer.json").exists() and not overwrite:
        raise ConfigError(f"{directory / 'tokenizer.json'} exists; choose another --output or pass --overwrite.")
    pieces = plan_pieces(inputs, globs)
    skipped = 0

    def documents() -> Iterator[str]:
        nonlocal skipped
        for piece in pieces:
            for item in PieceReader(piece, json_key):
                if isinstance(item, BadRecord):
                    skipped += 1
                else:
                    yield item

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents(), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    _replace(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _replace(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    return tokenizer.get_vocab_size(), skipped


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
