"""Rows of a tensor, as few copies as they need."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_m1.platform.transfer import upload

__all__ = ["Rows", "rows_of"]

type Rows = slice | Tensor
"""A slice where the rows are evenly spaced, so that taking them is a view."""


def rows_of(numbers: Sequence[int], device: torch.device) -> Rows:
    """The rows of these numbers, in this order."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and all(b - a == step for a, b in itertools.pairwise(numbers)):
        return slice(numbers[0], numbers[-1] + 1, step) if numbers else slice(0, 0)
    return upload(numbers, device)
