"""The benchmark of context parallelism: its formulas by hand, and that a wrong counter does not pass."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest

from benchmarks import context_parallel
from benchmarks.context_formulas import Shape, all_to_all_bytes, lightning_bytes, softmax_bytes, states_sent
from benchmarks.context_parallel import Case, main, tiny_config
from benchmarks.context_ranks import Sent, all_to_all_sent, exchange_bytes, softmax_attention_bytes
from megatron_m1.config.validate import validate
from megatron_m1.parallel.lightning_exchange import _Travel

# 4 ranks, 8 chunks of 10 tokens; a state has 2 x 2 fp32 numbers, 16 bytes.
SHAPE = Shape(world=4, tokens=80, heads=6, key_value_heads=3, head_dim=2, item=2)
SLOPES = [50.0, 20.0, 10.5, 10.3, 1.0, 0.1]


def test_lightning_bytes_by_hand():
    # The seven borders between chunks 0 .. 7 of ranks 0 1 2 3 3 2 1 0: sent by 0, 1, 2, (3 to itself), 3, 2, 1.
    assert [states_sent(rank, 4) for rank in range(4)] == [1, 2, 2, 1]
    assert states_sent(0, 1) == 0
    ring = [lightning_bytes(SHAPE, rank=rank, method="ring") for rank in range(4)]
    assert ring == [6 * 16, 12 * 16, 12 * 16, 6 * 16]
    # Two chunks' states to three ranks.
    assert {lightning_bytes(SHAPE, rank=rank, method="all_gather") for rank in range(4)} == {6 * 6 * 16}
    # 10 tokens fade slopes beyond 10.4.
    assert SHAPE.left_out(SLOPES) == 3
    limited = [lightning_bytes(SHAPE, rank=rank, method="all_gather", left_out=3) for rank in range(4)]
    assert limited == [18 * 16 + 3 * 16, 18 * 16 + 6 * 16, 18 * 16 + 6 * 16, 18 * 16 + 3 * 16]


def test_softmax_and_all_to_all_bytes_by_hand():
    # 20 local tokens, keys and values of 3 heads of 2 numbers: 240 numbers, to three ranks.
    assert softmax_bytes(SHAPE, direction="forward") == 3 * 240 * 2
    assert softmax_bytes(SHAPE, direction="backward") == 3 * 240 * (2 + 4)
    # q 12, k 6, v 6, o 12 numbers per token, three quarters of them to other ranks.
    assert all_to_all_bytes(SHAPE) == 20 * 36 * 2 * 3 // 4
    # The design's figure for a lightning layer of M1 at 1M over 8 ranks: 7.5 GB.
    whole = Shape(world=8, tokens=1 << 20, heads=64, key_value_heads=64, head_dim=128)
    assert all_to_all_bytes(whole) == 7 * 1 << 30


def test_mismatches_name_rank_direction_and_figures():
    case = Case("lightning 0", SHAPE, "all_gather", 3, [5, 6], [7, 8])
    right = [Sent(5, 7, 5, 7, 3), Sent(6, 8, 6, 8, 3)]
    assert case.mismatches(right) == []
    for wrong, words in (
        ({"forward": 9}, "rank 1, forward: counter 9, handed to torch.distributed 6, formula 6"),
        ({"wire_backward": 9}, "rank 1, backward: counter 8, handed to torch.distributed 9, formula 8"),
        ({"neighbour_heads": 2}, "rank 1: 2 heads left out, not 3"),
    ):
        [line] = case.mismatches([right[0], replace(right[1], **wrong)])
        assert line.endswith(words)


def uncounted_message(rank: int, world: int, *task) -> Sent:
    """`exchange_bytes` where the counter misses messages between two ranks."""
    whole = _Travel.exchange_pairs

    def silent(self, sends, receives):
        before = replace(self.traffic)
        works = whole(self, sends, receives)
        self.traffic.forward, self.traffic.backward = before.forward, before.backward
        return works

    with patch.object(_Travel, "exchange_pairs", silent):
        return exchange_bytes(rank, world, *task)


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_counted_bytes_are_those_of_the_formulas(method, rank_pool):
    for left_out in (None, 3):
        each = [lightning_bytes(SHAPE, rank=rank, method=method, left_out=left_out or 0) for rank in range(4)]
        case = Case("lightning", SHAPE, method, left_out, each, each)
        task = (SHAPE, SLOPES, method, left_out is not None)
        assert case.mismatches(rank_pool.run(exchange_bytes, task, world=4)) == []
    wrong = case.mismatches(rank_pool.run(uncounted_message, task, world=4))
    assert len(wrong) == 2 * 4
    forward, backward = (softmax_bytes(SHAPE, direction=direction) for direction in ("forward", "backward"))
    case = Case("softmax", SHAPE, method, None, [forward] * 4, [backward] * 4)
    assert case.mismatches(rank_pool.run(softmax_attention_bytes, (SHAPE, method), world=4)) == []
    halved = Case("softmax", SHAPE, method, None, [forward // 2] * 4, [backward] * 4)
    assert len(halved.mismatches(rank_pool.run(softmax_attention_bytes, (SHAPE, method), world=4))) == 4


@pytest.mark.parametrize("key_value_heads", [8, 4])
def test_counted_bytes_of_megatrons_all_to_all_are_those_of_the_formula(key_value_heads, rank_pool):
    shape = replace(SHAPE, heads=8, key_value_heads=key_value_heads)
    each = [all_to_all_bytes(shape)] * 4
    case = Case("softmax", shape, "all_to_all", None, each, each)
    sent = rank_pool.run(all_to_all_sent, (shape,), world=4)
    assert case.mismatches(sent) == []
    assert {of_rank.wire_backward for of_rank in sent} == {20 * 2 * (8 + key_value_heads) * 2 * 2 * 3 // 4}
    whole = Case("softmax", shape, "all_to_all", None, [each[0] * 4 // 3] * 4, each)  # with what a rank keeps
    assert len(whole.mismatches(sent)) == 4


@pytest.fixture
def tiny(monkeypatch, rank_pool, tmp_path):
    """main(parts, ...) on the tests' ranks with small states -> (exit code, what it wrote)."""
    monkeypatch.setattr(context_parallel, "RankPool", lambda size: nullcontext(rank_pool))
    monkeypatch.setattr(context_parallel, "HEADS", {"heads": 64, "key_value_heads": 8, "head_dim": 8})

    def run(*options: str) -> tuple[int, dict]:
        output = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["context_parallel", *options, "--output", str(output)])
        return main(), json.loads(output.read_text())

    return run


def test_bytes_and_times_are_written_and_printed(tiny, capsys):
    sizes = ("--worlds", "2", "--tokens", "2048", "--rounds", "1", "--lightning-tokens", "64", "--softmax-tokens", "64")
    code, found = tiny("--parts", "bytes", "time", *sizes)
    assert code == 0
    assert len(found["bytes"]["rows"]) == 2 * 4 + 2 + 4 and found["bytes"]["rows"][1]["left_out"] > 0
    rows = found["time"]["rows"]
    assert [(row["world"], row["tokens"]) for row in rows if row["method"] != "all_gather"] == 2 * [
        (1, 16), (2, 32), (1, 64), (2, 64), (4, 64),
    ]  # fmt: skip
    assert all(row["wall_s"] > 0 and row["cpu_s_per_rank"] > 0 for row in rows)
    assert {rank["sent_bytes"] > 0 for row in rows for rank in row["ranks"] if row["world"] > 1} == {True}
    text = capsys.readouterr().out
    assert "0 mismatches in 14 cases" in text and "time against N at fixed N/W: CPU, gloo" in text
    assert "by formula only" in text


def test_a_mismatch_is_an_error_exit(tiny, monkeypatch, capsys):
    monkeypatch.setattr(context_parallel, "lightning_bytes", lambda *_, **options: 1 + lightning_bytes(*_, **options))
    code, found = tiny("--parts", "bytes", "--worlds", "2", "--tokens", "2048")
    assert code == 1 and len(found["bytes"]["mismatches"]) == 8 * 2 * 2
    assert "lightning 0, W=2, N=2048, ring, rank 0, forward: counter" in capsys.readouterr().err


def test_memory_runs_the_pretraining_loop(tiny, monkeypatch):
    monkeypatch.setattr(context_parallel, "MEMORY_CASES", ((1, 1), (4, 1)))
    code, found = tiny("--parts", "memory", "--memory-tokens", "128")
    alone, spread = found["memory"]["rows"]
    assert code == 0 and (alone["world"], spread["world"]) == (1, 4)
    assert (len(alone["over_imports_mib"]), len(spread["over_imports_mib"])) == (1, 4)
    assert spread["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert alone["loss_tokens"] == spread["loss_tokens"] == 128


def test_the_tiny_model_keeps_the_switches_of_the_twin():
    config = tiny_config(4, 1 << 17, "unused")
    validate(config, 4)
    assert (config.parallel.context, config.training.seq_length, config.training.head_chunk_tokens) == (4, 1 << 17, 512)
    assert config.data.mock and config.training.precision == "fp32" and sum(config.model.layer_types()) == 1
