"""What each rank of benchmarks/context_gpus.py does; `RankPool` calls these functions."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from m1_kernels import lightning_attention, softmax_attention
from torch import Tensor

from benchmarks.context_formulas import Method, Shape
from megatron_m1 import platform
from megatron_m1.parallel.lightning_context import LightningContext
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.traffic import Traffic

__all__ = ["Link", "Times", "layer_times", "link_speeds", "meet", "supplied"]

WINDOW_S = 0.05
"""Passes follow one another without a barrier for about this long, as the layers of a step do."""
MOST_PASSES = 20
SLOW_S = 1.0
"""Slower passes are timed twice at most."""
RECEIVED_STD = 0.02


@dataclass
class Times:
    """One layer's attention on one rank, seconds of a pass; of the windows the median."""

    forward_s: float
    backward_s: float
    alone_forward_s: float
    """With nothing sent: what would arrive is supplied on this rank."""
    alone_backward_s: float
    forward_bytes: int
    """Sent by one pass, by the layer's own counter."""
    backward_bytes: int
    finite: bool
    """Whether the output and all gradients are."""
    peak_bytes: int


@dataclass
class Link:
    """One rank's share of a transfer in which all take part."""

    operation: str
    sent_bytes: int
    seconds: float


def meet(rank: int, world: int) -> str:
    """The device. Processes that are started together import at the same time."""
    return platform.device_name()


def layer_times(
    rank: int, world: int, shape: Shape, kind: str, slopes: list[float], methods: tuple[Method, ...], rounds: int
) -> dict[Method, Times]:
    """By method, forward and backward in bf16. On one rank what the model runs there: no layout, no exchange."""
    return {method: _times(rank, world, shape, kind, slopes, method, rounds) for method in methods}


def _times(rank: int, world: int, shape: Shape, kind: str, slopes: list[float], method: Method, rounds: int) -> Times:
    if platform.is_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layer = _layer(rank, world, shape, kind, slopes, method)
    layer.one_pass()  # compiles
    platform.synchronize()
    traffic, start = (layer.traffic.forward, layer.traffic.backward), time.perf_counter()
    _, results = layer.one_pass()
    platform.synchronize()
    longest = torch.tensor(time.perf_counter() - start, device=platform.device())
    sent = layer.traffic.forward - traffic[0], layer.traffic.backward - traffic[1]
    finite, peak = all(bool(x.isfinite().all()) for x in results), platform.peak_memory_bytes()
    del results
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)  # every rank makes as many passes
    passes = min(MOST_PASSES, max(1, math.ceil(WINDOW_S / float(longest))))
    rounds = min(rounds, 2) if float(longest) > SLOW_S else rounds
    together, alone = [], []
    for _ in range(rounds):
        together.append(_window(layer, passes))
        if world > 1:
            with supplied():
                alone.append(_window(layer, passes))
    (forward, backward), (alone_forward, alone_backward) = (
        [statistics.median(column) for column in zip(*windows)] for windows in (together, alone or together)
    )
    return Times(forward, backward, alone_forward, alone_backward, *sent, finite, peak)


@dataclass
class _Layer:
    attention: Callable[[], Tensor]
    inputs: list[Tensor]
    gradient: Tensor
    traffic: Traffic

    def one_pass(self) -> tuple[list[Any], list[Tensor]]:
        """Marks before, between and after forward and backward pass; the output and the gradients."""
        marks = [_mark()]
        out = self.attention()
        marks.append(_mark())
        gradients = torch.autograd.grad(out, self.inputs, self.gradient)
        marks.append(_mark())
        return marks, [out.detach(), *gradients]


def _layer(rank: int, world: int, shape: Shape, kind: str, slopes: list[float], method: Method) -> _Layer:
    device, lightning = platform.device(), kind == "lightning"
    generator = torch.Generator(device).manual_seed(1 + rank)

    def normal(heads: int) -> Tensor:
        size = (1, shape.local_tokens, heads, shape.head_dim)
        return torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)

    key_value_heads = shape.heads if lightning else shape.key_value_heads
    q, k, v = inputs = [normal(heads).requires_grad_() for heads in (shape.heads, key_value_heads, key_value_heads)]
    rates, scale, traffic = torch.tensor(slopes, device=device), shape.head_dim**-0.5, Traffic()
    attention: Callable[[], Tensor]
    if world == 1:
        attention = (
            partial(lightning_attention, q, k, v, rates)
            if lightning
            else partial(softmax_attention, q, k, v, scale=scale)
        )
        return _Layer(attention, inputs, normal(shape.heads), traffic)
    layout, group = SequenceLayout.dense(world=world, rank=rank, rows=1, tokens=shape.tokens), dist.group.WORLD
    assert group is not None, "the pool has initialised torch.distributed"
    if lightning:
        context = LightningContext(group, slopes, method=method, traffic=traffic)
        attention = lambda: context.start(q, k, v, rates, layout)()  # noqa: E731
    else:
        ring = {"scale": scale, "group": group, "layout": layout, "method": method, "traffic": traffic}
        attention = partial(ring_attention, q, k, v, **ring)
    return _Layer(attention, inputs, normal(shape.heads), traffic)


def _window(layer: _Layer, passes: int) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass: means of `passes` in a row after a barrier and, if they are
    short, one that does not count."""
    if passes > 1:
        layer.one_pass()
    dist.barrier()
    platform.synchronize()
    marks = [layer.one_pass()[0] for _ in range(passes)]
    platform.synchronize()
    forward, backward = (sum(_between(m[i], m[i + 1]) for m in marks) / passes for i in (0, 1))
    return forward, backward


def _mark() -> Any:
    """A point in the main queue of the device, or in time on CPU."""
    if not platform.is_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    return first.elapsed_time(second) / 1e3 if platform.is_cuda() else second - first


class _Done:
    """The work of what was never sent."""

    def wait(self) -> None:
        pass


@contextmanager
def supplied() -> Iterator[None]:
    """Meanwhile this process sends and receives nothing: what would arrive is a copy of what it would have sent, else random. (A copy
    on this device takes about a tenth of the time of a message over NVLink.)"""

    @torch.no_grad()
    def messages(operations: list[dist.P2POp]) -> list[_Done]:
        sent = [o.tensor for o in operations if o.op is dist.isend]
        for operation in operations:
            if operation.op is dist.irecv:
                like = next((x for x in sent if x.shape == operation.tensor.shape), None)
                operation.tensor.normal_(std=RECEIVED_STD) if like is None else operation.tensor.copy_(like)
        return [_Done()] if operations else []

    @torch.no_grad()
    def gather(output: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> _Done:
        output.unflatten(0, (group.size(), -1)).copy_(x[None])
        return _Done()

    @torch.no_grad()
    def scatter(output: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        output.copy_(x.unflatten(0, (group.size(), -1))[group.rank()])

    with patch.multiple(dist, batch_isend_irecv=messages, all_gather_into_tensor=gather, reduce_scatter_tensor=scatter):
        yield


def link_speeds(rank: int, world: int, sizes: list[int], repeats: int) -> list[Link]:
    """Seconds of a shift to the next rank, an all-gather and a reduce-scatter, `sizes` bytes from each rank to each that it sends to;
    mean of `repeats` in a row."""
    group = dist.group.WORLD
    assert group is not None, "the pool has initialised torch.distributed"
    links = []
    for size in sizes:
        x = torch.ones(size // 2, device=platform.device(), dtype=torch.bfloat16)
        whole = x.new_zeros(world * len(x))
        operations: dict[str, tuple[int, Callable[[], Any]]] = {
            "shift": (size, partial(_shift, x, whole[: len(x)], group)),
            "all_gather": ((world - 1) * size, partial(dist.all_gather_into_tensor, whole, x, group=group)),
            "reduce_scatter": ((world - 1) * size, partial(dist.reduce_scatter_tensor, x, whole, group=group)),
        }
        for name, (sent_bytes, operation) in operations.items():
            for _ in range(2):
                operation()
            dist.barrier()
            platform.synchronize()
            start = _mark()
            for _ in range(repeats):
                operation()
            end = _mark()
            platform.synchronize()
            links.append(Link(name, sent_bytes, _between(start, end) / repeats))
    return links


def _shift(x: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
    after, before = (dist.get_global_rank(group, (group.rank() + step) % group.size()) for step in (1, -1))
    operations = [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, received, before, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
