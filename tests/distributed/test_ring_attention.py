"""Ring and all-gather attention of zig-zag shards against one rank, and mutants of the ring."""

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from m1_kernels import softmax_attention

from megatron_m1 import platform
from megatron_m1.parallel import attention_blocks
from megatron_m1.parallel.attention_blocks import AttentionPlan
from megatron_m1.parallel.ring_attention import METHODS, ring_attention
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.traffic import Traffic

SCALE, HEADS, KEY_HEADS, WIDTH = 0.3, 4, 2, 8
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layouts(world: int, rank: int) -> dict[str, SequenceLayout]:
    """Documents that cross every kind of border, of length 0 and 1, longer than a rank; the least and odd chunk sizes."""
    size, place = 2 * world, {"world": world, "rank": rank}
    crossing = [0, 3, 3, 4, 5 * size + 1, 5 * size + 2, 6 * size, 7 * size - 1]
    return {
        "dense": SequenceLayout.dense(**place, rows=2, tokens=3 * size),
        "dense, chunks of 1": SequenceLayout.dense(**place, rows=1, tokens=size),
        "pack": SequenceLayout.pack(**place, cu_seqlens=crossing, tokens=7 * size),
        "pack of one document": SequenceLayout.pack(**place, cu_seqlens=[0, 3 * size], tokens=3 * size),
        "pack of single tokens": SequenceLayout.pack(**place, cu_seqlens=list(range(size + 1)), tokens=size),
        "per document": SequenceLayout.per_document(**place, cu_seqlens=[0, size, size, 4 * size, 6 * size]),
    }


def document_edges(layout: SequenceLayout) -> torch.Tensor | None:
    if not layout.packed:
        return None
    lengths = {p.document: p.document_length for pieces in layout.pieces for p in pieces}
    return torch.tensor([0, *itertools.accumulate(lengths[d] for d in sorted(lengths))], dtype=torch.int32)


def make(layout: SequenceLayout, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of o in the global order, the same on every rank."""
    generator = torch.Generator().manual_seed(layout.tokens)
    rows = 1 if layout.packed else layout.rows
    shapes = [(heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    tensors = [torch.randn(rows, layout.tokens, *s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(platform.device(), dtype) for x in tensors]


def error(layout: SequenceLayout, group: dist.ProcessGroup, method: str, dtype: torch.dtype, traffic=None) -> float:
    """Largest ||a - b|| / ||b|| of o, dq, dk, dv on this rank against attention on one rank in the same dtype."""
    *inputs, do = make(layout, dtype)
    whole = [x.clone().requires_grad_() for x in inputs]
    edges = document_edges(layout)
    o = softmax_attention(*whole, scale=SCALE, cu_seqlens=None if edges is None else edges.to(do.device))
    expected = [layout.partition(x, 1) for x in (o, *torch.autograd.grad(o, whole, do))]
    local = [layout.partition(x, 1).requires_grad_() for x in inputs]
    o = ring_attention(*local, scale=SCALE, group=group, layout=layout, method=method, traffic=traffic)
    actual = [o, *torch.autograd.grad(o, local, layout.partition(do, 1))]
    assert all(a.dtype == dtype for a in actual)
    return max(float((a - b).detach().norm() / b.norm().clamp_min(1e-30)) for a, b in zip(actual, expected))


def _errors(rank: int, world: int) -> dict[tuple, float]:
    group, errors = dist.group.WORLD, {}
    for method, dtype in itertools.product(METHODS, BOUNDS):
        for name, layout in layouts(world, rank).items():
            errors[name, method, dtype] = error(layout, group, method, dtype)
    if world == 4:
        groups = [dist.new_group(members) for members in ([2, 0], [1, 3])]
        group = groups[rank % 2]
        for method in METHODS:
            errors["groups in the world", method, torch.float64] = error(
                layouts(2, group.rank())["pack"], group, method, torch.float64
            )
    return errors


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shards_equal_one_rank(world: int, ranks) -> None:
    for errors in ranks(world, _errors):
        for case, value in errors.items():
            assert value <= BOUNDS[case[-1]], (case, value)


def _bytes_sent(rank: int, world: int) -> tuple[float, dict[str, Traffic], bool]:
    """Error and traffic in fp32, where gradients travel at the size of what they belong to; whether a run repeats bit by bit."""
    layout = layouts(world, rank)["dense"]
    traffic = {method: Traffic() for method in METHODS}
    worst = max(error(layout, dist.group.WORLD, m, torch.float32, t) for m, t in traffic.items())
    *inputs, do = (layout.partition(x, 1) for x in make(layout, torch.bfloat16))
    runs = []
    if platform.is_cuda():
        platform.use_deterministic_algorithms(True)
    for _ in range(2):
        local = [x.clone().requires_grad_() for x in inputs]
        o = ring_attention(*local, scale=SCALE, group=dist.group.WORLD, layout=layout, traffic=traffic["ring"])
        runs.append([o, *torch.autograd.grad(o, local, do)])
    if platform.is_cuda():
        platform.use_deterministic_algorithms(False)
    return worst, traffic, all(torch.equal(a, b) for a, b in zip(*runs))


def test_bytes_sent_and_repeated_runs(ranks) -> None:
    world, elements = 4, 2 * 2 * 6 * KEY_HEADS * WIDTH  # k and v, 2 rows, 6 local tokens
    for worst, traffic, repeats in ranks(world, _bytes_sent):
        assert worst <= 1e-5
        hops = world - 1
        # once in fp32, twice in bf16; gradients always in fp32
        ring, gathered = traffic["ring"], traffic["all_gather"]
        assert ring == Traffic(
            hops * elements * (4 + 2 * 2), hops * elements * (4 + 4 + 2 * (2 + 4)), messages=9 * hops
        )
        assert gathered == Traffic(hops * elements * 4, hops * elements * (4 + 4), messages=3)
        assert repeats


def merge_without_rescaling(o, lse, block_o, block_lse):
    return o + block_o * (block_lse - lse).sigmoid().transpose(1, 2).unsqueeze(-1), torch.logaddexp(lse, block_lse)


def merge_that_keeps_the_old_sum(o, lse, block_o, block_lse):
    return o.lerp(block_o, (block_lse - lse).sigmoid().transpose(1, 2).unsqueeze(-1)), lse


def plan_without_one_hop(plan: AttentionPlan, rank: int) -> AttentionPlan:
    return replace(plan, by_rank=tuple(b if other != rank - 1 else None for other, b in enumerate(plan.by_rank)))


def plan_where_first_chunks_see_later_keys(plan: AttentionPlan, rank: int) -> AttentionPlan:
    return replace(
        plan,
        by_rank=tuple(
            b and replace(b, queries=slice(0, b.queries.stop)) if other > rank else b
            for other, b in enumerate(plan.by_rank)
        ),
    )


def plan_with_all_keys_of_earlier_ranks(plan: AttentionPlan, rank: int) -> AttentionPlan:
    return replace(
        plan,
        by_rank=tuple(
            b and replace(b, keys=slice(0, 2 * b.keys.stop)) if other < rank else b
            for other, b in enumerate(plan.by_rank)
        ),
    )


def _mutants(rank: int, world: int) -> dict[str, float]:
    layout = layouts(world, rank)["dense"]
    plan = AttentionPlan.of(layout, platform.device())
    errors = {}
    for mutant in (merge_without_rescaling, merge_that_keeps_the_old_sum):
        with patch.object(attention_blocks, "merge_attention", mutant):
            errors[mutant.__name__] = error(layout, dist.group.WORLD, "ring", torch.float64)
    for mutant in (
        plan_without_one_hop,
        plan_where_first_chunks_see_later_keys,
        plan_with_all_keys_of_earlier_ranks,
    ):
        with patch.object(AttentionPlan, "of", lambda *_, mutant=mutant: mutant(plan, rank)):
            errors[mutant.__name__] = error(layout, dist.group.WORLD, "ring", torch.float64)
    return errors


def test_mutants_are_noticed(ranks) -> None:
    by_rank = ranks(2, _mutants)
    for mutant in by_rank[0]:
        assert max(errors[mutant] for errors in by_rank) > 1e-3, mutant


def _refusals(rank: int, world: int) -> list[str]:
    layout = layouts(world, rank)["dense"]
    q, k, v, _ = (layout.partition(x, 1) for x in make(layout, torch.float32))
    group, messages = dist.group.WORLD, []
    for tensors, options in [
        ((q, k, v), {"layout": layout, "method": "tree"}),
        ((q, k, v), {"layout": layouts(world, 1 - rank)["dense"]}),
        ((q, k[:, 1:], v[:, 1:]), {"layout": layout}),
        ((q[:, 1:], k[:, 1:], v[:, 1:]), {"layout": layout}),
        ((q[:, :, 1:], k, v), {"layout": layout}),
    ]:
        try:
            ring_attention(*tensors, scale=SCALE, group=group, **options)
        except ValueError as refusal:
            messages.append(str(refusal))
    return messages


def test_what_does_not_fit_is_refused(ranks) -> None:
    for messages in ranks(2, _refusals):
        method, rank, keys, tokens, heads = messages
        assert "'tree' must be one of ring, all_gather" in method
        assert "does not fit the group" in rank
        assert "must begin with the layout's [2, 6]" in keys
        assert "must begin with the layout's [2, 6]" in tokens
        assert "must divide 3 query heads" in heads
