"""What several operators ask of their arguments. Nothing here waits for a GPU: values are looked at on the CPU alone."""

import itertools
from collections.abc import Mapping

import torch

__all__ = ["check_devices", "check_slopes", "document_edges"]


def check_devices(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raises ValueError unless the tensors that are given lie on one device."""
    given = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(given.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"one call has tensors on several devices: {places}; move them to one device")


def check_slopes(slopes: torch.Tensor) -> None:
    """Raises ValueError for slopes on the CPU that would make states grow."""
    if slopes.device.type == "cpu" and not bool((slopes >= 0).all()):
        raise ValueError(
            f"slopes {slopes.tolist()} must be >= 0: a token decays a state by exp(-slope); negate the g_gamma of "
            "flash-linear-attention, which is -slope"
        )


def document_edges(cu_seqlens: torch.Tensor, tokens: int) -> tuple[int, ...]:
    """cu_seqlens [S+1] as integers, read on the host. Raises ValueError unless they rise from 0 to at most `tokens`."""
    edges = tuple(cu_seqlens.tolist())
    if edges[0] != 0 or edges[-1] > tokens or any(end < start for start, end in itertools.pairwise(edges)):
        raise ValueError(
            f"cu_seqlens={edges} must start at 0, never fall, and end at or before T={tokens}; "
            "pass cumulative document lengths"
        )
    return edges
