"""The reader for a few parts of a large object: a request per read, and a buffer for small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from s3dcp._config import MiB
from s3dcp._errors import S3ProtocolError
from s3dcp._readers import ObjectReader, check_size
from s3dcp._streams import ForwardReader, GetStreamCallable, ObjectInfoLike, blank, writable_view

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DEFAULT_BUFFER_SIZE = 8 * MiB


class RangedS3Reader(ObjectReader):
    """Makes a request per read; small reads are served from a buffer that a request fills.

    The choice for a few parts of a large object. Reads of `buffer_size` or more go past the
    buffer, straight into the caller's memory. See `ObjectReader` for the other arguments.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        get_object_info: Asks the store for the object's size, once.
        get_stream: Opens a range of the object.
        buffer_size: Bytes to fetch for a small read. Default: 8 MiB; 0: no buffer.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
        buffer_size: int | None = None,
    ) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        self._buffer_size = DEFAULT_BUFFER_SIZE if buffer_size is None else max(buffer_size, 0)
        self._buffer = memoryview(b"")
        self._buffer_start = 0
        self._buffer_end = 0

    def read(self, size: int | None = None) -> bytes:
        """Return up to `size` bytes, or the rest if it is None or negative; b'' at the end.

        Raises:
            TypeError: `size` is neither None nor an integer.
            ValueError: the reader is closed.
            S3Exception: the object could not be read.
        """
        self._check_open()
        check_size(size)
        if size == 0:
            return b""
        left = self._object_size() - self._position
        memory = blank(left if size is None or size < 0 else min(size, left))
        with memory.getbuffer() as view:
            self._read(view)
        return memory.getvalue()

    def readinto(self, buf: WriteableBuffer) -> int:
        """Fill `buf` as far as there are bytes and return their number.

        Raises:
            TypeError: `buf` is not writable.
            ValueError: the reader is closed.
            S3Exception: the object could not be read.
        """
        self._check_open()
        view = writable_view(buf)
        if not view.nbytes:
            return 0
        view = view[: self._object_size() - self._position]
        self._read(view)
        return view.nbytes

    def _read(self, view: memoryview) -> None:
        """Fill `view`, which ends inside of the object, and move on."""
        position = self._position
        if self._buffer_start <= position < self._buffer_end:
            offset = position - self._buffer_start
            count = min(view.nbytes, self._buffer_end - position)
            view[:count] = self._buffer[offset : offset + count]
            view, position = view[count:], position + count
        if view.nbytes >= max(self._buffer_size, 1):
            self._receive(view, position)
        elif view.nbytes:
            self._load_buffer(position)
            view[:] = self._buffer[: view.nbytes]
        self._position = position + view.nbytes

    def _load_buffer(self, start: int) -> None:
        size = min(self._buffer_size, self._object_size() - start)
        if self._buffer.nbytes < size:
            self._buffer = blank(size).getbuffer()
        # Holds nothing of use until the request has succeeded.
        self._buffer_start = self._buffer_end = 0
        self._receive(self._buffer[:size], start)
        self._buffer_start, self._buffer_end = start, start + size

    def _receive(self, view: memoryview, start: int) -> None:
        end = start + view.nbytes
        stream = ForwardReader(self._get_stream(start, end))
        try:
            count = stream.fill(view)
        finally:
            stream.close()
        if count < view.nbytes:
            raise S3ProtocolError(
                f"s3://{self._bucket}/{self._key} has {self._object_size()} bytes, but bytes "
                f"{start}-{end} ended after {count}: was it replaced?",
                operation="GetObject",
                bucket=self._bucket,
                key=self._key,
            )

    def _clamp(self, target: int) -> int:
        # Where the reader is lies inside of the object, and so does what comes before it.
        return target if target <= self._position else min(target, self._object_size())

    def _release(self) -> None:
        self._buffer = memoryview(b"")
        self._buffer_start = self._buffer_end = 0
