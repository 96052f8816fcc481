"""Cross-entropy fused with the vocabulary-parallel head, a chunk of tokens at a time."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.model.split_products import linear_gradients_, parts, product_

__all__ = ["logit_logprobs", "vocab_parallel_nll"]


def vocab_parallel_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_tokens: int,
    weight_parts: int = 1,
) -> Tensor:
    """Negative log-likelihood [b, s] of `labels` in nats and weight's dtype, without the logits of more than `chunk_tokens` tokens.

    hidden: [s, b, h], or [s / size, b, h] with sequence_parallel; any float type.  weight: [V / size, h], this rank's rows of the
    head.  labels: [b, s] int64.  group: the tensor-parallel ranks that hold the other rows; None for one rank.
    chunk_tokens: at most so many tokens (of all sequences, at least one of each rank's shard) have logits at the same time. Those of
    a million tokens over CP16 and TP8 of M1 would fill 6.1 GiB.  weight_parts: 1 multiplies in weight's type; 2 or 3 add up products of
    so many bf16 parts (split_products.py), weight and hidden being fp32 or hidden bf16, which is a part by itself.

    Gradients reach hidden and weight, whatever per-token gradient arrives. A single chunk keeps its probabilities for them. With
    more, the backward pass computes the logits of each chunk again, a fourth matrix product on top of three: taking the gradients
    in the forward pass would save it, but needs the gradient of every token's loss beforehand, which a policy loss does not have,
    and [s, b, h] of them until the backward pass. Sequence shards are gathered chunk by chunk, in their own type: 16-bit hidden
    states of 65,536 tokens would fill 0.75 GiB and their fp32 copies and gradients twice 1.5 GiB; the exchange (0.25 ms for 8,192
    tokens over NVLink) is short beside the fp32 product of a chunk (about 50 ms).

    Parts of weight are made in each pass and not kept: of M1 over TP8 three would fill 0.86 GiB all the time; making them moves 5.2 GB,
    about 1.2 ms beside 40 of products for 32,768 tokens.
    """
    batch, length = labels.shape
    shards = group.size() if sequence_parallel and group is not None else 1
    rows_per_chunk = max(1, chunk_tokens // (shards * batch))
    shard_labels = labels.t().reshape(shards, length // shards, batch)
    nll = _VocabParallelNLL.apply(hidden, weight, shard_labels, group, rows_per_chunk, weight_parts)
    return nll.view(length, batch).t().contiguous()


def logit_logprobs(logits: Tensor, tokens: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Log-probability [n] in nats of `tokens` [n] under `logits` [n, V / size], which are overwritten: the arithmetic of the loss."""
    _, total, chosen = _softmax_statistics_(logits, tokens, group)
    return chosen - total.log()


class _VocabParallelNLL(torch.autograd.Function):
    """labels, result: [shards, rows, b], rows being those of one rank's sequence shard; a chunk is a span of rows of all shards."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        rows_per_chunk: int,
        count: int,
    ) -> Tensor:
        shards, rows, _ = labels.shape
        spans = list(_spans(rows, rows_per_chunk))
        nll = torch.empty(labels.shape, dtype=weight.dtype, device=weight.device)
        log_sum = torch.empty_like(nll)
        columns = [part.t() for part in parts(weight, count)]
        buffer = _buffer(labels, spans, weight)
        for span in spans:
            part = labels[:, span]
            x = _gathered_parts(hidden[span], shards, group, weight, count)
            logits = product_(buffer[: len(x[0])], x, columns, count)
            largest, total, chosen = _softmax_statistics_(logits, part.flatten(), group)
            nll[:, span] = (total.log() - chosen).view_as(part)
            log_sum[:, span] = (total.log() + largest).view_as(part)
        probabilities = logits.div_(total.unsqueeze(-1)) if len(spans) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, labels, log_sum, probabilities)
        ctx.group, ctx.spans, ctx.count = group, spans, count
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum, probabilities = ctx.saved_tensors
        shards, count = labels.shape[0], ctx.count
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        rows = list(parts(weight, count))
        columns = [part.t() for part in rows]
        buffer = probabilities if probabilities is not None else _buffer(labels, ctx.spans, weight)
        for span in ctx.spans:
            x = _gathered_parts(hidden[span], shards, ctx.group, weight, count)
            grad_logits = buffer[: len(x[0])]
            if probabilities is None:
                product_(grad_logits, x, columns, count).sub_(log_sum[:, span].reshape(-1, 1)).exp_()
            local, is_local = _local_index(labels[:, span].flatten(), weight.shape[0], ctx.group)
            grad_logits[torch.arange(len(local), device=local.device), local] -= is_local.to(weight.dtype)
            grad_logits.mul_(grad_nll[:, span].reshape(-1, 1))
            grad_x = weight.new_empty(x[0].shape) if grad_hidden is not None else None
            linear_gradients_(grad_logits, x, rows, count, grad_x=grad_x, grad_weight=grad_weight, consume=True)
            if grad_hidden is not None and grad_x is not None:
                grad_hidden[span] = _reduce(grad_x, shards, ctx.group).view_as(grad_hidden[span])
        return grad_hidden, grad_weight, None, None, None, None


def _spans(rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Spans that cover `rows`, of nearly equal length and at most rows_per_chunk."""
    count = -(-rows // rows_per_chunk)
    length = -(-rows // count)
    return (slice(start, min(start + length, rows)) for start in range(0, rows, length))


def _buffer(labels: Tensor, spans: list[slice], weight: Tensor) -> Tensor:
    """Room for the logits of the first span, the longest."""
    return weight.new_empty(labels[:, spans[0]].numel(), len(weight))


def _softmax_statistics_(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, sum of exp(logits - m), logits[label] - m) over the whole vocabulary, m being the largest; [n] each.

    logits [n, V / size] are overwritten with exp(logits - m).
    """
    local, is_local = _local_index(labels, logits.shape[1], group)
    largest = logits.max(dim=-1).values
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(largest.unsqueeze(-1))
    chosen = logits.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~is_local, 0.0)
    sums = torch.stack([logits.exp_().sum(dim=-1), chosen])
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    return largest, sums[0], sums[1]


def _local_index(labels: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """(row of this rank's weight, 0 where another rank holds it; whether this rank holds it) for each label."""
    local = labels - (0 if group is None else group.rank() * rows)
    is_local = (local >= 0) & (local < rows)
    return local.masked_fill(~is_local, 0), is_local


def _gathered_parts(
    x: Tensor, shards: int, group: dist.ProcessGroup | None, weight: Tensor, count: int
) -> list[Tensor]:
    gathered = _gather(x, shards, group)
    return list(parts(gathered.to(weight.dtype) if count == 1 else gathered, count))


def _gather(x: Tensor, shards: int, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [n, b, h] of every sequence shard as [shards * n * b, h]."""
    flat = x.reshape(-1, x.shape[-1])
    if shards == 1:
        return flat
    gathered = flat.new_empty(shards * len(flat), flat.shape[1])
    dist.all_gather_into_tensor(gathered, flat, group=group)
    return gathered


def _reduce(x: Tensor, shards: int, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of x over the ranks; with sequence shards, the rows of this rank's."""
    if group is None or group.size() == 1:
        return x
    if shards == 1:
        dist.all_reduce(x, group=group)
        return x
    mine = x.new_empty(len(x) // shards, x.shape[1])
    dist.reduce_scatter_tensor(mine, x, group=group)
    return mine
