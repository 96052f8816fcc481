"""What context parallelism sends, counted, and from which size on the ring is taken."""

from dataclasses import dataclass

__all__ = ["AUTO_RING_BYTES", "Traffic"]

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
