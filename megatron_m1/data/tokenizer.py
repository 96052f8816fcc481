"""A tokenizer directory (tokenizer.json, optional tokenizer_config.json) behind four operations."""

import hashlib
import json
import os
from pathlib import Path

import tokenizers

from megatron_m1.config.errors import ConfigError

__all__ = ["EOD_TOKEN", "Tokenizer"]

EOD_TOKEN = "<eod>"
"""End-of-document token of tools/train_tokenizer.py, and the one assumed where tokenizer_config.json names none."""


class Tokenizer:
    """Text to token ids and back.

    vocab_size: largest token id + 1.  eod_id: id of the end-of-document token (`eod_token` if given, else eos_token of
    tokenizer_config.json, else `<eod>`), or None if the vocabulary has none.  sha256: hex digest of tokenizer.json.
    model_vocab_size: if given, ids must fit it.
    Raises ConfigError for a missing or unreadable directory, an unknown eod_token and too small a model vocabulary.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, eod_token: str | None = None, model_vocab_size: int | None = None
    ) -> None:
        self.path = Path(directory) / "tokenizer.json"
        if not self.path.is_file():
            raise ConfigError(
                f"tokenizer: {self.path} does not exist; give a directory that holds tokenizer.json, "
                "e.g. one made by tools/train_tokenizer.py."
            )
        data = self.path.read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the Rust side raises plain Exception
            raise ConfigError(
                f"tokenizer: {self.path} cannot be read ({error}); make it again with "
                "tools/train_tokenizer.py or copy it again."
            ) from None
        # A tokenizer.json may carry the truncation or padding of its last use; documents are never cut.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod_id = self._find_eod(eod_token)
        if model_vocab_size is not None and self.vocab_size > model_vocab_size:
            raise ConfigError(
                f"model.vocab_size={model_vocab_size} is smaller than the {self.vocab_size} tokens of "
                f"{self.path}; set model.vocab_size to {self.vocab_size} or more, or use the tokenizer "
                "of this model."
            )

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids, nothing added.  A special token spelled in the text is plain text unless parse_special."""
        return self.encode_batch([text], parse_special=parse_special)[0].ids

    def encode_batch(self, texts: list[str], *, parse_special: bool = False) -> list[tokenizers.Encoding]:
        """One Encoding (use its `ids`) per text; see `encode`."""
        self.backend.encode_special_tokens = not parse_special
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of token ids."""
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def _find_eod(self, eod_token: str | None) -> int | None:
        name = eod_token or self._configured_eos() or EOD_TOKEN
        token_id = self.backend.token_to_id(name)
        if token_id is None and eod_token is not None:
            raise ConfigError(f"end-of-document token {name!r} is not in {self.path}; name a token of its vocabulary.")
        return token_id

    def _configured_eos(self) -> str | None:
        path = self.path.with_name("tokenizer_config.json")
        if not path.is_file():
            return None
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"tokenizer: {path} is not a JSON object ({error}); correct or delete it.") from None
        return token.get("content") if isinstance(token, dict) else token
