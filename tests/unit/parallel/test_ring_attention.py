"""The blocks of ring attention cover what causal attention within documents sees: every pair once, nothing else."""

import itertools

import pytest
import torch

from megatron_m1.parallel.attention_blocks import AttentionPlan
from megatron_m1.parallel.sequence_layout import SequenceLayout

CPU = torch.device("cpu")


def layouts(world: int) -> dict[str, list[SequenceLayout]]:
    size = 2 * world
    edges = [0, 3, 3, 4, 5 * size + 1, 5 * size + 2, 6 * size, 7 * size - 1]
    makers = {
        "dense": lambda rank: SequenceLayout.dense(world=world, rank=rank, rows=2, tokens=3 * size),
        "pack": lambda rank: SequenceLayout.pack(world=world, rank=rank, cu_seqlens=edges, tokens=7 * size),
        "one document": lambda rank: SequenceLayout.pack(world=world, rank=rank, cu_seqlens=[0, size], tokens=size),
        "short documents": lambda rank: SequenceLayout.pack(
            world=world, rank=rank, cu_seqlens=list(range(3 * size + 1)), tokens=3 * size
        ),
        "per document": lambda rank: SequenceLayout.per_document(
            world=world, rank=rank, cu_seqlens=[0, size, size, 3 * size, 4 * size]
        ),
    }
    return {name: [make(rank) for rank in range(world)] for name, make in makers.items()}


def document_and_position(layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of the global row."""
    document, position = torch.empty(2, layout.tokens, dtype=torch.int64)
    for rank, pieces in enumerate(layout.pieces):
        for p in (p for p in pieces if p.row == 0):
            rows = layout.indices[rank, p.local_start : p.local_start + p.length]
            document[rows], position[rows] = p.document, torch.arange(p.start, p.start + p.length)
    return document, position


def count(block, seen: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> None:
    queries, keys = queries[block.queries], keys[block.keys]
    edges = [
        block.pack.get(f"cu_seqlens_{x}", torch.tensor([0, len(rows)])) for x, rows in (("q", queries), ("k", keys))
    ]
    for (a, c), (b, d) in itertools.pairwise(zip(*(edge.tolist() for edge in edges))):
        seen[queries[a:b, None], keys[None, c:d]] += 1


def count_local(plan: AttentionPlan, seen: torch.Tensor, rows: torch.Tensor) -> None:
    for start, end in itertools.pairwise(plan.local.get("cu_seqlens_q", torch.tensor([0, len(rows)])).tolist()):
        part = rows[start:end]
        seen[part[:, None], part[None]] += torch.ones(len(part), len(part), dtype=seen.dtype).tril()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_visible_pair_once(world: int) -> None:
    for name, by_rank in layouts(world).items():
        seen = {"ring": 0, "all_gather": 0}
        work = []
        for rank, layout in enumerate(by_rank):
            plan, rows = AttentionPlan.of(layout, CPU), layout.indices[rank]
            ring, gathered = torch.zeros(2, layout.tokens, layout.tokens, dtype=torch.int64)
            count_local(plan, ring, rows)
            count_local(plan, gathered, rows)
            for other, block in enumerate(plan.by_rank):
                if block is not None:
                    count(block, ring, rows, layout.indices[other])
            for block in plan.gathered:
                count(block, gathered, rows, torch.arange(layout.tokens))
            seen["ring"] += ring
            seen["all_gather"] += gathered
            work.append(int(ring.sum()))
        document, position = document_and_position(by_rank[0])
        visible = (document[:, None] == document) & (position[:, None] >= position)
        for method, times in seen.items():
            assert torch.equal(times, visible.long()), f"{name}, {method}"
        if name in ("dense", "one document", "per document"):
            assert len(set(work)) == 1, f"{name}: unequal work {work}"


def test_blocks_without_a_common_document_are_left_out() -> None:
    for layout in layouts(4)["short documents"]:
        plan = AttentionPlan.of(layout, CPU)
        assert plan.by_rank == (None,) * 4
        assert plan.gathered == ()


def test_a_single_document_is_no_pack() -> None:
    for layout in layouts(2)["one document"]:
        plan = AttentionPlan.of(layout, CPU)
        assert layout.packed and plan.local == {}
        assert all(block.pack == {} for block in (*plan.by_rank, *plan.gathered) if block is not None)


def test_a_plan_is_made_once_per_layout() -> None:
    layout = layouts(2)["pack"][0]
    assert AttentionPlan.of(layout, CPU) is AttentionPlan.of(layout, CPU)
