"""Which tokens go to which experts, in the order that grouped products take."""

from typing import NamedTuple

import torch
from m1_kernels import triton_runtime
from m1_kernels.choice import Implementation, choose

__all__ = ["Routed", "route"]

MAX_TOKENS, MAX_EXPERTS = 1024, 1024


class Routed(NamedTuple):
    """n tokens with top_k experts each: n * top_k pairs, pair token * top_k + place, sorted by expert, then by pair."""

    experts: torch.Tensor
    """int64 [n, top_k], the likeliest first."""
    tokens: torch.Tensor
    """int64 [n * top_k], of the sorted pairs."""
    shares: torch.Tensor
    """fp32 [n * top_k], of the sorted pairs: softmax over a token's chosen experts."""
    places: torch.Tensor
    """int64 [n * top_k], where each pair stands among the sorted ones."""
    ends: torch.Tensor
    """int32 [E], where each expert's pairs end."""


@torch.no_grad()
def route(logits: torch.Tensor, top_k: int, *, implementation: str = "auto") -> Routed:
    """The top_k experts of each token, of equals any ("triton": the lower), for logits fp32 [n, E]. No gradients, no host
    synchronisation.

    implementation: "auto", "triton" (two launches, for the few tokens of a decoding step) or "torch".
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"logits {logits.dtype} {tuple(logits.shape)} must be float32 [n, E], top_k={top_k} in 1..E")
    return choose("route", ROUTE, implementation, logits).run(logits, top_k)


def _torch_route(logits: torch.Tensor, top_k: int) -> Routed:
    scores, experts = logits.topk(top_k, dim=-1)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    # Not bincount, which waits for the device.
    counts = flat.new_zeros(logits.shape[1]).scatter_add_(0, flat, torch.ones_like(flat))
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    shares = scores.softmax(dim=-1).flatten().index_select(0, order)
    return Routed(experts, order // top_k, shares, places, counts.cumsum(0, dtype=torch.int32))


def _triton_route(logits: torch.Tensor, top_k: int) -> Routed:
    from m1_kernels import triton_routing

    return Routed(*triton_routing.route(logits, top_k))


def _obstacle(logits: torch.Tensor) -> str | None:
    if logits.shape[0] > MAX_TOKENS or logits.shape[1] > MAX_EXPERTS:
        return f"a program looks at all pairs: at most {MAX_TOKENS} tokens and {MAX_EXPERTS} experts; use implementation='torch'"
    return triton_runtime.obstacle(logits)


ROUTE = {
    "triton": Implementation(_triton_route, _obstacle, "two small kernels", auto_on=("cuda",)),
    "torch": Implementation(_torch_route, lambda logits: None, "top-k and sort of PyTorch"),
}
