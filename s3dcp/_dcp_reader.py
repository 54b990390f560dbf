"""The reader for DCP: fetches the byte ranges of a load plan, and nothing else of the object.

Overlapping ranges are merged into *pieces*. A piece is received as a whole, because `torch.load`
jumps about in it (its directory is at the end), and dropped when the reader moves on to another
piece and no later use of it is planned. Reading a dropped piece again is right, only not free.

One request runs over as many wanted pieces as lie close together; those that it passes on the way
to the one being read are kept. So a plan in the order of its offsets, which is how DCP reads,
costs one request per cluster of ranges and the memory of one piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import SEEK_CUR, SEEK_SET
from typing import TYPE_CHECKING

from s3dcp._config import MiB
from s3dcp._errors import IntegrityError, S3ConfigError
from s3dcp._ranges import REQUEST_COST_BYTES
from s3dcp._readers import ObjectReader, check_size
from s3dcp._streams import ForwardReader, GetStreamCallable, ObjectInfoLike, blank, writable_view

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DEFAULT_MAX_GAP_SIZE = 32 * MiB

GUIDANCE = (
    "The DCP reader serves only what S3StorageReader.prepare_local_plan injects. For other "
    "accesses pass reader_constructor=S3ReaderConstructor.sequential() (or range_based())"
)


@dataclass(frozen=True, slots=True)
class ItemRange:
    """The bytes of one item of a plan: from `start` up to, not including, `end`."""

    start: int
    end: int


@dataclass(slots=True)
class _Piece:
    start: int
    end: int
    planned_uses: int = 0
    data: memoryview | None = None

    @property
    def wanted(self) -> bool:
        return self.data is None and self.planned_uses > 0


class DCPOptimizedS3Reader(ObjectReader):
    """Serves the injected ranges of an object, in any order, duplicates and overlaps included.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        item_ranges: What will be read, best in the order in which it will be. Ranges may be
            empty, repeated and overlapping.
        get_object_info: Not used; every constructor of a reader is given it.
        get_stream: Opens a range of the object.
        max_gap_size: The most bytes to read in vain to save a request. A ceiling: about 2.5 MB
            cost as much as a request, and more are never wasted. `float("inf")` is allowed.

    Raises:
        S3ConfigError: no bucket, key or ranges, a range that ends before it starts, or a
            negative `max_gap_size`.
        TypeError: `max_gap_size` is not a number.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        item_ranges: Sequence[ItemRange],
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
        max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    ) -> None:
        if not key:
            raise S3ConfigError("A reader needs a key")
        if not item_ranges:
            raise S3ConfigError(f"item_ranges must not be empty. {GUIDANCE}")
        check_max_gap_size(max_gap_size)
        self._max_gap_bytes = min(max_gap_size, REQUEST_COST_BYTES)
        self._pieces = _merge(item_ranges)
        self._starts = [piece.start for piece in self._pieces]
        self._current: _Piece | None = None
        # The request in flight: where it stands, where it ends, and the next piece it will meet.
        self._stream: ForwardReader | None = None
        self._stream_position = 0
        self._stream_end = 0
        self._stream_index = 0
        super().__init__(bucket, key, get_object_info, get_stream)

    def read(self, size: int | None = None) -> bytes:
        """Return exactly `size` bytes.

        Raises:
            TypeError: `size` is not an integer.
            ValueError: not all of the bytes were injected, `size` is None or negative (the whole
                object was not injected), or the reader is closed.
            S3Exception: the object could not be read.
        """
        self._check_open()
        check_size(size)
        if size is None or size < 0:
            raise self._refusal(f"read({size}) asks for the rest of the object")
        if size:
            self._locate(self._position, self._position + size)  # before memory is asked for
        memory = blank(size)
        with memory.getbuffer() as target:
            self._copy(target)
        return memory.getvalue()

    def readinto(self, buf: WriteableBuffer) -> int:
        """Fill `buf` and return its size.

        Raises:
            TypeError: `buf` is not writable.
            ValueError: not all of the bytes were injected, or the reader is closed.
            S3Exception: the object could not be read.
        """
        self._check_open()
        target = writable_view(buf)
        self._copy(target)
        return target.nbytes

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        """Move to a position in the object and return it.

        Raises:
            TypeError: `offset` is not an integer.
            ValueError: `whence` is not SEEK_SET or SEEK_CUR, the position is negative, or the
                reader is closed.
        """
        if whence not in (SEEK_SET, SEEK_CUR):
            raise self._refusal(f"seek(..., {whence!r}) is neither from the start nor relative")
        return super().seek(offset, whence)

    def _copy(self, target: memoryview) -> None:
        """Fill `target` from the position on and move there, if all of it was injected."""
        if not target.nbytes:
            return
        position, end = self._position, self._position + target.nbytes
        index = self._locate(position, end)
        while position < end:
            piece = self._visit(index)
            assert piece.data is not None
            count = min(end, piece.end) - position
            offset = position - piece.start
            target[:count] = piece.data[offset : offset + count]
            target = target[count:]
            position += count
            index += 1
        self._position = end

    def _locate(self, start: int, end: int) -> int:
        """Return the index of the piece that holds `start`; adjoining ones hold the rest."""
        first = bisect_right(self._starts, start) - 1
        reach, index = start, max(first, 0)
        while reach < end and index < len(self._pieces):
            piece = self._pieces[index]
            if not piece.start <= reach < piece.end:
                break
            reach = piece.end
            index += 1
        if reach < end:
            near = self._pieces[max(first, 0) : first + 2]
            shown = ", ".join(f"{piece.start}-{piece.end}" for piece in near) or "all empty"
            raise self._refusal(
                f"Bytes {start}-{end} are not in the injected ranges (the nearest: {shown})"
            )
        return first

    def _visit(self, index: int) -> _Piece:
        """Return a piece with its data, letting go of the one before."""
        piece = self._pieces[index]
        if piece is not self._current:
            last, self._current = self._current, piece
            if last is not None:
                last.planned_uses -= 1
                if last.planned_uses <= 0:
                    last.data = None
        if piece.data is None:
            self._load(index)
        return piece

    def _load(self, index: int) -> None:
        """Receive a piece, and on the way to it those that will be wanted later."""
        target = self._pieces[index]
        if not (
            self._stream_index <= index
            and target.end <= self._stream_end
            and target.start - self._stream_position <= self._max_gap_bytes
        ):
            self._open(index)
        assert self._stream is not None
        try:
            for piece in self._pieces[self._stream_index : index + 1]:
                if piece is target or piece.wanted:
                    self._receive(self._stream, piece)
        except BaseException:
            self._release_stream()
            raise
        self._stream_index = index + 1
        if self._stream_position >= self._stream_end:
            self._release_stream()

    def _open(self, index: int) -> None:
        """Send the request for a piece and the wanted ones around it."""
        self._release_stream()
        target = self._pieces[index]
        first = index
        for before in range(index - 1, -1, -1):
            if target.start - self._pieces[before].start > self._max_gap_bytes:
                break
            if self._pieces[before].wanted:
                first = before
        end = target.end
        for after in range(index + 1, len(self._pieces)):
            if self._pieces[after].start - end > self._max_gap_bytes:
                break
            if self._pieces[after].wanted:
                end = self._pieces[after].end
        start = self._pieces[first].start
        self._stream = ForwardReader(self._get_stream(start, end))
        self._stream_position, self._stream_end, self._stream_index = start, end, first

    def _receive(self, stream: ForwardReader, piece: _Piece) -> None:
        self._stream_position += stream.skip(piece.start - self._stream_position)
        data = blank(piece.end - piece.start).getbuffer()
        if self._stream_position == piece.start:
            self._stream_position += stream.fill(data)
        if self._stream_position < piece.end:
            raise IntegrityError(
                f"s3://{self._bucket}/{self._key} ends at byte {self._stream_position}, but its "
                f"checkpoint's metadata has an item in bytes {piece.start}-{piece.end}: load "
                "an older checkpoint",
                bucket=self._bucket,
                key=self._key,
            )
        piece.data = data

    def _clamp(self, target: int) -> int:
        # Where the object ends is not known, and only the injected ranges can be read anyway.
        return target

    def _release(self) -> None:
        self._release_stream()
        self._current = None
        for piece in self._pieces:
            piece.data = None

    def _release_stream(self) -> None:
        stream, self._stream = self._stream, None
        self._stream_position = self._stream_end = 0
        if stream is not None:
            stream.close()

    def _refusal(self, what: str) -> S3ConfigError:
        return S3ConfigError(
            f"{what}, in s3://{self._bucket}/{self._key}. {GUIDANCE}",
            bucket=self._bucket,
            key=self._key,
        )


def check_max_gap_size(max_gap_size: object) -> None:
    """Refuse a gap size that is no number or negative.

    Raises:
        TypeError: it is not a number.
        S3ConfigError: it is negative, or NaN.
    """
    if not isinstance(max_gap_size, int | float):
        raise TypeError(f"max_gap_size must be a number, not {type(max_gap_size).__name__}")
    if not max_gap_size >= 0:
        raise S3ConfigError(f"max_gap_size must not be negative, got {max_gap_size}")


def _merge(ranges: Sequence[ItemRange]) -> list[_Piece]:
    """Return the union of ranges as pieces by offset, with how often each will be visited."""
    for item in ranges:
        if not 0 <= item.start <= item.end:
            raise S3ConfigError(f"Not a range of bytes: {item.start}-{item.end}")
    pieces: list[_Piece] = []
    for item in sorted(ranges, key=lambda item: item.start):
        if pieces and item.start < pieces[-1].end:
            pieces[-1].end = max(pieces[-1].end, item.end)
        elif item.start < item.end:
            pieces.append(_Piece(item.start, item.end))
    starts = [piece.start for piece in pieces]
    last = -1
    for item in ranges:
        if item.start == item.end:
            continue
        index = bisect_right(starts, item.start) - 1
        # Uses in a row cannot be told apart when they happen: they are one visit.
        if index != last:
            pieces[index].planned_uses += 1
        last = index
    return pieces
