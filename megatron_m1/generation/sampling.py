"""Choice of the next token from logits whose vocabulary is spread over the tensor-parallel ranks."""

import hashlib
import struct
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.generation.requests import Sampling
from megatron_m1.platform.transfer import upload

__all__ = ["SamplingPlan", "gathered", "sample", "uniform"]

CANDIDATES = 256
"""Likeliest tokens of each rank among which a restricted draw is first looked for."""


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1), of 53 bits, for the token at `position` of the sequence with `seed`: nothing else counts."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(frozen=True)
class _Kind:
    """Rows that are drawn alike: `greedy`, from the `whole` softmax or a `restricted` one."""

    name: str
    rows: Tensor | None
    """int64, None for all rows."""
    temperature: Tensor
    """[m, 1] fp32."""
    top_p: Tensor
    """[m, 1] float64."""
    top_k: Tensor
    """[m, 1] int64; 0 for all."""


class SamplingPlan:
    """How each row of a batch draws, on its device: made once for as long as the same requests run."""

    def __init__(self, samplings: list[Sampling], device: torch.device) -> None:
        self.samplings = samplings
        members: dict[str, list[int]] = {"greedy": [], "whole": [], "restricted": []}
        for row, sampling in enumerate(samplings):
            restricted = sampling.top_p < 1.0 or sampling.top_k > 0
            members["greedy" if sampling.temperature == 0.0 else "restricted" if restricted else "whole"].append(row)
        self.kinds = [_kind(name, rows, samplings, device) for name, rows in members.items() if rows]


def _kind(name: str, rows: list[int], samplings: list[Sampling], device: torch.device) -> _Kind:
    chosen = [samplings[row] for row in rows]
    # A temperature that fp32 rounds to 0 would give 0 / 0 for the largest logit.
    temperature = upload([[max(s.temperature, 1e-38)] for s in chosen], device, dtype=torch.float32)
    top_p = upload([[s.top_p] for s in chosen], device, dtype=torch.float64)
    top_k = upload([[s.top_k] for s in chosen], device)
    return _Kind(name, None if len(rows) == len(samplings) else upload(rows, device), temperature, top_p, top_k)


def sample(logits: Tensor, numbers: Tensor, plan: SamplingPlan, group: dist.ProcessGroup) -> Tensor:
    """Next token [m] int64 of each row, the same on every rank of `group`.

    logits: [m, V / ranks] fp32, this rank's slice of the vocabulary. numbers: [m] float64 in [0, 1), which alone decide the
    draws. plan: of the m rows. temperature 0: the likeliest token (the lowest id of equals). Else a draw from
    softmax(logits / temperature), cut to the top_k likeliest, then to the fewest of those whose share of what is left sums to
    at least top_p (at least one; of equals the lower id stays). Masses are added in float64, row by row alike, so that only the
    rounding of the logits themselves tells layouts and batches apart. Waits for the device only where a draw is restricted.
    """
    chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for kind in plan.kinds:
        part = logits if kind.rows is None else logits.index_select(0, kind.rows)
        if kind.name == "greedy":
            tokens = _greedy(part, group)
        else:
            weights = _weights(part, kind.temperature, group)
            draw = numbers if kind.rows is None else numbers.index_select(0, kind.rows)
            tokens = (
                _draw_whole(weights, draw, group)
                if kind.name == "whole"
                else _draw_restricted(weights, draw, kind, group)
            )
        if kind.rows is None:
            chosen = tokens
        else:
            chosen.index_copy_(0, kind.rows, tokens)
    if group.size() > 1:
        # The ranks have equal numbers, but not every device sums equal numbers alike twice.
        dist.broadcast(chosen, src=dist.get_global_rank(group, 0), group=group)
    return chosen


def _greedy(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    best = logits.argmax(dim=-1)
    if group.size() == 1:
        return best
    value = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    best = best + group.rank() * logits.shape[-1]
    values, tokens = (gathered(x, group) for x in (value, best))
    # argmax takes any of equals; the ranks hold the ids in order, and the first of the equal ranks is wanted.
    first = (values == values.amax(dim=0)).to(torch.int8).argmax(dim=0, keepdim=True)
    return tokens.gather(0, first).squeeze(0)


def _weights(logits: Tensor, temperature: Tensor, group: dist.ProcessGroup) -> Tensor:
    """exp((logits - largest) / temperature), fp32."""
    largest = logits.amax(dim=-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return (logits - largest).div_(temperature).exp_()


def _draw_whole(weights: Tensor, numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    mass = weights.cumsum(dim=-1, dtype=torch.float64)
    totals = gathered(mass[:, -1], group)
    ends = totals.cumsum(dim=0)
    threshold = numbers * ends[-1]
    owner = (threshold >= ends).sum(dim=0)
    rank = group.rank()
    # Rounding may put the threshold at the very end of the owner's mass, where no token is.
    local = (threshold - (ends[rank - 1] if rank else 0.0)).minimum(torch.nextafter(totals[rank], totals.new_zeros(())))
    tokens = torch.searchsorted(mass, local.unsqueeze(-1), right=True).squeeze(-1) + rank * weights.shape[-1]
    if group.size() > 1:
        tokens = torch.where(owner == rank, tokens, -1)
        dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=group)
    return tokens


def _draw_restricted(weights: Tensor, numbers: Tensor, kind: _Kind, group: dist.ProcessGroup) -> Tensor:
    """Looks among the likeliest tokens of every rank: more of them, up to the whole vocabulary, until the cut lies inside."""
    device, local = weights.device, weights.shape[-1]
    vocabulary = local * group.size()
    total = gathered(weights.sum(dim=-1, dtype=torch.float64), group).sum(dim=0).unsqueeze(-1)
    top_p, top_k = kind.top_p, kind.top_k.masked_fill(kind.top_k == 0, vocabulary).clamp(max=vocabulary)
    count = min(CANDIDATES, local)
    while True:
        values, tokens, left_out = _candidates(weights, count, group)
        place = torch.arange(values.shape[-1], device=device)
        eligible = values.double().where(place < top_k, 0.0)
        mass = eligible.cumsum(dim=-1)
        target = top_p * torch.where(top_k < vocabulary, mass[:, -1:], total)
        kept = ((mass - eligible < target) & (place < top_k)).sum(dim=-1, keepdim=True).clamp(min=1)
        needed = torch.where(top_k < vocabulary, top_k, kept)
        inside = (needed <= len(place)) & (values.gather(-1, needed.clamp(max=len(place)) - 1) > left_out)
        missing = (~inside).any().to(torch.int32).reshape(1)
        if group.size() > 1:
            dist.all_reduce(missing, op=dist.ReduceOp.MAX, group=group)
        if count == local or not missing.item():
            break
        count = min(8 * count, local)
    threshold = numbers.unsqueeze(-1) * mass.gather(-1, kept - 1)
    chosen = torch.searchsorted(mass, threshold, right=True).minimum(kept - 1)
    return tokens.gather(-1, chosen).squeeze(-1)


def _candidates(weights: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and ids [m, ranks * count] of the `count` likeliest tokens of each rank: likeliest first, of equals the lower id.

    And [m, 1]: no token that a rank has left out weighs more. -1 if all are there.
    """
    local = weights.shape[-1]
    if count == local:
        values, tokens = weights, torch.arange(local, device=weights.device).expand_as(weights)
        left_out = weights.new_full((len(weights), 1), -1.0)
    else:
        values, tokens = weights.topk(count, dim=-1)
        left_out = values[:, -1:].contiguous()
        tokens, order = tokens.sort(dim=-1)
        values = values.gather(-1, order)
    if group.size() > 1:
        values = gathered(values, group).movedim(0, 1).flatten(1)
        tokens = gathered(tokens + group.rank() * local, group).movedim(0, 1).flatten(1)
        dist.all_reduce(left_out, op=dist.ReduceOp.MAX, group=group)
    # Ids rise along the row, so that a stable sort leaves the lower one of equals in front.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order), left_out


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: x of every rank."""
    if group.size() == 1:
        return x.unsqueeze(0)
    out = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=group)
    return out
