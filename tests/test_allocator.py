"""The caching allocator's arithmetic, worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""

import itertools
import random

import pytest

from peftlab.memory.allocator import BLOCK, LARGE, LARGE_SEGMENT, MIB, SMALL, SMALL_SEGMENT, Allocator


def counted(allocator, *sizes):
    return [allocator.take(size)[1] for size in sizes]


def freed(*sizes):
    """An allocator with these blocks, taken and given back."""
    allocator = Allocator()
    for block in [allocator.take(size)[0] for size in sizes]:
        allocator.give(block)
    return allocator


def test_sizes_are_rounded_to_512():
    assert counted(Allocator(), 0, 1, 512, 513, 1000, MIB) == [512, 512, 512, 1024, 1024, MIB]


@pytest.mark.parametrize(
    "size, segment",
    [
        (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (12 * MIB, 12 * MIB), (33 * MIB, 34 * MIB),
    ],
)  # fmt: skip
def test_what_the_driver_is_asked_for(size, segment):
    assert freed(size).reserved == segment


def test_small_tensors_share_segments_with_each_other_alone():
    allocator = freed(2 * MIB)
    counted(allocator, *[512] * 4096)
    assert allocator.reserved == LARGE_SEGMENT + SMALL_SEGMENT
    allocator.take(1)
    assert allocator.reserved == LARGE_SEGMENT + 2 * SMALL_SEGMENT


def test_a_large_remainder_is_split_off_only_above_a_mib():
    """Of 20 MiB: 9 are taken twice, and the last 2 are a remainder that splits off; of 10 MiB free, 9 leave just 1."""
    allocator = Allocator()
    assert counted(allocator, 9 * MIB, 9 * MIB, 2 * MIB) == [9 * MIB, 9 * MIB, 2 * MIB]
    assert allocator.reserved == 20 * MIB
    assert counted(freed(10 * MIB), 9 * MIB) == [10 * MIB]  # 1 MiB is no more than SMALL: the whole block counts
    allocator = freed(10 * MIB)
    assert counted(allocator, 9 * MIB - 512, MIB + 512) == [9 * MIB - 512, MIB + 512]
    assert allocator.reserved == 10 * MIB
    assert counted(Allocator(), 11 * MIB, 10 * MIB + 512) == [12 * MIB, 10 * MIB + 512]  # segments are rounded up


def test_the_smallest_block_that_is_enough_is_taken():
    allocator = freed(40 * MIB, 20 * MIB, 30 * MIB)
    assert counted(allocator, 20 * MIB, 25 * MIB, 40 * MIB) == [20 * MIB, 25 * MIB, 40 * MIB]
    assert allocator.reserved == 90 * MIB


def test_later_segments_have_lower_addresses_and_equal_blocks_go_lowest_first():
    allocator = Allocator()
    blocks = [allocator.take(16 * MIB)[0] for _ in range(3)]
    addresses = [b.address for b in blocks]
    assert addresses == sorted(addresses, reverse=True) and len(set(addresses)) == 3
    for block in blocks:
        allocator.give(block)
    assert [allocator.take(16 * MIB)[0].address for _ in range(3)] == sorted(addresses)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_free_neighbours_are_merged(order):
    allocator = Allocator()
    blocks = [allocator.take(6 * MIB)[0] for _ in range(3)]
    for i in order:
        allocator.give(blocks[i])
    assert counted(allocator, 20 * MIB) == [20 * MIB] and allocator.reserved == LARGE_SEGMENT


def test_segments_are_not_merged_with_each_other():
    allocator = freed(LARGE, LARGE)
    allocator.take(2 * LARGE)
    assert allocator.reserved == 4 * LARGE


def test_a_hole_between_live_blocks_is_too_small_for_more():
    allocator = Allocator()
    _, hole, _ = (allocator.take(6 * MIB)[0] for _ in range(3))
    allocator.give(hole)
    assert counted(allocator, 7 * MIB) == [7 * MIB] and allocator.reserved == 2 * LARGE_SEGMENT
    assert counted(allocator, 5 * MIB) == [6 * MIB] and allocator.reserved == 2 * LARGE_SEGMENT


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence(seed):
    """Live blocks do not overlap, what is reserved never shrinks, and blocks fill the segments without a gap."""
    draw, allocator, live, before = random.Random(seed), Allocator(), [], 0
    scales = draw.sample([700, 60_000, SMALL, 3 * MIB, LARGE, 70 * MIB], 3)
    for _ in range(600):
        if live and draw.random() < 0.48:
            allocator.give(live.pop(draw.randrange(len(live)))[0])
        else:
            size = draw.randint(1, draw.choice(scales))
            block, counts = allocator.take(size)
            assert size <= counts == block.size and counts % BLOCK == 0 and not block.free
            assert counts - size < BLOCK or (size > SMALL and counts - size <= SMALL + BLOCK)
            live.append((block, counts))
        assert allocator.reserved >= before
        before = allocator.reserved
    blocks = sorted(allocator._from.values(), key=lambda b: b.address)
    assert sum(b.size for b in blocks) == allocator.reserved
    assert {(b.size, b.address) for b in blocks if b.free} == {
        pair for pool in allocator._free.values() for pair in pool
    }
    assert sum(b.size for b in blocks if not b.free) == sum(n for _, n in live)
    for block, after in itertools.pairwise(blocks):
        end = block.address + block.size
        assert allocator._until[end] is block and end <= after.address
        assert not (end == after.address and block.free and after.free)
    for block, _ in live:
        allocator.give(block)
    sizes = {SMALL_SEGMENT, LARGE_SEGMENT}
    assert all(b.free and (b.size in sizes or b.size >= LARGE) for b in allocator._from.values())
    assert allocator.reserved == before
