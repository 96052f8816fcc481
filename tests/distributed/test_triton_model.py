"""The whole model on the Triton kernels, in their interpreter: loss, gradients and weights of the torch paths."""

import contextlib
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from m1_kernels import dispatch, pointwise
from m1_kernels.choice import Implementation

from megatron_m1.engine.equality import RankResult, compare, equality_config, run_layout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_training.py does it on the GPU")

BOUND = 1e-5
TABLES = {
    "lightning_attention": dispatch.IMPLEMENTATIONS,
    "lightning_attention_packed": dispatch.PACKED_IMPLEMENTATIONS,
    "lightning_attention_read": dispatch.READ_IMPLEMENTATIONS,
    "lightning_attention_state": dispatch.STATE_IMPLEMENTATIONS,
    "gated_rms_norm": pointwise.GATED_RMS_NORM,
    "swiglu": pointwise.SWIGLU,
}
LAYER = {"gated_rms_norm", "swiglu"}
OVER_RANKS = LAYER | {"lightning_attention", "lightning_attention_read", "lightning_attention_state"}


def train(
    rank: int, world: int, parallel: dict, auto: str, strategy: str, precision: str = "fp32", head_dim: int = 16
) -> tuple[set[str], set[str], RankResult]:
    """(operators whose Triton implementation ran, with which strategies, one training step) where `auto` may take the implementation
    of that name alone."""
    calls: Counter[str] = Counter()
    strategies: set[str] = set()

    def counted(operator: str, chosen: Implementation) -> Implementation:
        def run(*args, **options):
            calls[operator] += 1
            strategies.update({options["strategy"]} if "strategy" in options else ())
            return chosen.run(*args, **options)

        return replace(chosen, run=run, auto_on=("cpu", "cuda"))

    config = equality_config(parallel, {"global_batch": 2, "lightning_strategy": strategy}, precision=precision)
    config.model.head_dim = head_dim  # 16 is the least of the Triton kernels
    with contextlib.ExitStack() as stack:
        for operator, table in TABLES.items():
            others = {name: replace(other, auto_on=()) for name, other in table.items()}
            stack.enter_context(patch.dict(table, others | {auto: counted(operator, table[auto])}))
        result = run_layout(rank, world, config, steps=1)
    return set(calls) if auto == "triton" else set(), strategies, result


@pytest.mark.parametrize(
    "world, parallel, strategy, operators",
    [
        (2, {"tensor": 2}, "auto", LAYER | {"lightning_attention_packed"}),
        (2, {"context": 2, "context_lightning": "ring"}, "segmented", OVER_RANKS),
    ],
    ids=["tensor parallel", "context parallel"],
)
def test_a_step_on_the_triton_kernels(world, parallel, strategy, operators, ranks):
    [(_, _, reference)] = ranks(1, train, {}, "torch", "auto")
    found = ranks(world, train, parallel, "triton", strategy, timeout_s=240)
    assert all(ran == operators and used == {strategy} for ran, used, _ in found), found
    d = compare(reference, [result for *_, result in found])
    assert max(d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight) <= BOUND, d
