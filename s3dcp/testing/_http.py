"""HTTP/1.1, the server's side: bodies go between the kernel and objects' memory without copies.

A connection is served by one coroutine that asks for what comes next: a head, a line, or bytes into
memory of its own. While memory is asked for, the event loop's `get_buffer` is handed that memory;
otherwise bytes wait in a buffer of the connection, and when that is full reading is paused, so that
the peer is. Writing is in steps, each awaited until the kernel has taken most of it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

MAX_HEAD_BYTES = 64 << 10
_STEP_BYTES = 2 << 20
_PACE_S = 0.01
_LINGER_S = 5.0


class MalformedRequestError(Exception):
    """What came is not HTTP as this server reads it; the connection cannot go on."""


class GoneError(ConnectionError):
    """The client closed its side, or the connection was lost."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head.

    Attributes:
        target: As sent: path and query, percent-encoded.
        headers: By lower-case name, as Latin-1; what came twice is joined by commas.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    keep_alive: bool

    @classmethod
    def parse(cls, data: bytes) -> Head:
        """Read a head, without the empty line that ends it."""
        first, *lines = data.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or words[2] not in {"HTTP/1.1", "HTTP/1.0"}:
            raise MalformedRequestError(f"{first[:80]!r} is no request line")
        method, target, version = words
        if not target.startswith("/") or not target.isascii():
            raise MalformedRequestError(f"{target[:80]!r} is no path")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise MalformedRequestError(f"{line[:80]!r} is no header")
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]},{value}" if name in headers else value
        said = headers.get("connection", "").lower()
        keep_alive = "close" not in said and (version == "HTTP/1.1" or "keep-alive" in said)
        return cls(method, target, headers, keep_alive)


class _Pace:
    """Spreads bytes over time."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self.step_bytes = (
            max(64 << 10, min(_STEP_BYTES, int(bytes_per_s * _PACE_S)))
            if bytes_per_s
            else _STEP_BYTES
        )

    @property
    def limited(self) -> bool:
        return self._bytes_per_s is not None

    def begin(self) -> None:
        """Forget what an idle link did not use; within a body, late timers are caught up with."""
        self._free_at_s = max(self._free_at_s, asyncio.get_running_loop().time())

    async def spend(self, nbytes: int) -> None:
        if self._bytes_per_s is None:
            return
        self._free_at_s += nbytes / self._bytes_per_s
        wait_s = self._free_at_s - asyncio.get_running_loop().time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)


class Connection(asyncio.BufferedProtocol):
    """One client's connection.

    Args:
        serve: What serves it; cancelled when the connection is lost.
        bytes_per_s: The link's speed, each way; None for no limit.

    Attributes:
        unsent: How many bytes of the latest `write` the transport was not given.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        serve: Callable[[Connection], Coroutine[Any, Any, None]],
        bytes_per_s: float | None = None,
    ) -> None:
        self._serve = serve
        self._into, self._out = _Pace(bytes_per_s), _Pace(bytes_per_s)
        self._buffer = bytearray(MAX_HEAD_BYTES)
        self._held = memoryview(self._buffer)
        self._start = self._end = 0
        self._target: memoryview | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._held_back = False
        self._gone = asyncio.Event()
        self.unsent = 0

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's do not derive from
        self.task = asyncio.get_running_loop().create_task(self._serve(self))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the peer's affair
        self._gone.set()
        self.task.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - ours is better
        return self._held[self._end :] if self._target is None else self._target

    def buffer_updated(self, nbytes: int) -> None:
        if self._target is None:
            self._end += nbytes
            if self._end == len(self._held):
                self.hold_back()
        elif nbytes < len(self._target):
            self._target = self._target[nbytes:]
            return
        else:
            self._target = None
        self._wake()

    def eof_received(self) -> bool:
        self._gone.set()
        self._wake()
        # A client may shut its side down and still read; TLS has no such halves.
        return self.transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    # Reading.

    async def read_head(self) -> Head | None:
        """Return the next request's head; None where the client is done."""
        scanned = 0
        while (end := self._find(b"\r\n\r\n", scanned)) < 0:
            scanned = max(0, self._end - self._start - 3)
            try:
                await self._more()
            except GoneError:
                if self._start == self._end:
                    return None
                raise
        if not end:
            raise MalformedRequestError("an empty head: bytes beyond the last Content-Length?")
        return Head.parse(self._take(end, 4))

    async def read_line(self) -> bytes:
        """Return the next line, without its CRLF."""
        while (end := self._find(b"\r\n", 0)) < 0:
            await self._more()
        return self._take(end, 2)

    async def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next."""
        self._into.begin()
        while len(view):
            step = view[: self._into.step_bytes] if self._into.limited else view
            await self._fill(step)
            await self._into.spend(len(step))
            view = view[len(step) :]

    async def _fill(self, view: memoryview) -> None:
        held = min(len(view), self._end - self._start)
        view[:held] = self._consume(held)
        if held == len(view):
            return
        self._target = view[held:]
        try:
            while self._target is not None:
                await self._arrival()
        finally:
            self._target = None

    def _find(self, what: bytes, scanned: int) -> int:
        found = self._buffer.find(what, self._start + scanned, self._end)
        return found - self._start if found >= 0 else -1

    def _take(self, size: int, end_bytes: int) -> bytes:
        taken = bytes(self._consume(size))
        self._consume(end_bytes)
        return taken

    def _consume(self, size: int) -> memoryview:
        consumed = self._held[self._start : self._start + size]
        self._start += size
        if self._start == self._end:
            self._start = self._end = 0
        return consumed

    async def _more(self) -> None:
        size = self._end - self._start
        if size == len(self._held):
            raise MalformedRequestError(f"a head or line of over {size} bytes")
        if self._start:
            self._held[:size] = bytes(self._held[self._start : self._end])
            self._start, self._end = 0, size
        await self._arrival()

    async def _arrival(self) -> None:
        if self._gone.is_set():
            raise GoneError("the client closed its side")
        if self._held_back:
            self._held_back = False
            self.transport.resume_reading()
        self._arrived = asyncio.get_running_loop().create_future()
        await self._arrived
        self._arrived = None

    def hold_back(self) -> None:
        """Read no more from the client until something is asked for."""
        if not self._held_back:
            self._held_back = True
            self.transport.pause_reading()

    # Writing.

    async def write(self, views: Iterable[memoryview | bytes]) -> None:
        """Send bytes, and wait until there is room for more."""
        views = list(views)
        self._out.begin()
        step_bytes, self.unsent = self._out.step_bytes, sum(map(len, views))
        for view in views:
            for start in range(0, len(view), step_bytes):
                if self.transport.is_closing():
                    raise GoneError("the connection is closed")
                step = view[start : start + step_bytes] if len(view) > step_bytes else view
                self.transport.write(step)
                self.unsent -= len(step)
                if self._writable is not None:
                    await self._writable
                await self._out.spend(len(step))

    async def flush(self) -> None:
        """Wait until the peer's kernel has all that was written, as far as can be told."""
        own = self.transport.get_extra_info("socket")
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                # The kernel tells no one, so it is asked.
                while self.transport.get_write_buffer_size() or _unacknowledged(own.fileno()):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

    async def until(self, event: asyncio.Event) -> None:
        """Wait for `event`.

        Raises:
            GoneError: The client left first.
        """
        waits = [asyncio.ensure_future(each.wait()) for each in (event, self._gone)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not event.is_set():
            raise GoneError("the client closed its side")

    # Ending.

    async def abort(self) -> None:
        """End at once, and wait for what serves it; nothing before it was made."""
        if (transport := getattr(self, "transport", None)) is not None:
            transport.abort()
            self.task.cancel()
            await asyncio.wait([self.task])

    def close(self) -> None:
        """Close once all is sent."""
        self.transport.close()

    def reset(self) -> None:
        """Send RST: what is on its way is lost."""
        if (own := self.transport.get_extra_info("socket")) is not None:
            with suppress(OSError):
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def linger(self) -> None:
        """Close, but read on a while: closing over unread bytes would take the answer back."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        scratch = memoryview(bytearray(64 << 10))
        with suppress(GoneError, TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while True:
                    await self._fill(scratch)
        self.close()


def _unacknowledged(descriptor: int) -> int:
    """How many bytes of a socket's the peer has not acknowledged; 0 where that is not known."""
    try:
        import fcntl
        import termios
    except ImportError:
        return 0
    count = bytearray(4)
    with suppress(OSError):
        fcntl.ioctl(descriptor, termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)
