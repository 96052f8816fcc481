"""bf16 training with fp32 router and head: every layout takes the steps of one rank, to rounding."""

from unittest import mock

import pytest
import torch

from tests.distributed.checkpoint_runs import tiny_config, train

BAND = 2e-3
"""Relative difference of losses and gradient norms that the order of bf16 additions may make in three steps."""


def train_in_one_exchange(rank, world, config):
    """As with core's disable_bucketing: the bf16 and fp32 buffers of a chunk are gathered in one call."""
    from megatron_m1.engine import optimizer

    def all_buckets(*arguments, **options):
        return wrap(*arguments, **options | {"disable_bucketing": True})

    wrap = optimizer.DistributedDataParallel
    with mock.patch.object(optimizer, "DistributedDataParallel", all_buckets):
        return train(rank, world, config, 3)


def distance(runs, whole) -> float:
    figures, expected = torch.tensor(runs[0].steps), torch.tensor(whole[0].steps)
    return ((figures - expected) / expected).abs().max().item()


@pytest.fixture(scope="module")
def whole(rank_pool):
    return rank_pool.run(train, (tiny_config(precision="bf16"), 3), world=1)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"tensor": 2}),
        (2, {"distributed_optimizer": False}),
        (4, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"expert": 2, "overlap_grad_reduce": True}),
    ],
    ids=["TP2", "DP2 without distributed optimizer", "DP2xPP2 VPP2", "DP2xEP2 with overlap"],
)
def test_bf16_layouts_agree(ranks, whole, world, parallel):
    assert distance(ranks(world, train, tiny_config(precision="bf16", **parallel), 3), whole) < BAND


def test_one_exchange_of_both_types_is_noticed(ranks, whole):
    """The mutant of the test above. If it passes, gloo has learnt it and engine/optimizer.py can let core decide."""
    config = tiny_config(precision="bf16", pipeline=2, virtual_pipeline=2)
    assert distance(ranks(4, train_in_one_exchange, config), whole) > BAND
