"""What is done while messages of context parallelism travel, and when a rank waits for them."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.parallel import attention_blocks, lightning_context
from megatron_m1.parallel.lightning_context import LightningContext
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.parallel.sequence_layout import SequenceLayout


class Noted:
    """A message or collective under way, whose wait is an event."""

    def __init__(self, work: dist.Work, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        if self.events[-1:] != ["wait"]:
            self.events.append("wait")
        self.work.wait()


class NotedBackward(torch.autograd.Function):
    """x; its backward is an event."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, events: list[str]) -> Tensor:
        ctx.name, ctx.events = name, events
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.name)
        return gradient, None, None


def noted(events: list[str]) -> ExitStack:
    """`events` takes "send" (messages or a collective are started), "work" (attention of tokens) and "wait", in order."""
    batch, gather = dist.batch_isend_irecv, dist.all_gather_into_tensor

    def start(operations):
        events.append("send")
        return [Noted(work, events) for work in batch(operations)]

    def start_gather(*tensors, **options):
        events.append("send")
        return Noted(gather(*tensors, **options), events)

    def work(function):
        def run(*args, **options):
            events.append("work")
            result = function(*args, **options)
            return NotedBackward.apply(result, "work", events) if isinstance(result, Tensor) else result

        return run

    stack = ExitStack()
    stack.enter_context(patch.multiple(dist, batch_isend_irecv=start, all_gather_into_tensor=start_gather))
    for module, name in (
        (lightning_context, "lightning_attention"),
        (attention_blocks, "softmax_attention_forward"),
        (attention_blocks, "softmax_attention_backward"),
    ):
        stack.enter_context(patch.object(module, name, work(getattr(module, name))))
    return stack


def order(rank: int, world: int, kind: str, method: str) -> tuple[str, str]:
    """Events of the forward and of the backward pass of one layer."""
    layout = SequenceLayout.dense(world=world, rank=rank, rows=1, tokens=4 * world)
    device = platform.device()
    q, k, v, x = (torch.randn(1, 4, 2, 4, device=device, requires_grad=True) for _ in range(4))
    events: list[str] = []
    with noted(events):
        if kind == "lightning":
            context = LightningContext(dist.group.WORLD, [0.1, 0.2], method=method)
            finish = context.start(q, k, v, torch.tensor([0.1, 0.2], device=device), layout)
            gate = NotedBackward.apply(x, "gate", events)
            events.append("gate")
            o = finish() * gate
        else:
            o = ring_attention(q, k, v, scale=0.5, group=dist.group.WORLD, layout=layout, method=method)
        forward, events[:] = " ".join(events), []
        o.sum().backward()
        return forward, " ".join(events)


EXPECTED = {
    # The chain of states is joined when the work inside the chunks is queued; the output gate is computed meanwhile.
    ("lightning", "ring", 2): ("send work gate wait send wait", "send gate work wait send wait"),
    ("lightning", "all_gather", 2): ("send gate wait work", "work send gate wait"),
    # Keys and values of the next hop are under way before those at hand are worked on; gradients follow.
    ("softmax", "ring", 3): (
        "send work wait send work wait work",
        "send work wait send work send wait work wait send wait",
    ),
    ("softmax", "all_gather", 2): ("send work wait work", "send work wait work"),
}


@pytest.mark.parametrize(("kind", "method", "world"), EXPECTED)
def test_what_is_under_way_when(kind, method, world, ranks) -> None:
    found = ranks(world, order, kind, method)[0]
    assert found == EXPECTED[kind, method, world]
