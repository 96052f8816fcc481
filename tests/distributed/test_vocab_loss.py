"""Training and scoring with a head that sees a few tokens at a time equal those of one rank and all tokens."""

from unittest.mock import patch

import pytest
import torch

from megatron_m1.engine.equality import RankResult, compare, equality_batches, equality_config, run_layout
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model import vocab_loss
from megatron_m1.parallel import destroy_groups, init_groups

STEPS = 2
CHUNK_TOKENS = 20  # micro-batches of 64 tokens: 4 chunks of 16, or with two sequence shards of packed tokens 4 of 2 x 8


@pytest.fixture(scope="module")
def reference(rank_pool) -> RankResult:
    return rank_pool.run(run_layout, (equality_config({}, {}), STEPS), world=1)[0]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=["one rank", "TP2+SP", "PP2, VPP2", "DP2, overlapped"],
)
def test_chunks_in_every_layout_equal_one_rank(world, parallel, ranks, reference):
    config = equality_config(parallel, {"head_chunk_tokens": CHUNK_TOKENS})
    d = compare(reference, ranks(world, run_layout, config, STEPS))
    # Not of the weights and the balance loss: Adam's first step turns the rounding of near-zero gradients into whole updates.
    assert max(d.loss, d.grad_norm, d.gradient) <= 1e-5, d


def _score(rank, world, config) -> tuple[list[torch.Tensor], float, list[int]]:
    """(scores, masked mean of their negatives less the loss, tokens with logits at a time) of the equality batches, before training."""
    at_a_time = []

    def buffer(*arguments):
        made = plain(*arguments)
        at_a_time.append(len(made))
        return made

    plain = vocab_loss._buffer
    groups = init_groups(config.parallel, seed=config.training.seed)
    trainer = Trainer(config, groups, train=False)
    batches = equality_batches(config, 0)[groups.dp.rank() :: groups.dp.size()]
    with patch.object(vocab_loss, "_buffer", buffer):
        scores = trainer.score(batches)
    loss, tokens = trainer.evaluate(batches)
    mean = -sum(float((s * batch["loss_mask"]).sum()) for s, batch in zip(scores, batches)) / tokens
    destroy_groups()
    return scores, mean - loss, at_a_time


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {"tensor": 2}), (4, {"context": 2, "pipeline": 2})],
    ids=["TP2+SP", "CP2xPP2"],
)
def test_scores_are_those_of_one_rank_on_every_rank(world, parallel, ranks):
    ((expected, rest, whole),) = ranks(1, _score, equality_config({}, {}))
    assert set(whole) == {64}
    assert abs(rest) < 1e-6 and expected[0].shape == (2, 32) and expected[0].dtype == torch.float32
    assert all((scores < 0).all() for scores in expected)
    found = ranks(world, _score, equality_config(parallel, {"head_chunk_tokens": CHUNK_TOKENS}))
    assert {rows for *_, at_a_time in found for rows in at_a_time} == {16}
    for scores, *_ in found:
        for ours, one in zip(scores, expected, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-5)
