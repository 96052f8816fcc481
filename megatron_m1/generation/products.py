"""Matrix products of a decoding step: many weights, few rows."""

from dataclasses import dataclass

import torch
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
    """The n * top_k pairs of tokens and their experts, sorted by expert."""

    order: Tensor
    """[n * top_k] the pairs in that order; pair token * top_k + place."""
    tokens: Tensor
    """[n * top_k] their tokens."""
    ends: Tensor | None
    """[experts] int32, on the device: where each expert's pairs end."""
    used: list[tuple[int, int]]
    """On the host: (expert, pairs) of those that have any."""

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Grouping":
        """For the experts chosen [n, top_k]. On CUDA without a wait for the device."""
        top_k, flat = chosen.shape[1], chosen.flatten()
        if chosen.is_cuda:
            order = flat.argsort(stable=True)
            # Not bincount, which waits for the device.
            counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
            return cls(order, order // top_k, counts.cumsum(0, dtype=torch.int32), [])
        experts_of = flat.tolist()
        pairs = sorted(range(len(experts_of)), key=experts_of.__getitem__)
        used = [(expert, experts_of.count(expert)) for expert in sorted(set(experts_of))]
        return cls(torch.tensor(pairs), torch.tensor([pair // top_k for pair in pairs]), None, used)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x @ weights[expert of the row]^T [n * top_k, N] for sorted rows x and weights [experts, N, K]: one grouped kernel on CUDA,
        elsewhere one product per expert that has rows."""
        if self.ends is not None:
            return grouped_mm(x, weights.transpose(1, 2), offs=self.ends)
        parts = x.split([count for _, count in self.used])
        return torch.cat([product(part, weights[expert]) for part, (expert, _) in zip(parts, self.used, strict=True)])

    def summed(self, x: Tensor, tokens: int) -> Tensor:
        """[tokens, N] from sorted rows x: the sum over each token's experts, in fixed order."""
        if tokens > 1:
            x = torch.empty_like(x).index_copy_(0, self.order, x)
        return x.view(tokens, -1, x.shape[1]).sum(dim=1)
