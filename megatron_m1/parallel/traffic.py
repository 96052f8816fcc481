"""What context parallelism sends, counted, and from which size on the ring is taken."""

import functools
import logging
from dataclasses import dataclass

__all__ = ["AUTO_RING_BYTES", "Traffic", "method_by_size"]

logger = logging.getLogger(__name__)

AUTO_RING_BYTES = 64 << 20
"""`auto` takes the ring where an all-gather would bring a rank more than this: about a millisecond of a 50 GB/s link."""


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
    """`method`, or for `auto`, which logs what it takes once, `ring` or `all_gather` by the bytes that the latter brings a rank.

    of: what is sent.
    """
    if method != "auto":
        return method
    chosen = "ring" if gathered_bytes > AUTO_RING_BYTES else "all_gather"
    _log_once(of, world, chosen)
    return chosen


@functools.cache
def _log_once(of: str, world: int, chosen: str) -> None:
    limit = AUTO_RING_BYTES >> 20
    logger.info("%s over %d context-parallel ranks: %s (auto: all_gather up to %d MiB)", of, world, chosen, limit)
