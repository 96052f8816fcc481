"""Matrix products of a decoding step: many weights, few rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from m1_kernels import route
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from megatron_m1.model.experts import EXACT_ROWS

__all__ = ["VECTOR_ELEMENTS", "Grouping", "invariant_rows", "product"]

SKINNY_ROWS = range(2, 9)
"""Rows for which MKL computes weight @ x^T up to twice as fast as x @ weight^T in fp32, the weight not being in the core's cache
(seen on an AMD EPYC, one thread)."""

VECTOR_ELEMENTS = 32
"""Torch's loops on CPU take 16 or 32 fp32 elements at a time and round what is left at a tensor's end otherwise."""


def product(x: Tensor, weight: Tensor, *, invariant: bool = False) -> Tensor:
    """x @ weight^T [n, N], contiguous, for x [n, K] and weight [N, K].

    invariant: a row has the same bits whatever the other rows are (CPU; n a multiple of EXACT_ROWS).
    """
    if invariant or x.is_cuda or x.dtype != torch.float32 or x.shape[0] not in SKINNY_ROWS:
        return linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


def invariant_rows(widths: Iterable[int]) -> int:
    """A divisor of the rows of passes on CPU whose rows have the same bits whatever the other rows are; widths: of their tensors."""
    return max(EXACT_ROWS, VECTOR_ELEMENTS // math.gcd(VECTOR_ELEMENTS, *widths))


@dataclass(frozen=True)
class Grouping:
    """n tokens with top_k experts each: n * top_k pairs, pair token * top_k + place, sorted by expert; behind the pairs of an expert there
    may be padding."""

    chosen: Tensor
    """[n, top_k], the likeliest expert first."""
    tokens: Tensor
    """[pairs], of the sorted pairs; any token for padding."""
    shares: Tensor
    """[pairs] fp32, of the sorted pairs."""
    places: Tensor
    """[n * top_k], where each pair stands among the sorted ones."""
    ends: Tensor
    """[experts] int32: where each expert's pairs, with their padding, end."""
    used: list[tuple[int, int]] | None
    """(expert, pairs) of those that have any, for one product each; None for a grouped one."""

    @classmethod
    def of(cls, logits: Tensor, top_k: int, *, invariant: bool = False) -> "Grouping":
        """For the router's logits [n, experts] fp32. On CUDA without a wait for the device. invariant: on CPU, with padding."""
        if logits.is_cuda:
            routed = route(logits, top_k)
            return cls(routed.experts, routed.tokens, routed.shares, routed.places, routed.ends, None)
        scores, chosen = logits.topk(top_k, dim=-1)
        experts, pairs = chosen.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=logits.shape[-1])
        rows, order = torch.arange(pairs.shape[0]), pairs
        if invariant:
            padded = (counts + (EXACT_ROWS - 1)) // EXACT_ROWS * EXACT_ROWS
            rows += ((padded - counts).cumsum(0) - (padded - counts))[experts]
            order, counts = pairs.new_zeros(int(padded.sum())).index_copy_(0, rows, pairs), padded
        places = torch.empty_like(pairs).index_copy_(0, pairs, rows)
        shares = scores.softmax(dim=-1).flatten().index_select(0, order)
        tokens = order.div(top_k, rounding_mode="floor")
        used = None if invariant else [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
        return cls(chosen, tokens, shares, places, counts.cumsum(0, dtype=torch.int32), used)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x @ weights[expert of the row]^T [pairs, N] for sorted rows x and weights [experts, N, K]."""
        if self.used is None:
            return grouped_mm(x, weights.transpose(1, 2), offs=self.ends)
        parts = x.split([count for _, count in self.used])
        return torch.cat([product(part, weights[expert]) for part, (expert, _) in zip(parts, self.used, strict=True)])

    def summed(self, x: Tensor) -> Tensor:
        """[n, N] from sorted rows x: the sum over each token's experts, in fixed order."""
        return x.index_select(0, self.places).view(*self.chosen.shape, -1).sum(dim=1)
