"""Choice of the next token."""

import hashlib

import torch
from torch import Tensor

__all__ = ["request_generator", "sample"]


def request_generator(seed: int, index: int) -> torch.Generator:
    """Random numbers (CPU) of request `index` alone: the same whatever runs beside it, and wherever."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Next token [m] int64 of each row of logits [m, V] fp32.

    temperature 0: the likeliest token (the lowest id of equals). Else a draw from softmax(logits / temperature), cut to the
    fewest likeliest tokens whose probabilities sum to at least top_p (at least one; of equals the lower id stays).
    uniform: [m] float64 in [0, 1), one number per row, which alone decides the draw. Computed in float64, row by row alike.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities = scaled.softmax(dim=-1)
    if top_p == 1.0:
        mass = probabilities.cumsum(dim=-1)
        threshold = uniform.unsqueeze(-1) * mass[:, -1:]
        return torch.searchsorted(mass, threshold, right=True).clamp(max=mass.shape[-1] - 1).squeeze(-1)
    probabilities, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    mass = probabilities.cumsum(dim=-1)
    kept = (mass - probabilities < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = uniform.unsqueeze(-1) * mass.gather(-1, kept - 1)
    chosen = torch.searchsorted(mass, threshold, right=True).minimum(kept - 1)
    return order.gather(-1, chosen).squeeze(-1)
