"""NCCL runs what a rank puts on one communicator one after another. Do the ranks' orders of messages fit together?"""

import itertools
from collections import deque
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_m1.parallel.ring_attention import METHODS
from tests.distributed.lightning_cases import RATES, cases, over_ranks
from tests.distributed.test_ring_attention import error, layouts

type Item = str | list[tuple[str, int, int]]
"""A collective, or a batch of messages (direction, the other rank, bytes)."""


def recorded(rank: int, world: int) -> dict[tuple[str, str], list[Item]]:
    """What this rank puts on the communicator, forward and backward, by case and method."""
    items: list[Item] = []
    batch, collectives = dist.batch_isend_irecv, ("all_gather_into_tensor", "reduce_scatter_tensor")
    real = {name: getattr(dist, name) for name in collectives}

    def spy(operations):
        items.append([(op.op.__name__, op.peer, op.tensor.nbytes) for op in operations])
        return batch(operations)

    def collective(name):
        def run(*tensors, **options):
            items.append(name)
            return real[name](*tensors, **options)

        return run

    found = {}
    with (
        patch.object(dist, "batch_isend_irecv", spy),
        patch.multiple(dist, **{name: collective(name) for name in collectives}),
    ):
        for method, (name, case) in itertools.product(("ring", "all_gather"), cases(world, rank).items()):
            over_ranks(case, RATES, dist.group.WORLD, method=method, dtype=torch.float32)
            found[f"lightning, {name}", method] = items.copy()
            items.clear()
        for method in METHODS:
            error(layouts(world, rank)["pack"], dist.group.WORLD, method, torch.float32)
            found["softmax", method] = items.copy()
            items.clear()
    return found


def left_over(of_ranks: list[list[Item]]) -> list[deque[Item]]:
    """What never ends of the ranks' items, if only the first of each rank is under way and a message ends at both ends at once."""
    queues = [deque(items) for items in of_ranks]
    pending = [None] * len(queues)
    progress = True
    while progress:
        progress = False
        for rank, queue in enumerate(queues):
            if pending[rank] is None and queue and not isinstance(queue[0], str):
                pending[rank] = list(queue[0])
            if pending[rank] == []:
                queue.popleft()
                pending[rank], progress = None, True
        if all(queue and isinstance(queue[0], str) for queue in queues) and len({queue[0] for queue in queues}) == 1:
            for queue in queues:
                queue.popleft()
            progress = True
        for rank, messages in enumerate(pending):
            for message in list(messages or ()):
                direction, other, size = message
                answer = ("irecv", rank, size)
                if direction == "isend" and pending[other] and answer in pending[other]:
                    messages.remove(message)
                    pending[other].remove(answer)
                    progress = True
    return [queue for queue in queues if queue]


@pytest.mark.parametrize("world", [2, 4])
def test_messages_on_one_communicator_never_wait_for_each_other(world, ranks) -> None:
    of_ranks = ranks(world, recorded)
    assert any(of_ranks[0].values())
    for case in of_ranks[0]:
        assert not left_over([found[case] for found in of_ranks]), case


def test_orders_that_do_not_fit_are_noticed() -> None:
    both_send_first = [[[("isend", 1, 4)], [("irecv", 1, 4)]], [[("isend", 0, 4)], [("irecv", 0, 4)]]]
    assert left_over(both_send_first)
    together = [[[("isend", 1, 4), ("irecv", 1, 4)]], [[("isend", 0, 4), ("irecv", 0, 4)]]]
    assert not left_over(together)
    sizes_differ = [[[("isend", 1, 4)]], [[("irecv", 0, 8)]]]
    assert left_over(sizes_differ)
    assert left_over([["all_gather_into_tensor", [("isend", 1, 4)]], [[("irecv", 0, 4)], "all_gather_into_tensor"]])
