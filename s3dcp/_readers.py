"""Readers: one S3 object as a seekable binary stream. Here are their interface and the plain one.

`SequentialS3Reader` fetches the object once, from the front, and keeps it; the readers of parts
are in `_ranged_reader` and `_dcp_reader`. A reader belongs to one thread.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from io import SEEK_CUR, SEEK_END, SEEK_SET
from typing import TYPE_CHECKING

from s3dcp._errors import S3ConfigError
from s3dcp._streams import (
    GetStreamCallable,
    ObjectInfoLike,
    ObjectStream,
    close_stream,
    writable_view,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class S3Reader(ABC, io.BufferedIOBase):
    """The interface of every reader: a read-only, seekable stream over one object."""

    @property
    @abstractmethod
    def bucket(self) -> str:
        """The object's bucket."""

    @property
    @abstractmethod
    def key(self) -> str:
        """The object's key."""

    @abstractmethod
    def read(self, size: int | None = None) -> bytes:
        """Return up to `size` bytes, or the rest if it is None or negative; b'' at the end."""

    @abstractmethod
    def readinto(self, buf: WriteableBuffer) -> int:
        """Fill `buf` as far as there are bytes and return their number."""

    @abstractmethod
    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        """Move to a position, never beyond the object's end, and return it."""

    @abstractmethod
    def tell(self) -> int:
        """Return the position."""

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return False."""
        return False


class ObjectReader(S3Reader):
    """What the readers of this package share: identity, position, argument checks, closing.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        get_object_info: Asks the store for the object's size.
        get_stream: Opens a range of the object.

    Raises:
        S3ConfigError: no bucket.
    """

    # For `close`, which the garbage collector also calls on an instance that `__init__` refused.
    _ready = False

    def __init__(
        self,
        bucket: str,
        key: str,
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
    ) -> None:
        if not bucket:
            raise S3ConfigError("A reader needs a bucket")
        self._bucket = bucket
        self._key = key
        self._get_object_info = get_object_info
        self._get_stream = get_stream
        self._position = 0
        self._size: int | None = None
        self._ready = True

    @property
    def bucket(self) -> str:
        """The object's bucket."""
        return self._bucket

    @property
    def key(self) -> str:
        """The object's key."""
        return self._key

    def seek(self, offset: int, whence: int = SEEK_SET, /) -> int:
        """Move to a position and return it; beyond the end means at the end.

        Raises:
            TypeError: an argument is not an integer.
            ValueError: a position before the start, an unknown `whence`, or a closed reader.
            S3Exception: the store had to be asked, and failed.
        """
        self._check_open()
        if not isinstance(offset, int):
            raise TypeError(f"offset must be an integer, not {type(offset).__name__}")
        if not isinstance(whence, int):
            raise TypeError(f"whence must be an integer, not {type(whence).__name__}")
        if whence == SEEK_SET:
            target = offset
        elif whence == SEEK_CUR:
            target = self._position + offset
        elif whence == SEEK_END:
            target = self._object_size() + min(offset, 0)
        else:
            raise ValueError(f"whence must be SEEK_SET, SEEK_CUR or SEEK_END, got {whence}")
        if target < 0:
            raise ValueError(f"cannot seek to {target}, before the object's start")
        self._position = self._clamp(target)
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def close(self) -> None:
        """Give up the request in flight and drop all buffers."""
        if not self.closed:
            try:
                if self._ready:
                    self._release()
            finally:
                super().close()

    def _object_size(self) -> int:
        if self._size is None:
            self._size = self._get_object_info().size
        return self._size

    @abstractmethod
    def _clamp(self, target: int) -> int:
        """Return `target`, or the object's end if that comes first."""

    @abstractmethod
    def _release(self) -> None:
        """Drop what the reader holds."""

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"the reader of s3://{self._bucket}/{self._key} is closed")


class SequentialS3Reader(ObjectReader):
    """Fetches the object in one request, from the front, as far as it is read, and keeps it.

    The choice for objects that are read as a whole, for any access pattern; needs memory for the
    object. See `ObjectReader` for the arguments.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
    ) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        self._stream: ObjectStream | None = None
        self._buffer = io.BytesIO()
        self._buffered = 0
        self._complete = False

    def prefetch(self) -> None:
        """Send the request, if it has not been sent."""
        self._check_open()
        if self._stream is None and not self._complete:
            self._stream = self._get_stream()

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
        self._fetch(None if size is None or size < 0 else self._position + size)
        self._buffer.seek(self._position)
        data = self._buffer.read(size)
        self._position += len(data)
        return data

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
        self._fetch(self._position + view.nbytes)
        self._buffer.seek(self._position)
        count = self._buffer.readinto(view)
        self._position += count
        return count

    def _fetch(self, upto: int | None) -> None:
        """Buffer the object up to a position, or up to its end."""
        if self._complete or (upto is not None and upto <= self._buffered):
            return
        if self._size is not None and self._position >= self._size:
            return
        self.prefetch()
        assert self._stream is not None
        self._buffer.seek(self._buffered)
        try:
            while upto is None or self._buffered < upto:
                chunk = next(self._stream, None)
                if chunk is None:
                    self._complete = True
                    self._size = self._buffered
                    self._close_stream()
                    break
                self._buffered += self._buffer.write(chunk)
        except BaseException:
            # A stream that has failed looks like one that has ended: the next read starts over.
            self._release()
            raise

    def _clamp(self, target: int) -> int:
        if self._size is None:
            # What lies in between has to be fetched sooner or later; to ask for the size would be
            # a request of its own.
            self._fetch(target)
        return min(target, self._buffered if self._size is None else self._size)

    def _release(self) -> None:
        self._buffer = io.BytesIO()
        self._buffered = 0
        self._complete = False
        self._close_stream()

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            close_stream(stream)


def check_size(size: object) -> None:
    """Refuse an argument of `read` that is neither None nor an integer.

    Raises:
        TypeError: it is something else.
    """
    if size is not None and not isinstance(size, int):
        raise TypeError(f"size must be an integer or None, not {type(size).__name__}")
