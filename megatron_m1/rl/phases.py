"""Where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_m1 import platform

__all__ = ["Phases"]

NAMES = ("rollout", "reward", "scoring", "update", "evaluation")


class Phases:
    """Seconds by phase, and those that a rank waits at the end of a phase for the others: `idle`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*NAMES, "idle"), 0.0)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's time to `name`, the wait for the other ranks to `idle`. Collective over the world at its end."""
        started = time.perf_counter()
        yield
        platform.synchronize()
        done = time.perf_counter()
        dist.barrier()
        self.seconds[name] += done - started
        self.seconds["idle"] += time.perf_counter() - done

    def report(self) -> dict[str, float]:
        """`seconds_NAME`, means over the ranks, and `idle_share` of their sum. Collective over the world; starts anew."""
        values = torch.tensor(list(self.seconds.values()), dtype=torch.float64, device=platform.device())
        dist.all_reduce(values)
        values /= dist.get_world_size()
        figures = {f"seconds_{name}": value for name, value in zip(self.seconds, values.tolist(), strict=True)}
        figures["idle_share"] = figures["seconds_idle"] / max(sum(figures.values()), 1e-9)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return figures
