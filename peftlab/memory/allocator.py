"""PyTorch's CUDA caching allocator as arithmetic: what it counts as allocated, and what it reserves.

Source: c10/cuda/CUDACachingAllocator.cpp (kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc,
kRoundLarge), with its default settings.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
BLOCK = 512
"""Every tensor is rounded up to this many bytes."""
SMALL = MIB
"""Tensors up to this size share segments of SMALL_SEGMENT; a remainder of more than this is split off a large block."""
SMALL_SEGMENT, LARGE_SEGMENT, LARGE, ROUND = 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


@dataclass(slots=True)
class Block:
    """A stretch of a segment."""

    address: int
    size: int
    small: bool
    free: bool = False


class Allocator:
    def __init__(self) -> None:
        self.reserved = 0
        """Bytes taken from the driver so far. None are given back."""
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._from: dict[int, Block] = {}
        self._until: dict[int, Block] = {}
        """Blocks by their first address, and by the one after their last: neighbours."""
        self._end = 2**62
        """The driver hands out falling addresses, as seen on an H100; of equal blocks the lowest is taken first."""

    def take(self, size: int) -> tuple[Block, int]:
        """A block for `size` bytes, and the bytes that it counts for: `size` rounded up, or all where nothing was split off."""
        size = max(BLOCK, -(-size // BLOCK) * BLOCK)
        small = size <= SMALL
        pool = self._free[small]
        i = bisect_left(pool, (size, 0))
        if i < len(pool):
            block = self._from[pool.pop(i)[1]]
        else:
            whole = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
            self.reserved += whole
            self._end -= whole + BLOCK  # a gap, so that segments are no neighbours
            block = self._place(Block(self._end, whole, small))
        block.free, rest = False, block.size - size
        if rest >= BLOCK if small else rest > SMALL:
            block.size = size
            self._place(block)
            self.give(self._place(Block(block.address + size, rest, small)))
        return block, block.size

    def give(self, block: Block) -> None:
        """Takes a block back and joins it with its free neighbours."""
        pool = self._free[block.small]
        for other in (self._until.get(block.address), self._from.get(block.address + block.size)):
            if other is not None and other.free:
                del pool[bisect_left(pool, (other.size, other.address))]
                first, second = (other, block) if other.address < block.address else (block, other)
                del self._from[second.address], self._until[second.address]
                first.size += second.size
                block = self._place(first)
        block.free = True
        insort(pool, (block.size, block.address))

    def _place(self, block: Block) -> Block:
        self._from[block.address] = self._until[block.address + block.size] = block
        return block
