"""What each rank of the context-parallel benchmark does; `RankPool` calls these functions."""

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
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from benchmarks.context_formulas import Method, Shape
from benchmarks.worker import current_rss
from megatron_m1 import platform
from megatron_m1.config.schema import Config
from megatron_m1.parallel.lightning_context import LightningContext
from megatron_m1.parallel.lightning_exchange import StateExchange
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.state_chain import state_chains
from megatron_m1.parallel.traffic import Traffic

__all__ = [
    "Memory",
    "Sent",
    "all_to_all_sent",
    "exchange_bytes",
    "layer_seconds",
    "softmax_attention_bytes",
    "training_memory",
    "wire",
]


@dataclass
class Sent:
    """Bytes that a rank sent for one layer: what the layer's own counter says, and what was handed to torch.distributed."""

    forward: int
    backward: int
    wire_forward: int
    wire_backward: int
    neighbour_heads: int = 0
    """Of a forward exchange of lightning states: heads that the horizon kept to the neighbouring chunk, summed over messages."""


class Wire:
    """Bytes handed to torch.distributed since the last `take`."""

    def __init__(self) -> None:
        self.sent = 0

    def take(self) -> int:
        sent, self.sent = self.sent, 0
        return sent


@contextmanager
def wire() -> Iterator[Wire]:
    """Counts what this process sends meanwhile: messages, and collectives as their ring algorithm sends them."""
    counted = Wire()
    batch, gather, scatter = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    core = mappings.torch.distributed  # on CPU a view of it, see platform/cpu.py
    swap = core.all_to_all_single

    def counting_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        counted.sent += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
        return batch(operations)

    def counting_gather(
        output: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        counted.sent += (group.size() - 1) * x.nbytes
        return gather(output, x, group=group, async_op=async_op)

    def counting_scatter(output: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
        counted.sent += (group.size() - 1) * output.nbytes
        return scatter(output, x, group=group)

    def counting_swap(
        output: Tensor,
        x: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> dist.Work | None:
        assert group is not None and output_split_sizes is None and input_split_sizes is None, "equal parts are counted"
        counted.sent += x.nbytes // group.size() * (group.size() - 1)
        return swap(output, x, group=group)

    with (
        patch.object(core, "all_to_all_single", counting_swap),
        patch.object(dist, "batch_isend_irecv", counting_batch),
        patch.object(dist, "all_gather_into_tensor", counting_gather),
        patch.object(dist, "reduce_scatter_tensor", counting_scatter),
    ):
        yield counted


def exchange_bytes(rank: int, world: int, shape: Shape, slopes: list[float], method: Method, limit: bool) -> Sent:
    """The exchange of a lightning layer's states: that of a sequence of any length, since its tokens need not exist."""
    layout = SequenceLayout.dense(world=world, rank=rank, rows=1, tokens=shape.tokens)
    chains, traffic = state_chains(layout, torch.device("cpu")), Traffic()
    exchange = StateExchange(
        chains,
        torch.tensor(slopes),
        host_slopes=slopes,
        group=dist.group.WORLD,
        method=method,
        limit=limit,
        traffic=traffic,
    )
    with wire() as counted:
        states = torch.ones(len(chains.leaving), shape.heads, shape.head_dim, shape.head_dim, requires_grad=True)
        entered = exchange.finish(exchange.start(states))
        forward, near, wire_forward = traffic.forward, traffic.neighbour_heads, counted.take()
        entered.sum().backward()
        return Sent(forward, traffic.backward, wire_forward, counted.take(), near)


def softmax_attention_bytes(rank: int, world: int, shape: Shape, method: Method) -> Sent:
    """Attention of a softmax layer, computed; shape.item 2: in bf16, 4: fp32."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.item]
    q, k, v = _inputs(shape, shape.key_value_heads, dtype)
    layout = SequenceLayout.dense(world=world, rank=rank, rows=1, tokens=shape.tokens)
    traffic = Traffic()
    with wire() as counted:
        out = ring_attention(q, k, v, scale=0.1, group=dist.group.WORLD, layout=layout, method=method, traffic=traffic)
        wire_forward = counted.take()
        out.sum().backward()
        return Sent(traffic.forward, traffic.backward, wire_forward, counted.take())


def all_to_all_sent(rank: int, world: int, shape: Shape) -> Sent:
    """Megatron-Core's exchange of q, k, v from a share of the tokens to a share of the heads, and of o the way back, as its SSM layers
    call it (ssm/mamba_context_parallel.py). Attention, which sends nothing, is a sum here; core has no counter of its own."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.item]
    with wire() as counted:
        q, k, v = (
            mappings.all_to_all_sp2hp(x[0].flatten(1), group=dist.group.WORLD)
            for x in _inputs(shape, shape.key_value_heads, dtype)
        )
        groups = (k + v).view(shape.tokens, shape.key_value_heads // world, shape.head_dim)
        o = q + groups.repeat_interleave(shape.heads // shape.key_value_heads, 1).flatten(1)
        out = mappings.all_to_all_hp2sp(o, group=dist.group.WORLD)
        forward = counted.take()
        out.sum().backward()
        backward = counted.take()
    return Sent(forward, backward, forward, backward)


def layer_seconds(
    rank: int, world: int, shape: Shape, kind: str, method: Method, slopes: list[float], rounds: int
) -> dict[str, Any]:
    """Wall and CPU seconds by round of one layer's attention, forward and backward in fp32, after one that does not count; bytes
    that its counter has for one round. On one rank what the model runs there: no layout, no exchange."""
    forward, sent = _layer(rank, world, shape, kind, method, slopes)
    wall, cpu, before = [], [], 0
    for number in range(rounds + 1):
        before = sent()
        dist.barrier()
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        forward().sum().backward()
        dist.barrier()  # a step ends with the last rank
        if number:
            wall.append(time.perf_counter() - wall_start)
            cpu.append(time.process_time() - cpu_start)
    return {"wall_s": wall, "cpu_s": cpu, "sent_bytes": sent() - before}


def _layer(
    rank: int, world: int, shape: Shape, kind: str, method: Method, slopes: list[float]
) -> tuple[Callable[[], Tensor], Callable[[], int]]:
    """The forward pass, and what its counter has counted."""
    layout = SequenceLayout.dense(world=world, rank=rank, rows=1, tokens=shape.tokens) if world > 1 else None
    lightning = kind == "lightning"
    q, k, v = _inputs(shape, shape.heads if lightning else shape.key_value_heads, torch.float32)
    rates, scale = torch.tensor(slopes), shape.head_dim**-0.5
    if layout is None:
        alone: Callable[[], Tensor] = (
            partial(lightning_attention, q, k, v, rates)
            if lightning
            else partial(softmax_attention, q, k, v, scale=scale)
        )
        return alone, lambda: 0
    if lightning:
        context = LightningContext(dist.group.WORLD, slopes, method=method)
        return lambda: context.start(q, k, v, rates, layout)(), lambda: context.traffic.sent_bytes
    traffic = Traffic()
    attention = partial(
        ring_attention, q, k, v, scale=scale, group=dist.group.WORLD, layout=layout, method=method, traffic=traffic
    )
    return attention, lambda: traffic.sent_bytes


def _inputs(shape: Shape, key_value_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, shape.local_tokens, heads, shape.head_dim, generator=generator).to(dtype).requires_grad_()
        for heads in (shape.heads, key_value_heads, key_value_heads)
    ]


@dataclass
class Memory:
    """Of one rank of a training run, bytes."""

    imports: int
    """Resident before the run began."""
    peak: int
    seconds: float
    """Of the run, with building the model."""


def training_memory(rank: int, world: int, config: Config) -> Memory:
    """Runs `config` through the pretraining loop; call it in a process that has done nothing else."""
    import megatron_m1.checkpoint.native
    import megatron_m1.data.batches
    import megatron_m1.engine.trainer
    import megatron_m1.pretrain.evaluation  # noqa: F401
    from megatron_m1.pretrain.loop import train

    imports = current_rss()
    started = time.perf_counter()
    train(config)
    return Memory(imports, platform.peak_memory_bytes(), time.perf_counter() - started)
