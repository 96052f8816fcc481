"""Matrix products of a decoding step: many weights, few rows."""

from dataclasses import dataclass

import torch
from m1_kernels import route
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

__all__ = ["Grouping", "product"]

SKINNY_ROWS = range(2, 17)
"""Rows for which MKL computes weight @ x^T up to twice as fast as x @ weight^T in fp32 (seen on an AMD EPYC, one thread)."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T [n, N], contiguous, for x [n, K] and weight [N, K]."""
    if x.is_cuda or x.dtype != torch.float32 or len(x) not in SKINNY_ROWS:
        return linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


@dataclass(frozen=True)
class Grouping:
    """n tokens with top_k experts each: n * top_k pairs, pair token * top_k + place, sorted by expert."""

    chosen: Tensor
    """[n, top_k], the likeliest expert first."""
    tokens: Tensor
    """[n * top_k], of the sorted pairs."""
    shares: Tensor
    """[n * top_k] fp32, of the sorted pairs."""
    places: Tensor
    """[n * top_k], where each pair stands among the sorted ones."""
    ends: Tensor | None
    """[experts] int32, on the device: where each expert's pairs end."""
    used: list[tuple[int, int]]
    """On the host: (expert, pairs) of those that have any."""

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> "Grouping":
        """For the router's logits [n, experts] fp32. On CUDA without a wait for the device."""
        if logits.is_cuda:
            routed = route(logits, top_k)
            return cls(routed.experts, routed.tokens, routed.shares, routed.places, routed.ends, [])
        scores, chosen = logits.topk(top_k, dim=-1)
        experts = chosen.flatten().tolist()
        order = sorted(range(len(experts)), key=experts.__getitem__)
        tokens, order_ids = torch.tensor([[pair // top_k for pair in order], order])
        places = torch.empty_like(order_ids).index_copy_(0, order_ids, torch.arange(len(order)))
        shares = scores.softmax(dim=-1).flatten().index_select(0, order_ids)
        used = [(expert, experts.count(expert)) for expert in sorted(set(experts))]
        return cls(chosen, tokens, shares, places, None, used)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x @ weights[expert of the row]^T [n * top_k, N] for sorted rows x and weights [experts, N, K]: one grouped kernel on CUDA,
        elsewhere one product per expert that has rows."""
        if self.ends is not None:
            return grouped_mm(x, weights.transpose(1, 2), offs=self.ends)
        parts = x.split([count for _, count in self.used])
        return torch.cat([product(part, weights[expert]) for part, (expert, _) in zip(parts, self.used, strict=True)])

    def summed(self, x: Tensor) -> Tensor:
        """[n, N] from sorted rows x: the sum over each token's experts, in fixed order."""
        return x.index_select(0, self.places).view(*self.chosen.shape, -1).sum(dim=1)
