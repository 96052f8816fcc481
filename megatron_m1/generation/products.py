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
    if invariant or x.is_cuda or x.dtype != torch.float32 or len(x) not in SKINNY_ROWS:
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
    invariant: bool
    """No row of a product depends on the others."""
    ends: Tensor | None
    """[experts] int32, on the device: where each expert's pairs end."""
    used: list[tuple[int, int]]
    """On the host: (expert, pairs with padding) of those that have any."""

    @classmethod
    def of(cls, logits: Tensor, top_k: int, *, invariant: bool = False) -> "Grouping":
        """For the router's logits [n, experts] fp32. On CUDA without a wait for the device. invariant: on CPU, with padding."""
        if logits.is_cuda:
            routed = route(logits, top_k)
            return cls(routed.experts, routed.tokens, routed.shares, routed.places, False, routed.ends, [])
        scores, chosen = logits.topk(top_k, dim=-1)
        members: dict[int, list[int]] = {}
        for pair, expert in enumerate(chosen.flatten().tolist()):
            members.setdefault(expert, []).append(pair)
        order: list[int] = []
        used, places = [], [0] * chosen.numel()
        for expert in sorted(members):
            pairs = members[expert]
            for place, pair in enumerate(pairs, start=len(order)):
                places[pair] = place
            padding = -len(pairs) % EXACT_ROWS if invariant else 0
            order += pairs + [0] * padding
            used.append((expert, len(pairs) + padding))
        order_ids = torch.tensor(order)
        shares = scores.softmax(dim=-1).flatten().index_select(0, order_ids)
        tokens = order_ids.div(top_k, rounding_mode="floor")
        return cls(chosen, tokens, shares, torch.tensor(places), invariant, None, used)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x @ weights[expert of the row]^T [pairs, N] for sorted rows x and weights [experts, N, K]: one grouped kernel on CUDA,
        elsewhere one product per expert that has rows."""
        if self.ends is not None:
            return grouped_mm(x, weights.transpose(1, 2), offs=self.ends)
        parts = x.split([count for _, count in self.used])
        return torch.cat(
            [
                product(part, weights[expert], invariant=self.invariant)
                for part, (expert, _) in zip(parts, self.used, strict=True)
            ]
        )

    def summed(self, x: Tensor) -> Tensor:
        """[n, N] from sorted rows x: the sum over each token's experts, in fixed order."""
        return x.index_select(0, self.places).view(*self.chosen.shape, -1).sum(dim=1)
