"""Matrix products of a decoding step: many weights, few rows."""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

__all__ = ["grouped_product", "product"]

SKINNY_ROWS = range(2, 17)
"""Rows for which MKL computes weight @ x^T up to twice as fast as x @ weight^T in fp32 (seen on an AMD EPYC, one thread)."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T [n, N], contiguous, for x [n, K] and weight [N, K]."""
    if x.is_cuda or x.dtype != torch.float32 or len(x) not in SKINNY_ROWS:
        return linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


def grouped_product(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """x @ weights[g]^T [n, N] for the counts[g] rows of x [n, K] that belong to group g, group after group; weights [G, N, K].

    One grouped kernel on CUDA, without a look at the counts; elsewhere one product per group that has rows.
    """
    if x.is_cuda:
        return grouped_mm(x, weights.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    used = [(group, count) for group, count in enumerate(counts.tolist()) if count]
    parts = x.split([count for _, count in used])
    return torch.cat([product(part, weights[group]) for part, (group, _) in zip(parts, used, strict=True)])
