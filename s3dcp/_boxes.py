"""Parts of a tensor's index space: which pieces of shards make which piece of the whole.

All is in elements and in row-major order. Nothing here does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """The elements from `offsets` on, `sizes` of them in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many elements it holds."""
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index of each dimension."""
        return tuple(a + size for a, size in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """Return what both hold, or None if that is nothing."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(
            end - a for a, end in zip(offsets, map(min, self.ends, other.ends), strict=True)
        )
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def span_in(self, outer: Box) -> tuple[int, int]:
        """Return from where to where its elements lie among those of a box around it."""
        first = last = 0
        for a, end, origin, size in zip(
            self.offsets, self.ends, outer.offsets, outer.sizes, strict=True
        ):
            first = first * size + a - origin
            last = last * size + end - 1 - origin
        return first, last + 1


def slabs(shape: Sequence[int], first: int, last: int) -> Iterator[Box]:
    """Yield the fewest boxes whose elements are those from `first` up to `last`, in order.

    In each, at most one dimension is cut: those before it have one index, those behind it are
    whole. So what a slab shares with any box lies in one piece in that box's own memory.
    """
    if first >= last:
        return
    if not shape:
        yield Box((), ())
        return
    inner = shape[1:]
    row_count = math.prod(inner)
    (row, start), (end_row, rest) = divmod(first, row_count), divmod(last, row_count)
    if row == end_row:
        yield from _in_row(row, inner, start, rest)
        return
    if start:
        yield from _in_row(row, inner, start, row_count)
        row += 1
    if row < end_row:
        yield Box((row, *(0 for _ in inner)), (end_row - row, *inner))
    yield from _in_row(end_row, inner, 0, rest)


def _in_row(row: int, inner: Sequence[int], first: int, last: int) -> Iterator[Box]:
    for box in slabs(inner, first, last):
        yield Box((row, *box.offsets), (1, *box.sizes))


def fill(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Tell whether boxes fill a tensor: every element is in one of them, and in one only."""
    full = [box for box in boxes if box.count]
    if sum(box.count for box in full) != math.prod(shape):
        return False
    if any(
        a < 0 or end > size
        for box in full
        for a, end, size in zip(box.offsets, box.ends, shape, strict=True)
    ):
        return False
    # As many elements as there are: all of them, unless two boxes overlap. Along the dimension
    # that is cut most, few boxes lie at the same place.
    if not shape:
        return True
    axis = max(range(len(shape)), key=lambda axis: len({box.offsets[axis] for box in full}))
    near: list[Box] = []
    for box in sorted(full, key=lambda box: box.offsets[axis]):
        near = [other for other in near if other.ends[axis] > box.offsets[axis]]
        if any(box.overlap(other) for other in near):
            return False
        near.append(box)
    return True
