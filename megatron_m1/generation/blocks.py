"""Which blocks of the key/value pool are in use, and by how many sequences."""

import itertools

__all__ = ["BLOCK_TOKENS", "BlockPool", "block_runs", "blocks_for"]

BLOCK_TOKENS = 64


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens`."""
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """Reference counts of `size` blocks. Blocks are handed out in one run of neighbours where there is one."""

    def __init__(self, size: int) -> None:
        self._users = [0] * size
        self.size = self.free = size
        """Blocks that nobody uses."""

    def take(self, count: int) -> list[int]:
        """`count` free blocks, now used once; the caller has seen that `free` suffices."""
        assert count <= self.free, f"{count} blocks wanted, {self.free} free"
        free = [block for block, users in enumerate(self._users) if users == 0]
        taken = free[:count]
        for start in range(len(free) - count + 1) if count else ():
            if free[start + count - 1] - free[start] == count - 1:
                taken = free[start : start + count]
                break
        for block in taken:
            self._users[block] = 1
        self.free -= count
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more user of each of `blocks`."""
        for block in blocks:
            assert self._users[block], f"block {block} is free"
            self._users[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One user less of each of `blocks`."""
        for block in blocks:
            assert self._users[block], f"block {block} is free"
            self._users[block] -= 1
            self.free += self._users[block] == 0


def block_runs(blocks: list[int]) -> list[tuple[int, int]]:
    """(first block, number of blocks) of each run of neighbours in `blocks`, in order."""
    runs = []
    for _, run in itertools.groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        members = [block for _, block in run]
        runs.append((members[0], len(members)))
    return runs
