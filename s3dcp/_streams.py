"""Object bytes as streams: what a reader is fed from, and the writer that feeds an upload.

A store hands every reader a `get_stream(start, end)` and every writer an `UploadSink`. These two
protocols are all that the file-like classes know of S3, so tests script them in memory.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from s3dcp._calls import Call
from s3dcp._config import MiB
from s3dcp._errors import IncompleteSaveError

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer

_logger = logging.getLogger("s3dcp.streams")

_SKIP_BYTES = 1 * MiB


class ObjectInfoLike(Protocol):
    """What a reader may ask of an object without reading it."""

    @property
    def size(self) -> int:
        """The object's size in bytes."""


class ObjectStream(Protocol):
    """The bytes of one range of an object, in order, as chunks of any length.

    A stream may also have `readinto(buffer) -> int`, which fills as much of `buffer` as it can
    straight from the network and returns 0 at the end; it is then used instead of the chunks.
    """

    def __iter__(self) -> Iterator[ReadableBuffer]:
        """Return the stream itself."""

    def __next__(self) -> ReadableBuffer:
        """Return the next chunk. It may be overwritten by the one after it."""

    def close(self) -> None:
        """Give up what has not been read.

        Readers call it from whichever thread drops them, the garbage collector's included: it
        must not wait for the I/O thread.
        """


class GetStreamCallable(Protocol):
    """Opens the bytes of an object from `start` up to, not including, `end`.

    `None` stands for the object's own start or end.
    """

    def __call__(self, start: int | None = None, end: int | None = None) -> ObjectStream:
        """Open the range."""


class ForwardReader:
    """The bytes of one stream taken by count instead of by chunk."""

    __slots__ = ("_readinto", "_rest", "_stream")

    def __init__(self, stream: ObjectStream) -> None:
        self._stream = stream
        self._readinto = getattr(stream, "readinto", None)
        # What the last chunk held beyond what was asked for.
        self._rest = memoryview(b"")

    def fill(self, view: memoryview) -> int:
        """Fill `view` and return how many bytes there were: fewer only at the stream's end."""
        filled = 0
        while filled < view.nbytes:
            count = self._take(view[filled:])
            if not count:
                break
            filled += count
        return filled

    def skip(self, count: int) -> int:
        """Read and forget `count` bytes; return how many there were."""
        scratch = memoryview(bytearray(min(count, _SKIP_BYTES)))
        skipped = 0
        while skipped < count:
            step = scratch[: count - skipped]
            filled = self.fill(step)
            skipped += filled
            if filled < step.nbytes:
                break
        return skipped

    def close(self) -> None:
        """Close the stream."""
        self._rest = memoryview(b"")
        close_stream(self._stream)

    def _take(self, view: memoryview) -> int:
        if self._readinto is not None:
            count: int = self._readinto(view)
            return count
        while not self._rest.nbytes:
            chunk = next(self._stream, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(view.nbytes, self._rest.nbytes)
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def close_stream(stream: ObjectStream) -> None:
    """Close a stream; a plain iterator, which the reference library's users may have, is let be."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()


def blank(size_bytes: int) -> io.BytesIO:
    """Return `size_bytes` of memory to fill through `getbuffer()`.

    Unlike a bytearray it is not zeroed by a pass over it (`bytes` callocs), and `getvalue()`
    returns it without a copy.
    """
    return io.BytesIO(bytes(size_bytes))


def writable_view(buf: WriteableBuffer) -> memoryview:
    """Return a caller's buffer as plain bytes.

    Raises:
        TypeError: it is read-only, not contiguous, or no buffer at all.
    """
    try:
        view = memoryview(buf)
    except TypeError:
        view = memoryview(b"")
    if view.readonly or not view.c_contiguous:
        raise TypeError(
            f"argument must be a writable, contiguous bytes-like object, not {type(buf).__name__}"
        )
    return _as_bytes(view)


def _as_bytes(view: memoryview) -> memoryview:
    if not view.nbytes:
        return memoryview(b"")  # a view with a zero in its shape cannot be cast
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


class UploadSink(Protocol):
    """An upload in progress."""

    def write(self, data: memoryview, /) -> None:
        """Append bytes; they are copied or sent before the call returns."""

    def close(self) -> None:
        """Publish the object. When this raises, nothing is left behind."""

    def abort(self) -> None:
        """Drop the object.

        The garbage collector may call it, on any thread: it must not wait for the I/O thread.
        """


class S3Writer(io.BufferedIOBase):
    """A write-only stream that becomes an object when it is closed, and only then.

    Left by an exception, after a failed write, or dropped without `close`, it publishes nothing.

    Args:
        stream: Where the bytes go.
    """

    # Holds the sink until the one call that publishes or drops it pops it, which is atomic. Empty
    # here so that an instance whose `__init__` failed counts as closed.
    _open: list[UploadSink] | tuple[()] = ()

    def __init__(self, stream: UploadSink) -> None:
        self.stream = stream
        self._position = 0
        self._failure: BaseException | None = None
        self._settled: Call[None] = Call()
        self._open = [stream]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Publish the object, or drop it if the block failed."""
        if exc_type is None:
            self.close()
        elif not self.closed:
            _logger.info("Upload aborted by %s: %s", exc_type.__name__, exc_value)
            self.abort()

    def __del__(self) -> None:
        # io.IOBase's own calls close(), which would publish half an object.
        if not self.closed:
            _logger.warning("An S3Writer was dropped without close(): nothing was published")
            self.abort()

    def write(self, data: ReadableBuffer) -> int:
        """Append any bytes-like object and return its size in bytes.

        Raises:
            ValueError: the writer is closed.
            S3Exception: the upload failed; the writer will not publish any more.
        """
        if self.closed:
            raise ValueError("write to a closed S3Writer")
        view = memoryview(data)
        view = _as_bytes(view if view.c_contiguous else memoryview(view.tobytes()))
        if view.nbytes:
            try:
                self.stream.write(view.toreadonly())
            except BaseException as exc:
                self._failure = exc
                raise
        self._position += view.nbytes
        return view.nbytes

    def close(self) -> None:
        """Publish the object. Later calls do nothing; concurrent ones wait for the first.

        Raises:
            IncompleteSaveError: a write failed before, so the object was dropped instead.
            S3Exception: the upload failed.
        """
        sink = self._take_sink()
        if sink is None:
            self._settled.wait()
            return
        try:
            if self._failure is not None:
                _drop(sink)
                raise IncompleteSaveError(
                    f"Nothing was published: a write failed before close() ({self._failure}). "
                    "Write it again"
                ) from self._failure
            sink.close()
        finally:
            self._settled.succeed(None)

    def abort(self) -> None:
        """Drop the object, unless it is published already. The writer is closed then."""
        sink = self._take_sink()
        if sink is not None:
            try:
                _drop(sink)
            finally:
                self._settled.succeed(None)

    @property
    def closed(self) -> bool:
        """Whether the writer has been closed or aborted."""
        return not self._open

    def flush(self) -> None:
        """Do nothing: S3 has no half-written objects."""

    def readable(self) -> bool:
        """Return False."""
        return False

    def writable(self) -> bool:
        """Return whether the writer is still open."""
        return not self.closed

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._position

    def _take_sink(self) -> UploadSink | None:
        try:
            return self._open.pop() if isinstance(self._open, list) else None
        except IndexError:
            return None


def _drop(sink: UploadSink) -> None:
    try:
        sink.abort()
    except Exception:
        # Whoever aborts has a better error to report than this one.
        _logger.warning("An aborted upload could not be dropped from the store", exc_info=True)
