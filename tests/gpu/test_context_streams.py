"""What context parallelism does beside the main queue, on one GPU: ranks are threads, messages are late copies on a stream of their own.

Every result must have the bits of a run without other queues, in which each message waits for the whole device.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
import torch
from m1_kernels import slopes
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.parallel import lightning_exchange, ring_attention
from megatron_m1.parallel.attention_blocks import AttentionPlan
from megatron_m1.parallel.lightning_context import LightningContext, _spans
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.state_chain import state_chains
from megatron_m1.platform import streams

WORLD, TOKENS, HEADS, KEY_HEADS, WIDTH = 4, 512, 4, 2, 32
LATE = 1 << 22
"""Cycles that a message is held up: some milliseconds, far more than the work it overlaps with."""
WAIT_S = 60.0


@dataclass(eq=False)
class Message:
    """One copy from rank to rank, started when both ends are there."""

    source: Tensor | None = None
    target: Tensor | None = None
    queued: list = field(default_factory=list)
    under_way: threading.Event = field(default_factory=threading.Event)
    done: torch.cuda.Event | None = None


@dataclass
class End:
    """One end of a message. As torch's for NCCL it keeps its tensor until somebody waits, and no longer."""

    message: Message
    tensor: Tensor | None

    def wait(self) -> None:
        """Holds up the caller's queue until the copy is done, the caller until it has been queued."""
        assert self.message.under_way.wait(WAIT_S), "the other rank never came"
        if self.message.done is not None:
            self.message.done.wait()
        self.tensor = None


class Works(list):
    def wait(self) -> None:
        for work in self:
            work.wait()


@dataclass(frozen=True)
class Group:
    place: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return WORLD


class Network:
    """What the modules use of torch.distributed."""

    isend, irecv = "isend", "irecv"

    def __init__(self, *, late: bool) -> None:
        self.late, self.lock = late, threading.Lock()
        self.waiting: dict[tuple[int, int, str], deque[Message]] = defaultdict(deque)
        self.stream = torch.cuda.Stream() if platform.is_cuda() else None

    @staticmethod
    def get_global_rank(group: Group, rank: int) -> int:
        return rank

    @staticmethod
    def P2POp(kind: str, tensor: Tensor, peer: int, group: Group) -> tuple:
        return kind, tensor, peer, group

    def batch_isend_irecv(self, operations: list[tuple]) -> list[End]:
        return [self._end(kind, tensor, peer, group.rank()) for kind, tensor, peer, group in operations]

    def all_gather_into_tensor(self, out: Tensor, x: Tensor, group: Group, async_op: bool = False) -> Works:
        works = Works()
        for peer, part in enumerate(out.chunk(WORLD)):
            works += [self._end("isend", x, peer, group.rank()), self._end("irecv", part, peer, group.rank())]
        if not async_op:
            works.wait()
        return works

    def reduce_scatter_tensor(self, out: Tensor, x: Tensor, group: Group) -> None:
        parts, rank = [torch.empty_like(out) for _ in range(WORLD)], group.rank()
        sends = [self._end("isend", part, peer, rank) for peer, part in enumerate(x.chunk(WORLD))]
        Works(sends + [self._end("irecv", part, peer, rank) for peer, part in enumerate(parts)]).wait()
        torch.sum(torch.stack(parts), 0, out=out)

    def _end(self, kind: str, tensor: Tensor, peer: int, rank: int) -> End:
        """The second of the two ends starts the message."""
        source, target = (rank, peer) if kind == self.isend else (peer, rank)
        with self.lock:
            others = self.waiting[source, target, self.irecv if kind == self.isend else self.isend]
            message = others.popleft() if others else Message()
            if message.source is None and message.target is None:
                self.waiting[source, target, kind].append(message)
            if kind == self.isend:
                message.source = tensor
            else:
                message.target = tensor
            if self.stream is not None:
                message.queued.append(torch.cuda.current_stream().record_event())
            if message.source is not None and message.target is not None:
                self._start(message)
        return End(message, tensor)

    def _start(self, message: Message) -> None:
        assert message.source.shape == message.target.shape and message.source.dtype == message.target.dtype
        if self.stream is None:
            message.target.copy_(message.source)
        elif not self.late:
            torch.cuda.synchronize()
            message.target.copy_(message.source)
            torch.cuda.synchronize()
        else:
            with torch.cuda.stream(self.stream):
                for event in message.queued:
                    self.stream.wait_event(event)
                torch.cuda._sleep(LATE)
                message.target.copy_(message.source)
                message.done = self.stream.record_event()
        message.source = message.target = None
        message.under_way.set()


def on_every_rank(task: Callable[[int], list[Tensor]], *, late: bool) -> list[list[Tensor]]:
    """task(rank) of all ranks at the same time; not `late`: in one queue, every message complete before anything else goes on."""
    network = Network(late=late)

    def run(rank: int) -> list[Tensor]:
        # Backward passes of several threads would share the one thread that autograd has for a device, and wait for each other.
        with torch.autograd.set_multithreading_enabled(False):
            if not (platform.is_cuda() and late):
                return task(rank)
            main = torch.cuda.Stream()
            main.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(main):
                results = task(rank)
            main.synchronize()
            return results

    side = streams.side_stream if late else lambda: None
    with (
        patch.object(lightning_exchange, "dist", network),
        patch.object(ring_attention, "dist", network),
        patch.object(streams, "side_stream", side),
        ThreadPoolExecutor(WORLD) as pool,
    ):
        results = list(pool.map(run, range(WORLD), timeout=4 * WAIT_S))
    platform.synchronize()
    return results


LAYOUTS: dict[str, Callable[[int], SequenceLayout]] = {
    "dense": lambda rank: SequenceLayout.dense(world=WORLD, rank=rank, rows=1, tokens=TOKENS),
    "pack": lambda rank: SequenceLayout.pack(
        world=WORLD, rank=rank, cu_seqlens=[0, 1, 70, 200, 460, 500], tokens=TOKENS
    ),
}


def local(layout: SequenceLayout, heads: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Tensors [1, T/W, heads, WIDTH] of the whole sequence's, the same on every rank."""
    generator = torch.Generator().manual_seed(8)
    whole = [torch.randn(1, TOKENS, n, WIDTH, generator=generator).to(platform.device(), dtype) for n in heads]
    return [layout.partition(x, 1).contiguous() for x in whole]


def trash() -> None:
    """Memory that anything freed too early is given to, and overwritten."""
    for size in (1 << 10, 1 << 14, 1 << 18):
        for _ in range(8):
            torch.full((size,), float("nan"), device=platform.device())


def lightning(layout_of: Callable[[int], SequenceLayout], method: str) -> Callable[[int], list[Tensor]]:
    # The first head reaches no further than its neighbour; they are not in the order of their slopes.
    rates = torch.cat([slopes(HEADS - 1, 1, 8), torch.tensor([3.0])]).flip(0)

    def task(rank: int) -> list[Tensor]:
        layout = layout_of(rank)
        q, k, v, do = local(layout, (HEADS,) * 4, torch.float32)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        context = LightningContext(Group(rank), rates.tolist(), method=method)
        finish = context.start(*leaves, rates.to(platform.device()), layout)
        trash()
        o = finish()
        trash()
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    return task


def softmax(layout_of: Callable[[int], SequenceLayout], method: str) -> Callable[[int], list[Tensor]]:
    def task(rank: int) -> list[Tensor]:
        layout = layout_of(rank)
        q, k, v, do = local(layout, (HEADS, KEY_HEADS, KEY_HEADS, HEADS), torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o = ring_attention.ring_attention(*leaves, scale=0.2, group=Group(rank), layout=layout, method=method)
        trash()
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    return task


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", [lightning, softmax])
def test_late_messages_change_no_bit(attention, layout, method) -> None:
    platform.use_deterministic_algorithms(True)
    try:
        expected = on_every_rank(attention(LAYOUTS[layout], method), late=False)
        found = on_every_rank(attention(LAYOUTS[layout], method), late=True)
    finally:
        platform.use_deterministic_algorithms(False)
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, a, b in zip(("o", "dq", "dk", "dv"), ours, theirs, strict=True):
            assert a.isfinite().all() and torch.equal(a, b), (rank, name)


@pytest.mark.skipif(not platform.is_cuda(), reason="without queues nothing can be missed")
def test_a_wait_that_is_left_out_is_noticed() -> None:
    task = lightning(LAYOUTS["dense"], "all_gather")
    expected = on_every_rank(task, late=False)
    with patch.object(End, "wait", lambda self: self.message.under_way.wait(WAIT_S)):
        found = on_every_rank(task, late=True)
    same = [torch.equal(a, b) for ours, theirs in zip(found, expected) for a, b in zip(ours, theirs)]
    assert not all(same)


@pytest.mark.skipif(not platform.is_cuda(), reason="there is nothing to wait for")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_made_of_a_layout_reaches_the_device_without_a_wait(layout) -> None:
    of_rank, device = LAYOUTS[layout](1), platform.device()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chains = state_chains(of_rank, device)
        for chosen in (chains.leaving, chains.entering):
            _spans(of_rank, chosen, device)
        AttentionPlan.of(of_rank, device)
        of_rank.cu_seqlens(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
