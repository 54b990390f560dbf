"""How bytes are divided: parts of an upload, spans of a download, blocks of a checksum.

Nothing here does I/O. Ranges are half-open; HTTP's inclusive form exists in `_client` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from s3dcp._errors import S3ConfigError

MiB = 1 << 20
GiB = 1 << 30

# S3's limits: docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MIN_PART_BYTES = 5 * MiB
MAX_PART_BYTES = 5 * GiB
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = MAX_PARTS * MAX_PART_BYTES  # 48.8 TiB

# Objects up to this size are not worth the three requests of a multipart upload.
_SINGLE_PUT_BYTES = 8 * MiB
_PREFERRED_PART_BYTES = 32 * MiB

# A connection to S3 carries about 85 MB/s, and a first byte takes about 30 ms: reading on over a
# gap of this many bytes costs as much as the request that would skip it.
REQUEST_COST_BYTES = 2_550_000

#: Items from this size on have a CRC per block, so that a part of them can be verified.
BLOCKED_ITEM_BYTES = 4 * MiB
_MIN_BLOCK_BYTES = MiB
# A read of some rows is widened to the edges of two blocks. With 1,024 of them that is within 5 %
# for pieces from a 20th of the item on, for 8 KiB of metadata.
_MAX_BLOCKS = 1024

# A want of so many bytes is fetched by one request, where it may have so many.
_LEAST_CUT_BYTES = MiB

T = TypeVar("T")


def part_bytes(total_bytes: int, floor_bytes: int, wanted_bytes: int) -> int:
    """Choose the size of an upload's parts.

    Args:
        total_bytes: An estimate of the object's size; a low one costs larger parts later on.
        floor_bytes: The user's least part size.
        wanted_bytes: What the engine prefers on this link.

    Raises:
        S3ConfigError: a floor that S3 would refuse, or an object that S3 cannot hold.
    """
    if not MIN_PART_BYTES <= floor_bytes <= MAX_PART_BYTES:
        raise S3ConfigError(
            f"part_size must be between 5 MiB and 5 GiB for a multipart upload, got {floor_bytes}"
        )
    if total_bytes > MAX_OBJECT_BYTES:
        raise S3ConfigError(
            f"An object of {total_bytes} bytes is over S3's limit of {MAX_OBJECT_BYTES}: "
            "raise thread_count, so that a rank writes several objects"
        )
    # Estimates leave out zip headers; 2 % keeps them from running past the 10,000th part.
    least = -(-int(total_bytes * 1.02) // MAX_PARTS)
    return min(max(floor_bytes, wanted_bytes, -(-least // MiB) * MiB), MAX_PART_BYTES)


def upload_part_bytes(
    total_bytes: int, floor_bytes: int, connections: int, most_bytes: int = _PREFERRED_PART_BYTES
) -> int:
    """Choose the part size of an upload of about `total_bytes`.

    An object that fits into one part goes up in one request. Parts are as large as they can be
    with every connection having one to send, since a request costs about 1 ms of processor time
    by itself; past 32 MiB that no longer shows.

    Args:
        total_bytes: An estimate of the object's size.
        floor_bytes: The user's least part size.
        connections: How many parts may be under way at once.
        most_bytes: What a part should not be larger than, if the floor and S3's limits allow it.

    Raises:
        S3ConfigError: as `part_bytes`, for an object that needs several parts.
    """
    if total_bytes <= _SINGLE_PUT_BYTES:
        return max(floor_bytes, _SINGLE_PUT_BYTES)
    wanted = min(total_bytes // connections, _PREFERRED_PART_BYTES, most_bytes)
    return part_bytes(total_bytes, floor_bytes, -(-wanted // MiB) * MiB)


def span_bytes(total_bytes: int, floor_bytes: int, connections: int) -> int:
    """Choose the most that one request of a load of `total_bytes` may move.

    As for uploads: a request for every connection, and no larger than pays.
    """
    return max(floor_bytes, MiB, min(-(-total_bytes // connections), _PREFERRED_PART_BYTES))


def block_bytes(data_bytes: int, row_bytes: int) -> int:
    """Return the size of a tensor's checksum blocks, whole rows each; its own for a single one.

    Args:
        data_bytes: The tensor's size. Where it is 0, there are no blocks.
        row_bytes: The size of one index of its first dimension.
    """
    if data_bytes < BLOCKED_ITEM_BYTES:
        return data_bytes
    least = max(_MIN_BLOCK_BYTES, -(-data_bytes // _MAX_BLOCKS))
    return min(-(-least // row_bytes) * row_bytes, data_bytes)


def cut(start: int, end: int, size: int, origin: int = 0) -> Iterator[tuple[int, int]]:
    """Cut [start, end) at every multiple of `size` counted from `origin`."""
    while start < end:
        edge = min(end, start + size - (start - origin) % size)
        yield start, edge
        start = edge


@dataclass(slots=True)
class Fragment(Generic[T]):
    """Bytes that belong together, where they lie in the object, and whose they are."""

    view: memoryview
    start: int
    owner: T


class PartCutter(Generic[T]):
    """Cuts a rope of fragments into parts of one size; nothing is joined or copied.

    Equal sizes are S3's rule nowhere and R2's rule everywhere but in the last part.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._part: list[Fragment[T]] = []
        self._filled = 0
        self.position = 0

    def push(self, view: memoryview, owner: T) -> Iterator[list[Fragment[T]]]:
        """Append a fragment; yield the parts that it completes."""
        while view.nbytes:
            piece = view[: self.size - self._filled]
            view = view[piece.nbytes :]
            self._part.append(Fragment(piece, self.position, owner))
            self._filled += piece.nbytes
            self.position += piece.nbytes
            if self._filled == self.size:
                yield self._take()

    def rest(self) -> list[Fragment[T]]:
        """Return what is left, perhaps nothing, as the last part."""
        return self._take()

    def _take(self) -> list[Fragment[T]]:
        part, self._part, self._filled = self._part, [], 0
        return part


@dataclass(frozen=True, slots=True)
class Want(Generic[T]):
    """Bytes [start, end) of one object that someone needs."""

    start: int
    end: int
    owner: T


@dataclass(frozen=True, slots=True)
class Span(Generic[T]):
    """One ranged request: [start, end), and the pieces of wants that it carries.

    Pieces are in order and do not overlap; what lies between them is a gap that is read and
    dropped.
    """

    start: int
    end: int
    pieces: tuple[Want[T], ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that the request moves."""
        return self.end - self.start


def coalesce(
    wants: Iterable[Want[T]], *, max_gap: float, max_span: int, max_shared: float = math.inf
) -> list[Span[T]]:
    """Plan the requests that fetch every want of one object.

    Neighbours with a gap of at most `max_gap` between them, and no more than a request costs, are
    read as one run. A run is divided into the fewest spans, of nearly equal size: a span may end
    anywhere in a want of over a MiB, and between others. Wants that overlap are put in spans of
    their own, since a request's bytes go to one place only.

    Args:
        wants: In any order; empty ones are dropped.
        max_gap: Bytes that may be read in vain to save a request.
        max_span: Bytes of one request at most.
        max_shared: Wants of more bytes share no span with others.
    """
    max_gap = min(max_gap, REQUEST_COST_BYTES)
    spans: list[Span[T]] = []
    run: list[Want[T]] = []
    for want in sorted((w for w in wants if w.start < w.end), key=_bounds):
        if run and not (
            0 <= want.start - run[-1].end <= max_gap
            and max(_size(want), _size(run[-1])) <= max_shared
        ):
            spans += _divided(run, max_span)
            run = []
        run.append(want)
    return [*spans, *_divided(run, max_span)]


def _divided(run: Sequence[Want[T]], max_span: int) -> Iterator[Span[T]]:
    """Yield the spans of a run of wants."""
    if not run:
        return
    edges = iter([end for _, end in even_ranges(run[0].start, run[-1].end, max_span)])
    edge = next(edges)
    pieces: list[Want[T]] = []
    for want in run:
        start = want.start
        may_be_cut = _size(want) > min(max_span, _LEAST_CUT_BYTES)
        is_behind = start >= edge  # as the one before could not be cut
        if pieces and (is_behind or (not may_be_cut and want.end - pieces[0].start > max_span)):
            yield _span(pieces)
            pieces = []
        if is_behind:
            edge = next(each for each in edges if each > start)
        while may_be_cut and edge < want.end:
            yield _span([*pieces, Want(start, edge, want.owner)])
            pieces, start, edge = [], edge, next(edges)
        pieces.append(Want(start, want.end, want.owner))
    yield _span(pieces)


def _span(pieces: Sequence[Want[T]]) -> Span[T]:
    return Span(pieces[0].start, pieces[-1].end, tuple(pieces))


def _size(want: Want[T]) -> int:
    return want.end - want.start


def even_ranges(start: int, end: int, max_bytes: int) -> Sequence[tuple[int, int]]:
    """Divide [start, end) into the fewest ranges within `max_bytes`, of nearly equal size."""
    count = -(-(end - start) // max_bytes)
    edges = [start + (end - start) * n // count for n in range(count + 1)]
    return list(pairwise(edges))


def _bounds(want: Want[T]) -> tuple[int, int]:
    return want.start, want.end
