"""What context parallelism sends, counted, and how `auto` chooses by it."""

import functools
import logging
from dataclasses import dataclass

from megatron_m1.config.layout import AUTO_RING_BYTES, context_method

__all__ = ["AUTO_RING_BYTES", "Traffic", "method_by_size"]

logger = logging.getLogger(__name__)


@dataclass
class Traffic:
    """What this rank has sent, summed over calls."""

    forward: int = 0
    """Bytes in forward passes; of a collective, what its ring algorithm sends."""
    backward: int = 0
    messages: int = 0
    """To one rank; a collective counts as one."""
    chained_heads: int = 0
    """Heads of lightning layers, summed over exchanges, whose states travelled beyond the neighbouring chunk."""
    neighbour_heads: int = 0
    """Those that the horizon kept to the neighbouring chunk."""

    @property
    def sent_bytes(self) -> int:
        """Of both directions."""
        return self.forward + self.backward

    def count(self, sent_bytes: int, *, backward: bool, messages: int = 1) -> None:
        """Add messages of so many bytes together."""
        self.messages += messages
        if backward:
            self.backward += sent_bytes
        else:
            self.forward += sent_bytes


def method_by_size(method: str, gathered_bytes: int, *, of: str, world: int) -> str:
    """`context_method`, which for `auto` is logged once.

    of: what is sent.
    """
    chosen = context_method(method, gathered_bytes)
    if method == "auto":
        _log_once(of, world, chosen)
    return chosen


@functools.cache
def _log_once(of: str, world: int, chosen: str) -> None:
    limit = AUTO_RING_BYTES >> 20
    logger.info("%s over %d context-parallel ranks: %s (auto: all_gather up to %d MiB)", of, world, chosen, limit)
