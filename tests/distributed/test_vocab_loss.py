"""Training and scoring with a head that sees a few tokens at a time equal those of one rank and all tokens."""

import pytest

from megatron_m1.engine.equality import RankResult, compare, equality_config, run_layout

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
        (2, {"tensor": 2, "sequence": False}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=["one rank", "TP2+SP", "TP2 without SP", "PP2, VPP2", "DP2, overlapped"],
)
def test_chunks_in_every_layout_equal_one_rank(world, parallel, ranks, reference):
    config = equality_config(parallel, {"head_chunk_tokens": CHUNK_TOKENS})
    d = compare(reference, ranks(world, run_layout, config, STEPS))
    assert max(d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight) <= 1e-5, d
