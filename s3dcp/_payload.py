"""A request's body over memory that is not joined or copied on its way to the socket.

aiohttp copies a body given as one buffer next to the head, and has no write timeout: a peer that
stops reading would hold the upload for ever. Here the memory is sent bit by bit, over the socket
itself where the connection is plain, and through aiohttp where it is TLS; a peer that takes none of
it in time loses the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from aiohttp.payload import Payload

from s3dcp._sockets import lent_socket, send
from s3dcp._store import Moved, Views
from s3dcp._turns import Turns

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

# aiohttp joins what is written first with the request's head, so it is small.
_FIRST_BYTES = 4 << 10
_STEP_BYTES = 1 << 20
# Views smaller than this are gathered: a step of its own costs more than a copy.
_GATHERED_BYTES = 64 << 10
_GATHER_BYTES = 256 << 10


class ViewsPayload(Payload):
    """The bytes of several views, as a body that botocore and aiohttp accept.

    botocore asks for a length and a `read` that it, told not to sign or sum bodies, never calls;
    `seek` and `tell` let it rewind.

    Args:
        views: The body. Held until the request has ended.
        stall_timeout_s: Seconds that the peer may go without taking a byte.
        turns: Of the requests on this loop.
        moved: Is told how many bytes have been handed over.

    Attributes:
        stalled: Whether it has gone for longer.
        unsent_bytes: How many have not been handed over yet. An answer may come in the same round
            of the loop as the last byte goes, so this is counted where that happens.
    """

    def __init__(
        self,
        views: Views,
        stall_timeout_s: float,
        turns: Turns | None = None,
        moved: Moved | None = None,
    ) -> None:
        self._views = [view for view in views if view.nbytes]
        self._nbytes = sum(view.nbytes for view in self._views)
        self._stall_timeout_s = stall_timeout_s
        self._turns = turns or Turns()
        self._moved = moved or Moved()
        self.stalled = False
        self.unsent_bytes = self._nbytes
        super().__init__(None, content_type="application/octet-stream")
        self._size = self._nbytes

    def __len__(self) -> int:
        return self._nbytes

    def read(self, size: int = -1) -> bytes:
        """Return nothing that is needed: the body is never read into one buffer."""
        raise NotImplementedError("a body of views is written, not read")

    def seek(self, offset: int, whence: int = 0) -> int:
        """Rewind, which takes nothing: every write starts at the first byte."""
        if whence == 2:
            return self._nbytes + offset
        return offset

    def tell(self) -> int:
        """Return the position, always the start."""
        return 0

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002
        """Refuse: the body is not text."""
        raise TypeError("a body of views is not text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write the whole body."""
        await self.write_with_length(writer, None)

    async def write_with_length(
        self,
        writer: AbstractStreamWriter,
        content_length: int | None,  # noqa: ARG002 - it is ours
    ) -> None:
        """Write the whole body, watched."""
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport | None = getattr(writer, "transport", None)
        self.unsent_bytes = self._nbytes
        stall = asyncio.timeout(self._stall_timeout_s)
        try:
            async with stall:

                def moved(count: int) -> None:
                    self.unsent_bytes -= count
                    self._moved.size_bytes = self._nbytes - self.unsent_bytes
                    if not stall.expired():
                        stall.reschedule(loop.time() + self._stall_timeout_s)

                await self._write(writer, transport, moved)
        except TimeoutError:  # or the kernel's ETIMEDOUT: the peer is unreachable
            self.stalled = stall.expired()
            if transport is not None:
                transport.abort()
            raise

    async def _write(
        self,
        writer: AbstractStreamWriter,
        transport: asyncio.Transport | None,
        moved: Callable[[int], None],
    ) -> None:
        first, rest = split(self._views)
        lent = lent_socket(transport) if rest and transport is not None else None
        if transport is None or lent is None:
            moved(len(first))
            await writer.write(first)
            await self._turns.send()
            for step in steps(rest):
                moved(len(step))
                await writer.write(step)
            return
        with lent:
            transport.set_write_buffer_limits(high=0)  # so that to drain is to send all
            moved(len(first))
            await writer.write(first)
            await writer.drain()
            await self._turns.send()
            await send(rest, lent, transport, moved)
            transport.set_write_buffer_limits()


def split(views: Views) -> tuple[bytes, Views]:
    """Return a copy of a body's first bytes, and what is left of it."""
    first: list[memoryview] = []
    room = _FIRST_BYTES
    for number, view in enumerate(views):
        first.append(view[:room])
        room -= first[-1].nbytes
        if not room:
            rest = view[first[-1].nbytes :]
            return b"".join(first), [rest, *views[number + 1 :]] if rest else views[number + 1 :]
    return b"".join(first), []


def steps(views: Views) -> Iterator[memoryview | bytes]:
    """Yield a body in writes of a good size."""
    gathered: list[memoryview] = []
    held = 0
    for view in views:
        if view.nbytes < _GATHERED_BYTES:
            gathered.append(view)
            held += view.nbytes
            if held < _GATHER_BYTES:
                continue
        if gathered:
            yield b"".join(gathered)
            gathered, held = [], 0
        if view.nbytes >= _GATHERED_BYTES:
            for start in range(0, view.nbytes, _STEP_BYTES):
                yield view[start : start + _STEP_BYTES]
    if gathered:
        yield b"".join(gathered)
