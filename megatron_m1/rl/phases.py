"""Where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_m1 import platform

__all__ = ["Phases"]


class Phases:
    """Seconds by phase, and those that a rank waits for others at the end of a phase, or says it `waited` in it: `idle`."""

    def __init__(self) -> None:
        self.seconds = {"idle": 0.0}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's time to `name`, the wait for the other ranks to `idle`. Collective over the world at its end; the same names
        on all ranks."""
        started = time.perf_counter()
        yield
        platform.synchronize()
        done = time.perf_counter()
        dist.barrier()
        self.seconds[name] = self.seconds.get(name, 0.0) + done - started
        self.seconds["idle"] += time.perf_counter() - done

    def waited(self, name: str, seconds: float) -> None:
        """So many of the seconds measured as `name` were a wait for other ranks."""
        self.seconds[name] -= seconds
        self.seconds["idle"] += seconds

    def report(self) -> dict[str, float]:
        """`seconds_NAME` of what was measured, means over the ranks, and `idle_share` of their sum. Collective over the world; starts
        anew."""
        seconds = self.seconds | {"idle": self.seconds.pop("idle")}  # the last one
        values = torch.tensor(list(seconds.values()), dtype=torch.float64, device=platform.device())
        dist.all_reduce(values)
        values /= dist.get_world_size()
        figures = {f"seconds_{name}": value for name, value in zip(seconds, values.tolist(), strict=True)}
        figures["idle_share"] = figures["seconds_idle"] / max(sum(figures.values()), 1e-9)
        self.seconds = {"idle": 0.0}
        return figures
