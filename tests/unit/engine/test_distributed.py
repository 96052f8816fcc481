import time

import pytest
import torch
import torch.distributed as dist


def waits_for_a_rank_that_does_not_come(rank, world, group):
    """(seconds until it raised, whether that counts as a lost rank) on rank 0."""
    from megatron_m1.config.schema import ParallelConfig
    from megatron_m1.engine.distributed import lost_a_rank
    from megatron_m1.parallel import init_groups

    groups = init_groups(ParallelConfig(tensor=world if group == "tp" else 1, timeout_s=2), seed=1)
    if rank:
        time.sleep(6)
        return None
    started = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=getattr(groups, group))
    except RuntimeError as error:
        return time.monotonic() - started, lost_a_rank(error)
    return None


@pytest.mark.parametrize("group", ["tp", "dp_cp"])
def test_model_parallel_groups_have_the_timeout_of_the_configuration(ranks, group):
    (seconds, lost), _ = ranks(2, waits_for_a_rank_that_does_not_come, group)
    assert 1 < seconds < 5.5 and lost


def test_errors_of_our_own_are_no_lost_rank():
    from megatron_m1.engine.distributed import lost_a_rank

    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not lost_a_rank(raised.value)
    assert lost_a_rank(dist.DistNetworkError("connection refused"))
