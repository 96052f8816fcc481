"""Fixtures for all tests. megatron-core's CPU patches go in before any test imports megatron.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be said before triton is imported.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from megatron_m1 import platform
from megatron_m1.platform.rank_pool import RankPool

platform.setup()

MAX_RANKS = 8
PRELOAD = [
    "megatron_m1.checkpoint.native",
    "megatron_m1.data.batches",
    "megatron_m1.data.dataset",
    "megatron_m1.engine.equality",
    "megatron_m1.engine.layer_stats",
    "megatron_m1.engine.metrics",
    "megatron_m1.generation.engine",
    "megatron_m1.generation.reference",
    "megatron_m1.pretrain",
    "megatron_m1.rl.loop",
    "megatron_m1.rl.rollout",
    "megatron_m1.rl.update",
    "pytest",
]


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The pool of persistent ranks that all tests share; processes start when a test first needs them."""
    with RankPool(MAX_RANKS, preload=PRELOAD) as pool:
        yield pool


@pytest.fixture
def ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """ranks(n, fn, *args, timeout_s=120) -> [fn(rank, n, *args) for each of n concurrent ranks]; see RankPool.run."""

    gpus = platform.device_count()

    def run(n: int, fn: Callable, *args: Any, timeout_s: float = 120.0) -> list[Any]:
        if gpus is not None and n > gpus:
            pytest.skip(f"{n} ranks need as many GPUs, found {gpus}")
        return rank_pool.run(fn, args, world=n, timeout_s=timeout_s)

    return run
