"""Samples are a pure function of (seed, index); boundaries; epochs; batches."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import DataConfig
from megatron_m1.data.batches import Batch, MicroBatches, collate, evaluation_steps
from megatron_m1.data.dataset import TokenDataset, build_dataset
from megatron_m1.data.token_file import TokenFileWriter

VOCAB = 1000
EOD = 0


def write(prefix: Path, lengths: list[int], first: int = 1) -> str:
    """Documents of distinct increasing ids from `first` on, each ended by EOD."""
    with TokenFileWriter(prefix, np.dtype(np.int32)) as writer:
        for length in lengths:
            writer.add_document([*range(first, first + length - 1), EOD])
            first += length - 1
    return str(prefix)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    a = write(tmp_path / "a", [7, 5, 30, 1, 2, 9, 40])
    b = write(tmp_path / "b", [50, 3, 120, 11], first=500)
    return DataConfig(train=[a, b], train_weights=[0.25, 0.75], valid=[a])


def dataset(config: DataConfig, **changes: object) -> TokenDataset:
    options = {"seq_length": 8, "seed": 1, "split": "train", "vocab_size": VOCAB} | changes
    return TokenDataset(config, **options)  # type: ignore[arg-type]


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch["tokens"].tolist()]  # type: ignore[union-attr]


def test_sample_does_not_depend_on_access_order(config: DataConfig) -> None:
    once, again = dataset(config), dataset(config)
    expected = [once[i] for i in range(60)]
    for i in [59, 3, 3, 41, 0, 58]:
        for key, value in again[i].items():
            assert torch.equal(value, expected[i][key]), (i, key)


def test_seed_changes_the_order(config: DataConfig) -> None:
    first, second = dataset(config), dataset(config, seed=2)
    assert [first.locate(i) for i in range(40)] != [second.locate(i) for i in range(40)]
    # The blend itself, and with it the source of sample i, does not depend on the seed.
    assert [first.locate(i)[0] for i in range(40)] == [second.locate(i)[0] for i in range(40)]


def test_known_order(config: DataConfig) -> None:
    """The order is part of a checkpoint's meaning: a change here breaks resuming older runs."""
    order = [dataset(config).locate(i) for i in range(12)]
    assert order == KNOWN_ORDER


KNOWN_ORDER = [(1, 17), (1, 5), (0, 8), (1, 9), (1, 11), (1, 4), (0, 2), (1, 18), (1, 16), (1, 20), (0, 0), (1, 12)]


def test_every_window_once_an_epoch(config: DataConfig) -> None:
    data = dataset(config)
    visits: dict[int, list[int]] = {0: [], 1: []}
    for i in range(400):
        source, window = data.locate(i)
        visits[source].append(window)
    for source, windows in visits.items():
        size = (data.files[source].num_tokens - 1) // 8
        assert len(windows) > 3 * size
        epochs = [windows[begin : begin + size] for begin in range(0, 3 * size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_labels_of_one_epoch_are_all_tokens_once(config: DataConfig) -> None:
    data = dataset(DataConfig(train=config.train[1:], document_boundaries="ignore"))
    labels = torch.cat([data[i]["labels"] for i in range(data.windows)])
    tokens = data.files[0].tokens[1 : data.windows * 8 + 1]
    assert Counter(labels.tolist()) == Counter(tokens.tolist())


def test_validation_is_read_in_order(config: DataConfig) -> None:
    data = dataset(config, split="valid")
    tokens = torch.cat([data[i]["tokens"] for i in range(data.windows)])
    assert tokens.tolist() == data.files[0].tokens[: data.windows * 8].tolist()
    assert evaluation_steps(data, 100, 4) == data.windows // 4
    assert evaluation_steps(data, 2, 4) == 2
    assert evaluation_steps(data, 2, data.windows) == 1
    with pytest.raises(ConfigError, match=f"data.valid holds {data.windows} windows .* training.global_batch=1000000"):
        evaluation_steps(data, 2, 10**6)


def test_document_boundaries(tmp_path: Path) -> None:
    # Documents start at 0, 3, 8, 9 and 16; windows of 8 tokens.
    prefix = write(tmp_path / "p", [3, 5, 1, 7, 10])
    data = dataset(DataConfig(valid=[prefix]), split="valid")
    first, second, third = data[0], data[1], data[2]
    assert first["tokens"].tolist() == [1, 2, 0, 3, 4, 5, 6, 0]
    assert first["labels"].tolist() == [2, 0, 3, 4, 5, 6, 0, 0]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert first["document_starts"].tolist() == [0, 3]
    # The label at 7 is the first token of the document at 8.
    assert first["loss_mask"].tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
    assert second["document_starts"].tolist() == [0, 1]
    assert second["position_ids"].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert second["loss_mask"].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert third["document_starts"].tolist() == [0] and third["loss_mask"].tolist() == [1] * 8

    batch = collate([first, second, third], document_boundaries="reset")
    assert batch["cu_seqlens"].tolist() == [0, 3, 8, 9, 16, 24] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 8
    assert batch["tokens"].shape == (3, 8) and batch["tokens"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32

    plain = dataset(DataConfig(valid=[prefix], document_boundaries="ignore"), split="valid")[0]
    assert plain["position_ids"].tolist() == list(range(8)) and plain["loss_mask"].tolist() == [1] * 8
    assert plain["document_starts"].tolist() == [0]
    assert "cu_seqlens" not in collate([plain], document_boundaries="ignore")


def test_a_window_inside_a_document_restarts_positions(tmp_path: Path) -> None:
    data = dataset(DataConfig(valid=[write(tmp_path / "p", [20])]), split="valid")
    assert data[1]["position_ids"].tolist() == list(range(8))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp_size,micro_batch", [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)])
def test_step_is_the_same_for_every_layout(
    config: DataConfig, num_workers: int, dp_size: int, micro_batch: int
) -> None:
    """Over data-parallel sizes, micro-batches, prefetching, ramp-up and a restart in the middle."""
    data = dataset(config)
    ramp = [8, 8, 16, 24, 24]
    got, position = [], 0
    ranks = [MicroBatches(data, document_boundaries="reset", num_workers=num_workers) for _ in range(dp_size)]
    for step, global_batch in enumerate(ramp):
        if step == 3:
            for rank in ranks:
                rank.close()
            data = dataset(config)
            ranks = [MicroBatches(data, document_boundaries="reset", num_workers=num_workers) for _ in range(dp_size)]
        shares = [rank.step(position, global_batch, micro_batch, r, dp_size) for r, rank in enumerate(ranks)]
        assert {len(share) for share in shares} == {global_batch // (micro_batch * dp_size)}
        for m in range(len(shares[0])):
            got += rows([share[m] for share in shares])
        position += global_batch
    for rank in ranks:
        rank.close()
    fresh = dataset(config)
    assert got == [fresh[i]["tokens"].tolist() for i in range(sum(ramp))]


def test_prefetching_survives_a_jump(config: DataConfig) -> None:
    data = dataset(config)
    with MicroBatches(data, document_boundaries="reset", num_workers=1) as batches:
        batches.step(0, 4, 2)
        assert rows(batches.step(100, 4, 2)) == [data[i]["tokens"].tolist() for i in range(100, 104)]
        assert rows(batches.step(4, 4, 4)) == [data[i]["tokens"].tolist() for i in range(4, 8)]


def test_global_batch_must_divide(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="global_batch=6 must be a multiple"):
        MicroBatches(dataset(config), document_boundaries="reset").step(0, 6, 2, 0, 2)


def test_mock_is_pure_uniform_and_learnable() -> None:
    data = build_dataset(DataConfig(mock=True), seq_length=400, seed=7, split="train", vocab_size=50)
    other = build_dataset(DataConfig(mock=True), seq_length=400, seed=8, split="train", vocab_size=50)
    held_out = build_dataset(DataConfig(mock=True), seq_length=400, seed=7, split="valid", vocab_size=50)
    assert torch.equal(data[3]["tokens"], data[3]["tokens"]) and torch.equal(
        data[3]["tokens"][1:], data[3]["labels"][:-1]
    )
    assert not torch.equal(data[3]["tokens"], data[4]["tokens"])
    assert not torch.equal(data[3]["tokens"], other[3]["tokens"])
    assert not torch.equal(data[3]["tokens"], held_out[3]["tokens"])
    samples = [data[i] for i in range(100)]
    counts = torch.bincount(torch.cat([sample["tokens"] for sample in samples]), minlength=50)
    assert counts.min() > 500 and counts.max() < 1100  # 800 expected
    followed = torch.cat([(sample["labels"] - sample["tokens"]) % 50 == 17 for sample in samples])
    assert 0.88 < followed.float().mean() < 0.93


def test_bad_configuration(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        dataset(DataConfig())
    with pytest.raises(ConfigError, match=r"train_weights has 1 entries, data\.train has 2"):
        dataset(DataConfig(train=config.train, train_weights=[1.0]))
    with pytest.raises(ConfigError, match=r"a\.bin has 94 tokens, a window needs training.seq_length \+ 1 = 101"):
        dataset(config, seq_length=100)
    with pytest.raises(ConfigError, match="holds token id 679, outside"):
        dataset(config, vocab_size=679)
    with pytest.raises(ConfigError, match=r"eod_token_id=1000 is outside"):
        dataset(DataConfig(train=config.train, eod_token_id=1000))
    with pytest.raises(ConfigError, match=r"nowhere\.idx does not exist"):
        dataset(DataConfig(train=[str(tmp_path / "nowhere")]))
