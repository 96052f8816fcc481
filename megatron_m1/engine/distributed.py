"""Start and end of torch.distributed for one rank."""

import os
from datetime import timedelta

import torch.distributed as dist

from megatron_m1 import platform

__all__ = ["init_distributed", "lost_a_rank", "shutdown_distributed"]


def init_distributed(timeout_s: int, *, deterministic: bool = False) -> None:
    """Join the job that torchrun's environment variables name; without them, a job of this process alone.

    timeout_s: seconds after which a collective that a dead rank never joins raises on the others.
    deterministic: see training.deterministic.
    """
    platform.use_deterministic_algorithms(deterministic)
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_s)
    platform.select_device()
    if "RANK" in os.environ:
        dist.init_process_group(platform.distributed_backend(), timeout=timeout)
    else:
        dist.init_process_group(
            platform.distributed_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def shutdown_distributed() -> None:
    """Leave the job; safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank died or did not answer within the timeout."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
