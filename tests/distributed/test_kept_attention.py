"""Recomputation takes the result of softmax attention over context-parallel ranks from the first forward pass."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

from megatron_m1.engine.equality import RankResult, equality_config, run_layout
from megatron_m1.parallel import attention_blocks
from megatron_m1.parallel.sequence_params import KeptAttention

STEPS = 2
RECOMPUTED = {
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective", "recompute_modules": ["core_attn"]},
}


def counted(rank: int, world: int, parallel: dict, training: dict, keep: bool) -> tuple[int, RankResult]:
    """(blocks of softmax attention in the forward passes of some steps, what they left)."""
    blocks = 0
    forward = attention_blocks.softmax_attention_forward

    def count(*tensors, **options):
        nonlocal blocks
        blocks += 1
        return forward(*tensors, **options)

    forget = nullcontext() if keep else patch.object(KeptAttention, "put", lambda self, o, lse: None)
    with patch.object(attention_blocks, "softmax_attention_forward", count), forget:
        result = run_layout(rank, world, equality_config(parallel, training), steps=STEPS)
    return blocks, result


@pytest.mark.parametrize("mode", RECOMPUTED)
@pytest.mark.parametrize(
    "world, parallel",
    [
        (2, {"context": 2, "context_softmax": "ring"}),
        (2, {"context": 2, "context_softmax": "all_gather"}),
        (4, {"context": 2, "context_softmax": "ring", "pipeline": 2, "virtual_pipeline": 2}),
    ],
    ids=["ring", "all_gather", "interleaved pipeline"],
)
def test_attention_runs_once_with_the_same_bits(world, parallel, mode, ranks):
    plain, kept, again = (
        ranks(world, counted, parallel, training, keep)
        for training, keep in (({}, True), (RECOMPUTED[mode], True), (RECOMPUTED[mode], False))
    )
    assert any(blocks for blocks, _ in plain)
    for (once, _), (blocks, result), (twice, expected) in zip(plain, kept, again):
        assert blocks == once and twice == 2 * once
        assert result.losses == expected.losses and result.grad_norms == expected.grad_norms
        for name, (gradient, *_) in result.gradients.items():
            assert torch.equal(gradient, expected.gradients[name][0]), name
