"""PyTorch's CUDA caching allocator as arithmetic: what it counts as allocated, and what it reserves.

Source: c10/cuda/CUDACachingAllocator.cpp (kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc,
kRoundLarge), with its default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 2**20
BLOCK = 512
"""Every tensor is rounded up to this many bytes."""
SMALL = MIB
"""Tensors up to this size share segments of SMALL_SEGMENT; a remainder of more than this is split off a large block."""
SMALL_SEGMENT, LARGE_SEGMENT, LARGE, ROUND = 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


class Block:
    """A stretch of a segment, with its neighbours there."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small, self.free = address, size, small, False
        self.before: Block | None = None
        self.after: Block | None = None


class Allocator:
    def __init__(self) -> None:
        self.reserved = 0
        """Bytes taken from the driver so far. None are given back."""
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, Block] = {}
        self._end = 2**62
        """The driver hands out falling addresses, as seen on an H100; of equal blocks the lowest is taken first."""

    def take(self, size: int) -> tuple[Block, int]:
        """A block for `size` bytes, and the bytes that it counts for: `size` rounded up, or all where nothing was split off."""
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        small = size <= SMALL
        pool = self._free[small]
        i = bisect_left(pool, (size, 0))
        if i < len(pool):
            block = self._at[pool.pop(i)[1]]
            block.free = False
        else:
            block = self._segment(size, small)
        rest = block.size - size
        if rest >= BLOCK if small else rest > SMALL:
            self._split(block, size)
        return block, block.size

    def give(self, block: Block) -> None:
        """Takes a block back and joins it with its free neighbours."""
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                block = self._merged(block, neighbour)
        insort(self._free[block.small], (block.size, block.address))

    def _segment(self, size: int, small: bool) -> Block:
        whole = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
        self._end -= whole
        block = self._at[self._end] = Block(self._end, whole, small)
        self.reserved += whole
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = self._at[block.address + size] = Block(block.address + size, block.size - size, block.small)
        rest.free, rest.before, rest.after = True, block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        insort(self._free[rest.small], (rest.size, rest.address))

    def _merged(self, block: Block, free: Block) -> Block:
        pool = self._free[free.small]
        del pool[bisect_left(pool, (free.size, free.address))]
        first, second = (free, block) if free.address < block.address else (block, free)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        del self._at[second.address]
        first.free = True
        return first
