"""CUDA's caching allocator as PyTorch has it (c10/cuda/CUDACachingAllocator.cpp), on one stream: which blocks it splits, keeps and gives back.

With expandable segments a pool is one range of addresses whose pages are mapped when they are needed, and unmapped when memory is short; without,
each segment is a piece of its own that a larger tensor can't use.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import torch

MIB, GIB = 2**20, 2**30
LEAST = 512  # bytes that sizes are rounded up to
SMALL = MIB  # up to here a tensor comes from the pool of small ones
PAGE = {True: 2 * MIB, False: 20 * MIB}  # what is mapped at once, by whether the pool is the small one's


class Block:
    """Bytes at an address: in use, free, or without memory behind them."""

    __slots__ = ("address", "asked", "before", "behind", "segment", "size", "small", "state")

    def __init__(self, address: int, size: int, segment: int, small: bool, state: str):
        self.address, self.size, self.segment, self.small, self.state = address, size, segment, small, state
        self.before: Block | None = None
        self.behind: Block | None = None
        self.asked = 0

    @property
    def key(self) -> tuple[int, int]:
        """Best fit first, lowest address among equals."""
        return self.size, self.address


class Allocator:
    """`capacity` bytes; `allocated` in tensors and `reserved` from the driver, with their peaks."""

    def __init__(self, capacity: float, expandable: bool):
        self.capacity, self.expandable = capacity, expandable
        self.free_blocks: dict[bool, list[Block]] = {True: [], False: []}
        self.unmapped: dict[bool, list[Block]] = {True: [], False: []}
        if expandable:  # two ranges that never meet
            for small in (True, False):
                self.unmapped[small] = [Block(PAGE[small] << 38, PAGE[small] << 30, 0, small, "unmapped")]
        self.segments = 0
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = self.full = 0

    def malloc(self, asked: int) -> Block:
        """A block of at least so many bytes; torch.OutOfMemoryError if there is no room."""
        size = max(LEAST, -(-asked // LEAST) * LEAST)
        small = size <= SMALL
        block = self._fitting(small, size) or self._grown(small, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._grown(small, size)
        if block is None:
            self.full += 1
            told = f"{self.allocated / GIB:.2f} GiB allocated, {self.reserved / GIB:.2f} reserved of {self.capacity / GIB:.2f}"
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked / MIB:.0f} MiB ({told}) [played]")
        left, block.state, block.asked = block.size - size, "used", asked
        if left >= LEAST if small or self.expandable else left > SMALL:
            self._keep(self._split(block, size, "used"))
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Puts a block back among the free ones, as one with its free neighbours."""
        self.allocated -= block.size
        self._keep(block)

    def empty_cache(self) -> None:
        """Gives back to the driver what it can: whole free segments, or pages that are free throughout."""
        for small, blocks in self.free_blocks.items():
            for block in list(blocks):
                if self.expandable:
                    self._unmap(block, PAGE[small])
                elif block.before is None and block.behind is None:
                    blocks.remove(block)
                    self.reserved -= block.size

    def reset_peaks(self) -> None:
        """From now on."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _fitting(self, small: bool, size: int) -> Block | None:
        blocks = self.free_blocks[small]
        at = bisect.bisect_left(blocks, (size, -1), key=lambda block: block.key)
        return blocks.pop(at) if at < len(blocks) else None

    def _grown(self, small: bool, size: int) -> Block | None:
        if self.expandable:
            return self._mapped(small, size)
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if not self._reserve(segment):
            return None
        self.segments += 1
        return Block(self.segments << 44, segment, self.segments, small, "used")

    def _reserve(self, size: int) -> bool:
        if self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _mapped(self, small: bool, size: int) -> Block | None:
        """The first place where free and unmapped blocks in a row have room, with memory behind all of it."""
        for unmapped in self.unmapped[small]:
            first = unmapped.before if unmapped.before is not None and unmapped.before.state == "free" else unmapped
            run = list(_row(first, size))
            if sum(block.size for block in run) < size:
                continue
            missing, pages = size - sum(block.size for block in run if block.state == "free"), PAGE[small]
            for block in [block for block in run if block.state == "unmapped"]:
                needs = min(block.size, -(-missing // pages) * pages)
                if not self._reserve(needs):
                    return None
                missing -= needs
                self.unmapped[small].remove(block)
                if needs < block.size:
                    rest = self._split(block, needs, "unmapped")
                    bisect.insort(self.unmapped[small], rest, key=lambda block: block.address)
                self._keep(block)
            return self._fitting(small, size)
        return None

    def _unmap(self, block: Block, page: int) -> None:
        start, end = -(-block.address // page) * page, (block.address + block.size) // page * page
        if end <= start:
            return
        self.free_blocks[block.small].remove(block)
        block.state = "unmapped"
        if start > block.address:
            head, block = block, self._split(block, start - block.address, "unmapped")
            self._keep(head)
        if block.address + block.size > end:
            self._keep(self._split(block, end - block.address, "free"))
        self.reserved -= block.size
        gone = self.unmapped[block.small]
        for other in [other for other in (block.before, block.behind) if other is not None and other.state == "unmapped"]:
            gone.remove(other)
            self._join(block, other)
        bisect.insort(gone, block, key=lambda block: block.address)

    def _split(self, block: Block, size: int, state: str) -> Block:
        rest = Block(block.address + size, block.size - size, block.segment, block.small, state)
        rest.before, rest.behind, block.size = block, block.behind, size
        if block.behind is not None:
            block.behind.before = rest
        block.behind = rest
        return rest

    def _keep(self, block: Block) -> None:
        block.state, blocks = "free", self.free_blocks[block.small]
        for other in (block.before, block.behind):
            if other is not None and other.state == "free":
                blocks.pop(bisect.bisect_left(blocks, other.key, key=lambda block: block.key))
                self._join(block, other)
        bisect.insort(blocks, block, key=lambda block: block.key)

    @staticmethod
    def _join(block: Block, other: Block) -> None:
        if other.address < block.address:
            block.address, block.before = other.address, other.before
            if other.before is not None:
                other.before.behind = block
        else:
            block.behind = other.behind
            if other.behind is not None:
                other.behind.before = block
        block.size += other.size


def _row(first: Block, size: int) -> Iterator[Block]:
    """Blocks one behind the other that aren't used, until they have room for `size`."""
    found, block = 0, first
    while found < size and block.state != "used":
        yield block
        found += block.size
        if block.behind is None:
            return
        block = block.behind
