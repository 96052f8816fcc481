"""The rank pool reports every way to fail, and works afterwards."""

import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist

from megatron_m1.config.errors import ConfigError
from megatron_m1.platform import rank_pool as rank_pool_module
from megatron_m1.platform.rank_pool import RankError


def add_ranks(rank, world, offset):
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return total, dist.get_world_size(), torch.get_num_threads(), os.getpid()


def leaves_groups_behind(rank, world):
    from megatron.core import parallel_state

    was_initialized = parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    return was_initialized, parallel_state.get_tensor_model_parallel_world_size()


def raises_on_last(rank, world):
    if rank == world - 1:
        raise ValueError("a bad layer")
    dist.barrier()


def dies_on_first(rank, world):
    if rank == 0:
        os._exit(7)
    dist.barrier()


def sleeps_forever(rank, world):
    if rank == 0:
        time.sleep(1000)
    return rank


def writes_to_a_rank_that_has_returned(rank, world):
    if rank == 0:
        time.sleep(0.3)
        dist.isend(torch.zeros(1), 1)  # raises if rank 1 has closed its sockets


def returns_what_cannot_travel(rank, world):
    return lambda: None


def works(ranks, n=2):
    totals = ranks(n, add_ranks, 10)
    assert [total.item() for total, *_ in totals] == [sum(range(10, 10 + n))] * n
    return totals


def test_runs_on_the_asked_number_of_ranks_with_one_thread_each(ranks):
    for n in (1, 3, 2):
        for _, world, threads, _ in works(ranks, n):
            assert (world, threads) == (n, 1)


def test_processes_persist_and_groups_do_not(ranks):
    first = [pid for *_, pid in works(ranks)]
    assert ranks(2, leaves_groups_behind) == [(False, 2), (False, 2)]
    assert ranks(1, leaves_groups_behind) == [(False, 1)]
    assert [pid for *_, pid in works(ranks)] == first


def test_a_rank_that_raises(ranks):
    with pytest.raises(RankError, match=r"rank 1 of 2 raised(.|\n)*in raises_on_last(.|\n)*ValueError: a bad layer"):
        ranks(2, raises_on_last, timeout_s=30)
    works(ranks)


def test_a_rank_that_dies(ranks):
    with pytest.raises(RankError, match="rank 0 of 2 died with exit code 7"):
        ranks(2, dies_on_first, timeout_s=30)
    works(ranks)


def test_a_rank_that_hangs_is_reported_with_its_stack(ranks):
    started = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0\] of 2 did not finish in 3 s(.|\n)*in sleeps_forever"):
        ranks(2, sleeps_forever, timeout_s=3)
    assert time.monotonic() - started < 10
    works(ranks)


def test_a_rank_that_is_done_stays_reachable_until_all_are(ranks):
    """Otherwise the others may fail while they still connect to it, in `connectFullMesh`."""
    ranks(2, writes_to_a_rank_that_has_returned, timeout_s=30)
    works(ranks)


def test_a_result_that_cannot_be_pickled(ranks):
    with pytest.raises(RankError, match="pickle"):
        ranks(1, returns_what_cannot_travel, timeout_s=30)
    works(ranks)


def test_more_ranks_than_the_pool_holds(rank_pool):
    with pytest.raises(ConfigError, match="world=9 must lie between 1 and the pool's size=8"):
        rank_pool.run(add_ranks, (0,), world=9)


def test_more_ranks_than_gpus(rank_pool, monkeypatch):
    monkeypatch.setattr(rank_pool_module, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"world=2 needs as many GPUs, found 1; set CUDA_VISIBLE_DEVICES="):
        rank_pool.run(add_ranks, (0,), world=2)


EVENTS: list[str] = []


def last_event(rank, world):
    EVENTS.append(f"function on rank {rank} of {world}")


def test_a_rank_on_a_gpu_takes_its_device_and_meets_the_others_first(monkeypatch):
    """NCCL's communicators belong to the device that is current when they are made, and are made by what all ranks take part in."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(rank_pool_module, "is_cuda", lambda: True)
    monkeypatch.setattr(rank_pool_module, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(rank_pool_module, "select_device", lambda: EVENTS.append(f"device {os.environ['LOCAL_RANK']}"))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: EVENTS.append("group"))
    monkeypatch.setattr(dist, "all_reduce", lambda _: EVENTS.append("all-reduce"))
    rank_pool_module._run_task(pickle.dumps((last_event, ())), "store", 3, 4, 1.0)
    assert EVENTS == ["device 3", "group", "all-reduce", "function on rank 3 of 4"]
