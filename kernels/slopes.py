"""Decay rates of MiniMax-M1's lightning attention."""

import math

import torch

__all__ = ["slopes"]


def slopes(num_heads: int, layer_index: int, num_layers: int) -> torch.Tensor:
    """Decay rate of every head of one layer, float32 [num_heads]: a head's state shrinks by exp(-slope) per token.

    layer_index: 0-based position among all num_layers layers, softmax layers included.
    A model of one layer is treated as the first layer of a deeper one: factor 1 + 1e-5.
    Computed in double precision and rounded once. Raises ValueError for an index out of range.
    Source: MiniMax-M1 modeling_minimax_m1.py, `_build_slope_tensor` times `1 - l / (L - 1) + 1e-5`.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index={layer_index} must lie in 0..{num_layers - 1}; layers are counted from 0")
    factor = 1.0 - layer_index / max(num_layers - 1, 1) + 1e-5
    return torch.tensor([s * factor for s in alibi_slopes(num_heads)], dtype=torch.float64).float()


def alibi_slopes(num_heads: int) -> list[float]:
    """Geometric ALiBi slopes 2^(-8(h+1)/H); when H is no power of two, those of the next smaller power, then
    every second one of the next larger power (Press et al., arXiv 2108.12409)."""
    power = 2 ** int(math.log2(num_heads))
    geometric = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power == num_heads:
        return geometric
    return geometric + alibi_slopes(2 * power)[0::2][: num_heads - power]
