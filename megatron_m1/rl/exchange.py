"""Samples and facts on their way between ranks."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_m1.rl.samples import Facts, Sample
from megatron_m1.rl.tasks import Task

__all__ = ["facts_of_all", "gathered", "samples_from_replicas"]


def facts_of_all(own: Sequence[Facts]) -> list[Facts]:
    """Everybody's facts on every rank, by number; each sample is named by one rank. Collective over the world."""
    shares: list[Sequence[Facts]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, own)
    return sorted((facts for share in shares for facts in share), key=lambda facts: facts.number)


def gathered(own: Any) -> list[Any]:
    """What every rank gave, in their order, on rank 0; [] elsewhere. Collective over the world."""
    shares = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, shares)
    return shares or []


def samples_from_replicas(
    own: Sequence[Sample], wanted: Collection[int], *, replicas: dist.ProcessGroup
) -> dict[int, Sample]:
    """The samples with the numbers `wanted`, by number, without text and task; `own` are those that this replica generated.
    Collective over `replicas`.

    The replicas take turns in sending, so that a rank holds one replica's share beside its own, however many there are.
    """
    found: dict[int, Sample] = {}
    for turn in range(replicas.size()):
        box: list[Any] = [list(map(_light, own)) if turn == replicas.rank() else None]
        if replicas.size() > 1:
            dist.broadcast_object_list(box, src=dist.get_global_rank(replicas, turn), group=replicas)
        found |= {sample.number: sample for sample in box[0] if sample.number in wanted}
    return found


def _light(sample: Sample) -> Sample:
    """What training needs: tokens and log-probabilities."""
    return replace(sample, task=Task("", sample.task.reward), text="", parts={})
