"""Synchronous ends of the engine: an object read or written as a stream, by one thread.

Both keep a few requests in flight ahead of (or behind) their user. Both may be dropped by the
garbage collector on any thread, the portal's own included, and so give up without waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from s3dcp._calls import Call
from s3dcp._config import S3ClientConfig
from s3dcp._downloads import Downloads
from s3dcp._flow import Channel
from s3dcp._keys import S3Uri
from s3dcp._portal import Portal
from s3dcp._ranges import MAX_PART_BYTES, upload_part_bytes
from s3dcp._store import ObjectInfo
from s3dcp._uploads import Upload

_AHEAD = 4
# A stream's length is not known before its end, so parts grow: 10,000 of one size end too early.
_PARTS_PER_SIZE = 1000


class DownloadStream:
    """The bytes [start, end) of an object, as chunks or straight into the reader's memory.

    Args:
        portal: Where the requests run.
        downloads: Of the one reader that this is a stream of.
        uri: The object.
        start: The first byte; None: 0.
        end: One past the last byte; None: the object's end, which `info` is asked for.
        chunk_bytes: Bytes of a request.
        info: Asks the store about the object.
    """

    def __init__(
        self,
        portal: Portal,
        downloads: Downloads,
        uri: S3Uri,
        start: int | None,
        end: int | None,
        *,
        chunk_bytes: int,
        info: Callable[[], ObjectInfo],
    ) -> None:
        self._portal = portal
        self._downloads = downloads
        self._uri = uri
        self._next = start or 0
        self._end = end
        self._info = info
        self._chunk_bytes = chunk_bytes
        self._ahead: deque[tuple[bytearray, Call[list[int]]]] = deque()
        self._rest = memoryview(b"")

    def __iter__(self) -> DownloadStream:
        return self

    def __next__(self) -> memoryview:
        if self._rest.nbytes:
            chunk, self._rest = self._rest, memoryview(b"")
            return chunk
        self._read_ahead()
        if not self._ahead:
            raise StopIteration
        buffer, future = self._ahead.popleft()
        self._portal.wait(future)
        self._read_ahead()
        return memoryview(buffer)

    def readinto(self, buffer: memoryview) -> int:
        """Fill as much of `buffer` as there are bytes; return how many that was."""
        if not self._rest.nbytes and not self._ahead and buffer.nbytes >= self._chunk_bytes:
            view = buffer[: max(self._stop() - self._next, 0)]
            self._portal.call(
                self._downloads.fetch_parallel, self._uri, self._next, view, self._chunk_bytes
            )
            self._next += view.nbytes
            return view.nbytes
        if not self._rest.nbytes:
            self._rest = next(self, memoryview(b""))
        count = min(buffer.nbytes, self._rest.nbytes)
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        """Give up what has not been read."""
        self._end = self._next
        self._rest = memoryview(b"")
        if self._ahead:
            self._portal.cancel_soon([future for _, future in self._ahead])
            self._ahead.clear()

    def _stop(self) -> int:
        if self._end is None:
            self._end = self._info().size_bytes
        return self._end

    def _read_ahead(self) -> None:
        stop = self._stop()
        while len(self._ahead) < _AHEAD and self._next < stop:
            buffer = bytearray(min(self._chunk_bytes, stop - self._next))
            future = self._portal.submit(
                self._downloads.fetch, self._uri, self._next, [memoryview(buffer)]
            )
            self._ahead.append((buffer, future))
            self._next += len(buffer)


class UploadSink:
    """An object written by a stream of unknown length. Published by `close`, dropped by `abort`.

    Args:
        portal: Where the requests run.
        channel: The client's.
        uri: Where the object goes.
        config: For the least part size.
    """

    def __init__(
        self, portal: Portal, channel: Channel, uri: S3Uri, config: S3ClientConfig
    ) -> None:
        self._portal = portal
        self._upload = Upload(channel, uri)
        self._config = config
        self._first_bytes = upload_part_bytes(0, config.part_size, channel.slots.count)
        self._buffer = bytearray()
        self._sent = 0
        self._sending: deque[Call[list[int]]] = deque()
        self._dropping: Call[None] | None = None

    def write(self, data: memoryview, /) -> None:
        """Append a copy of `data`, sending what has become whole parts.

        Raises:
            S3Exception: a part could not be sent. The upload is then aborted.
        """
        while data.nbytes:
            size = self._part_bytes()
            if len(self._buffer) == size:
                self._send()
                continue
            piece = data[: size - len(self._buffer)]
            self._buffer += piece
            data = data[piece.nbytes :]

    def close(self) -> None:
        """Send the rest and publish the object.

        Raises:
            S3Exception: it could not be; nothing was published.
        """
        try:
            if not self._sent:
                self._portal.call(self._upload.put, [memoryview(self._buffer)])
                return
            self._send()
            while self._sending:
                self._portal.wait(self._sending.popleft())
            self._portal.call(self._upload.complete, self._sent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Drop the object, without waiting for it."""
        self._dropping = self._portal.submit(self._upload.abort)
        self._sending.clear()

    def settle(self) -> None:
        """Wait until an object that was dropped is: the process may be about to end."""
        if self._dropping is not None:
            self._portal.settle([self._dropping])

    def _part_bytes(self) -> int:
        return min(self._first_bytes << (self._sent // _PARTS_PER_SIZE), MAX_PART_BYTES)

    def _send(self) -> None:
        if not self._sent:
            # Only now is it a multipart upload, whose parts S3 wants of a certain size.
            upload_part_bytes(self._first_bytes + 1, self._config.part_size, connections=1)
        self._sent += 1
        view, self._buffer = memoryview(self._buffer), bytearray()
        try:
            while len(self._sending) >= _AHEAD:
                self._portal.wait(self._sending.popleft())
            self._sending.append(self._portal.submit(self._upload.send, self._sent, [view]))
        except BaseException:
            self.abort()
            raise
