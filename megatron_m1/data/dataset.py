"""Samples as a pure function of (seed, index).

A source (one token file) is cut into fixed windows: window w holds the tokens [w * T, w * T + T] of all documents end
to end in file order, T = seq_length; the first T are inputs, the last T labels, so every token but the first and a tail
shorter than T is a label exactly once an epoch.  Each epoch of a source visits all its windows once, in an order
drawn from (seed, source number, epoch); the held-out set is read in file order.  `Blend` says which source gives
sample i and how many came before, hence which window.  Nothing depends on the number of ranks, on restarts or on the
number of steps.  Documents are not shuffled one by one: shuffle before preprocessing where neighbours are alike.

With data.document_boundaries "reset" documents are kept apart (their starts come from the .idx, not from the
end-of-document token): positions restart at 0 at each document and at the start of the window, and a token whose label
is the first token of the next document, normally the end-of-document token, is masked out of the loss.  With "ignore"
the window is one document and every label counts.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import DataConfig
from megatron_m1.data.blend import Blend
from megatron_m1.data.permutation import Permutation
from megatron_m1.data.token_file import TokenFile
from megatron_m1.data.tokenizer import Tokenizer

__all__ = ["MockDataset", "Sample", "TokenDataset", "build_dataset"]

Sample = dict[str, torch.Tensor]
Split = Literal["train", "valid"]

MOCK_JUMP = 10
"""One token in so many of the mock data does not follow from the one before it."""


def build_dataset(
    config: DataConfig, *, seq_length: int, seed: int, split: Split, vocab_size: int
) -> "TokenDataset | MockDataset":
    """The dataset of a split: `MockDataset` with data.mock, else `TokenDataset`.  Raises ConfigError."""
    if config.mock:
        return MockDataset(seq_length=seq_length, seed=seed, split=split, vocab_size=vocab_size)
    return TokenDataset(config, seq_length=seq_length, seed=seed, split=split, vocab_size=vocab_size)


class TokenDataset:
    """dataset[i] for any i >= 0 is a dict of CPU tensors (T = seq_length):

    tokens, labels, position_ids: int64 [T].  loss_mask: float32 [T], 1 where the label counts.
    document_starts: int32 [n], increasing, first 0: where documents begin in the window (just [0] with "ignore").

    windows: windows of all sources, i.e. samples in one epoch.  blend: the `Blend` in use.
    Raises ConfigError for missing or damaged files, ids outside vocab_size, sources shorter than a window, wrong
    weights, and files made with another tokenizer than data.tokenizer.
    """

    def __init__(self, config: DataConfig, *, seq_length: int, seed: int, split: Split, vocab_size: int) -> None:
        prefixes = config.train if split == "train" else config.valid
        weights = config.train_weights if split == "train" else config.valid_weights
        if not prefixes:
            raise ConfigError(
                f"data.{split} is empty; give prefixes of files made by tools/preprocess_data.py, or set "
                "data.mock=true."
            )
        if weights is not None and len(weights) != len(prefixes):
            raise ConfigError(
                f"data.{split}_weights has {len(weights)} entries, data.{split} has {len(prefixes)}; "
                "give one weight for each prefix."
            )
        if config.eod_token_id is not None and not 0 <= config.eod_token_id < vocab_size:
            raise ConfigError(f"data.eod_token_id={config.eod_token_id} is outside [0, model.vocab_size={vocab_size}).")
        self.seq_length, self.seed, self.split = seq_length, seed, split
        self.reset = config.document_boundaries == "reset"
        self.files = [TokenFile(prefix, vocab_size=vocab_size) for prefix in prefixes]
        if config.tokenizer is not None:
            self._check_tokenizer(Tokenizer(config.tokenizer, model_vocab_size=vocab_size))
        self._windows = [self._count_windows(file) for file in self.files]
        self.windows = sum(self._windows)
        self.blend = Blend(weights if weights is not None else [file.num_tokens for file in self.files])

    def __getitem__(self, index: int) -> Sample:
        source, window = self.locate(index)
        file, length = self.files[source], self.seq_length
        start = window * length
        ids = torch.from_numpy(file.read(start, length + 1))
        starts = file.starts_within(start + 1, length) + 1 if self.reset else np.empty(0, np.int64)
        return make_sample(ids, starts)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, window) of sample `index`."""
        if index < 0:
            raise IndexError(f"sample {index} must not be negative")
        source, cursor = self.blend.locate(index)
        epoch, place = divmod(cursor, self._windows[source])
        if self.split == "valid":
            return source, place
        return source, _order(self._windows[source], self.seed, source, epoch)[place]

    def _count_windows(self, file: TokenFile) -> int:
        windows = (file.num_tokens - 1) // self.seq_length
        if windows < 1:
            raise ConfigError(
                f"{file.bin_path} has {file.num_tokens} tokens, a window needs training.seq_length + 1 = "
                f"{self.seq_length + 1}; shorten training.seq_length or add text."
            )
        return windows

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        for file in self.files:
            if file.metadata.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
                raise ConfigError(
                    f"{file.prefix} was made with another tokenizer than data.tokenizer={tokenizer.path} "
                    "(their hashes differ); preprocess the text again or correct data.tokenizer."
                )


class MockDataset:
    """Samples like TokenDataset's, of uniformly distributed yet learnable tokens: nine in ten are the token before plus
    a constant (mod vocab_size), the others are drawn anew.  One document a sample; `windows` is unlimited (None)."""

    windows = None

    def __init__(self, *, seq_length: int, seed: int, split: Split, vocab_size: int) -> None:
        self.seq_length, self.seed, self.split, self.vocab_size = seq_length, seed, split, vocab_size

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"sample {index} must not be negative")
        # Raw words, since NumPy may change the streams of its distributions but not of the bit generator.
        bits = np.random.Philox(key=[self.seed, 2 * index + (self.split == "valid")])
        length = self.seq_length + 1
        drawn = (bits.random_raw(length) % self.vocab_size).astype(np.int64)
        jump = bits.random_raw(length) % MOCK_JUMP == 0
        jump[0] = True
        since = np.arange(length)
        last = np.maximum.accumulate(np.where(jump, since, 0))
        step = self.vocab_size // 3 + 1
        ids = (drawn[last] + step * (since - last)) % self.vocab_size
        return make_sample(torch.from_numpy(ids), np.empty(0, np.int64))


def make_sample(ids: torch.Tensor, starts: np.ndarray) -> Sample:
    """Sample of the int64 ids [T + 1], with documents beginning at the offsets `starts` (in 1..T, increasing)."""
    length = len(ids) - 1
    loss_mask = torch.ones(length, dtype=torch.float32)
    loss_mask[torch.from_numpy(starts - 1)] = 0.0
    inside = np.concatenate([[0], starts[starts < length]])
    position_ids = np.arange(length) - np.repeat(inside, np.diff(inside, append=length))
    return {
        "tokens": ids[:-1],
        "labels": ids[1:],
        "loss_mask": loss_mask,
        "position_ids": torch.from_numpy(position_ids),
        "document_starts": torch.from_numpy(inside.astype(np.int32)),
    }


@lru_cache(maxsize=1024)
def _order(windows: int, seed: int, source: int, epoch: int) -> Permutation:
    return Permutation(windows, f"{seed}/{source}/{epoch}")
