"""Causal softmax attention over a sequence that context-parallel ranks hold in zig-zag order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from m1_kernels.softmax_blocks import check_shapes
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.parallel.attention_blocks import (
    AttentionPlan,
    attend,
    attend_backward,
    attend_locally,
    attend_locally_backward,
)
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.sequence_params import KeptAttention
from megatron_m1.parallel.traffic import Traffic
from megatron_m1.platform.transfer import upload

__all__ = ["METHODS", "ring_attention"]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    group: dist.ProcessGroup,
    layout: SequenceLayout,
    method: str = "ring",
    kept: KeptAttention | None = None,
    traffic: Traffic | None = None,
) -> Tensor:
    """o [B, T/W, Hq, D], in the dtype of q: this rank's rows of causal attention over the sequence of all W ranks of `group`.

    q [B, T/W, Hq, D]; k, v [B, T/W, Hkv, D], Hkv dividing Hq: the tokens that `layout` gives this rank. Documents of a pack do
    not see each other; padding behind them is one more document. Differentiable. Blocks of keys are merged by their
    log-sum-exp, and gradients summed, in fp32 (fp64 for fp64) and in a fixed order.
    method: "ring": keys and values go from rank to rank, W-1 hops, while the rank computes with those it has; in the backward
        pass their gradients follow one step behind, in fp32. Memory for two blocks of keys and values.
        "all_gather": all keys and values at once, gradients by a reduce-scatter. Memory for T keys and values.
    Either way each rank does the same work in a dense batch: what causality hides is not computed.
    kept: where gradients are disabled, as in the forward pass of a checkpoint, is given the result; where they are enabled, as when
        that pass is repeated on the same q, k and v, the result is taken from there, if there is one, and not computed again.
    traffic: is added the bytes that this rank sends.
    Raises ValueError for another method, for heads that break the above, and where q, group and layout disagree.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if (group.size(), group.rank()) != (layout.world, layout.rank):
        raise ValueError(
            f"layout of rank {layout.rank} of {layout.world} does not fit the group, where this is rank {group.rank()} of {group.size()}"
        )
    rows = 1 if layout.packed else layout.rows
    if q.shape[:2] != (rows, layout.local_tokens) or k.shape != v.shape or k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must begin with the layout's [{rows}, {layout.local_tokens}]"
        )
    check_shapes(q, k, v, causal=True)
    again = torch.is_grad_enabled()
    return _Attention.apply(q, k, v, _Call(METHODS[method], scale, group, layout, traffic or Traffic()), kept, again)


class _Method(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    """(call, q, k, v) -> o in fp32 (fp64) and its log-sum-exp."""
    backward: Callable[..., tuple[Tensor, Tensor]]
    """(call, do, q, k, v, o, lse) -> dq and [dk, dv], likewise."""


@dataclass(frozen=True)
class _Call:
    method: _Method
    scale: float
    group: dist.ProcessGroup
    layout: SequenceLayout
    traffic: Traffic


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, call: _Call, kept: KeptAttention | None, again: bool):
        result = kept.take() if kept is not None and again else None
        if result is None:
            o, lse = call.method.forward(call, q, k, v)
            result = o.to(q.dtype), lse
        if kept is not None and not again:
            kept.put(*result)
        ctx.save_for_backward(q, k, v, *result)
        ctx.call = call
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, *_ = ctx.saved_tensors
        dq, dkv = ctx.call.method.backward(ctx.call, do, *ctx.saved_tensors)
        return dq.to(q.dtype), *dkv.to(k.dtype), None, None, None


def _ring_forward(call: _Call, q, k, v):
    layout, plan = call.layout, AttentionPlan.of(call.layout, q.device)
    kv = torch.stack([k, v])
    shift = _Shift(call.group, kv) if layout.world > 1 else None
    o, lse = attend_locally(q, k, v, scale=call.scale, plan=plan)
    for step in range(1, layout.world):
        kv = shift.wait()
        call.traffic.count(kv.nbytes, backward=False)
        shift = _Shift(call.group, kv) if step + 1 < layout.world else None
        block = plan.by_rank[(layout.rank - step) % layout.world]
        if block is not None:
            attend(o, lse, block, q, *kv, scale=call.scale)
    return o, lse


def _ring_backward(call: _Call, do, q, k, v, o, lse):
    group, plan, world = call.group, AttentionPlan.of(call.layout, q.device), call.layout.world
    kv = torch.stack([k, v])
    shift = _Shift(group, kv) if world > 1 else None
    dq, own_dkv = attend_locally_backward(do, q, k, v, o, lse, scale=call.scale, plan=plan)
    gradients = None
    for step in range(1, world):
        kv = shift.wait()
        call.traffic.count(kv.nbytes + own_dkv.nbytes, backward=True, messages=2)
        shift = _Shift(group, kv) if step + 1 < world else None
        block, dkv = plan.by_rank[(call.layout.rank - step) % world], torch.zeros_like(own_dkv)
        if block is not None:
            attend_backward(dq, dkv, block, do, q, kv[0], kv[1], o, lse, scale=call.scale)
        if gradients is not None:
            dkv += gradients.wait()
        # After the last step it is the own gradient that comes home.
        gradients = _Shift(group, dkv)
    if gradients is not None:
        own_dkv += gradients.wait()
    return dq, own_dkv


def _gather_forward(call: _Call, q, k, v):
    plan = AttentionPlan.of(call.layout, q.device)
    gathered, work = _start_gather(torch.stack([k, v]), call.group)
    call.traffic.count(gathered[1:].nbytes, backward=False)
    o, lse = attend_locally(q, k, v, scale=call.scale, plan=plan)
    work.wait()
    kv = _global_rows(gathered, call.layout)
    for block in plan.gathered:
        attend(o, lse, block, q, *kv, scale=call.scale)
    return o, lse


def _gather_backward(call: _Call, do, q, k, v, o, lse):
    layout, plan = call.layout, AttentionPlan.of(call.layout, q.device)
    gathered, work = _start_gather(torch.stack([k, v]), call.group)
    dq, own_dkv = attend_locally_backward(do, q, k, v, o, lse, scale=call.scale, plan=plan)
    work.wait()
    kv = _global_rows(gathered, layout)
    dkv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
    for block in plan.gathered:
        attend_backward(dq, dkv, block, do, q, kv[0], kv[1], o, lse, scale=call.scale)
    order = layout.memo(("by rank", dkv.device), lambda: upload(layout.indices.flatten(), dkv.device))
    by_rank = dkv.index_select(2, order).unflatten(2, (layout.world, -1))
    received = torch.empty_like(own_dkv)
    dist.reduce_scatter_tensor(received, by_rank.movedim(2, 0).flatten(0, 1), group=call.group)
    call.traffic.count(gathered[1:].nbytes + (layout.world - 1) * received.nbytes, backward=True, messages=2)
    own_dkv += received
    return dq, own_dkv


METHODS = {"ring": _Method(_ring_forward, _ring_backward), "all_gather": _Method(_gather_forward, _gather_backward)}


class _Shift:
    """x on its way to the next rank of the group, and that of the rank before on its way here."""

    def __init__(self, group: dist.ProcessGroup, x: Tensor) -> None:
        self.sent, self.received = x, torch.empty_like(x)
        rank, world = group.rank(), group.size()
        after, before = (dist.get_global_rank(group, (rank + step) % world) for step in (1, -1))
        send = dist.P2POp(dist.isend, self.sent, after, group)
        receive = dist.P2POp(dist.irecv, self.received, before, group)
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _start_gather(kv: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """([W, 2, B, T/W, Hkv, D] to be filled, the work that fills it)."""
    gathered = kv.new_empty(group.size(), *kv.shape)
    # gloo takes its result concatenated along the first dimension only
    return gathered, dist.all_gather_into_tensor(gathered.flatten(0, 1), kv, group=group, async_op=True)


def _global_rows(gathered: Tensor, layout: SequenceLayout) -> Tensor:
    """[2, B, T, Hkv, D] in the order of the global row from [W, 2, B, T/W, Hkv, D]."""
    return layout.unpartition(gathered.movedim(0, 2).flatten(2, 3), 2)
