"""A keyed permutation of range(size) with random access and no table."""

import hashlib
import struct

__all__ = ["Permutation"]

ROUNDS = 6
MASK64 = (1 << 64) - 1


class Permutation:
    """permutation[i] for i in range(size): a pseudo-random bijection of range(size), a pure function of (key, size).

    Feistel network over the next even number of bits, walked along its cycle until the value is below size (at most
    four steps on average).  Source: Black and Rogaway, Ciphers with arbitrary finite domains, 2002.
    """

    def __init__(self, size: int, key: str) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.size = size
        self._half = ((size - 1).bit_length() + 1) // 2
        self._mask = (1 << self._half) - 1
        digest = hashlib.blake2b(f"{key}/{size}".encode(), digest_size=8 * ROUNDS).digest()
        self._keys = struct.unpack(f"<{ROUNDS}Q", digest)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside range({self.size})")
        while True:
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
            index = left << self._half | right
            if index < self.size:
                return index


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK64
    return value ^ value >> 31
