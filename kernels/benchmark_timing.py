"""Time one call on a device with cold caches, apart from what the host needs to launch it."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["CudaDevice", "Device", "Measurement", "copy_rate", "measure"]

MIB = 1 << 20
MOST_PASSES = 64  # of the flush before one call; a call that waits for the device cannot be hidden anyway


class Device(Protocol):
    """What `measure` needs of a device and its clocks."""

    flush_ms: float  # how long one pass of `flush` keeps the device busy

    def flush(self, passes: int) -> None:
        """Evict the caches by writing a buffer larger than them `passes` times, without waiting."""

    def mark(self) -> Any:
        """A point in the device's queue, for `elapsed_ms`."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Device time between two marks, waiting for the second."""

    def host_ms(self) -> float:
        """The host's clock."""

    def reset_peak(self) -> None:
        """Start counting peak memory anew."""

    def peak_bytes(self) -> int:
        """Most memory held since `reset_peak`, this object's own buffers left out."""


@dataclass(frozen=True)
class Measurement:
    """Medians over `repeats` calls: ms on the device, host_ms to issue the call; peak_bytes of one call, inputs included."""

    ms: float
    host_ms: float
    peak_bytes: int
    repeats: int


def measure(
    run: Callable[[], object], device: Device, *, target_ms: float = 100.0, least: int = 3, most: int = 40
) -> Measurement:
    """Time `run`, repeated for about `target_ms` of device time, after two calls that compile and tune.

    Before each call the caches are flushed, for long enough that the host has issued the whole call when the device
    gets to it; a call that makes the host wait shows that wait. Results of `run` are dropped at once.
    """
    run()
    device.reset_peak()
    ms, host_ms = _once(run, device, 1)
    peak = device.peak_bytes()
    repeats = max(least, min(most, math.ceil(target_ms / max(ms, 1e-3))))
    passes = min(1 + math.ceil(1.5 * host_ms / device.flush_ms), MOST_PASSES)
    times = [_once(run, device, passes) for _ in range(repeats)]
    return Measurement(
        statistics.median(ms for ms, _ in times), statistics.median(host for _, host in times), peak, repeats
    )


def _once(run: Callable[[], object], device: Device, passes: int) -> tuple[float, float]:
    device.flush(passes)
    start = device.mark()
    issued = device.host_ms()
    run()
    host_ms = device.host_ms() - issued
    return device.elapsed_ms(start, device.mark()), host_ms


def copy_rate(device: Device, source: torch.Tensor) -> float:
    """Bytes per second, read and written, of copying `source`, which should be far larger than the caches."""
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), device, most=20).ms
    return 2 * source.numel() * source.element_size() / ms * 1e3


class CudaDevice:
    """The current CUDA device; events time it, and a buffer of four times the L2 cache flushes it."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties().L2_cache_size
        self._buffer = torch.empty(max(4 * l2, 64 * MIB), dtype=torch.int8, device="cuda")
        self.flush_ms = 1.0
        self.flush(1)
        start = self.mark()
        self.flush(10)
        self.flush_ms = self.elapsed_ms(start, self.mark()) / 10

    def flush(self, passes: int) -> None:
        for _ in range(passes):
            self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    def host_ms(self) -> float:
        return time.perf_counter() * 1e3

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self._buffer.numel()
