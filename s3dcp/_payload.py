"""A request's body over memory that is not joined or copied on its way to the socket.

aiohttp copies a body given as one buffer next to the head, and has no write timeout: a peer that
stops reading would hold the upload for ever. Here the memory is written in steps, and a step that
makes no progress in time ends the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiohttp.payload import Payload

from s3dcp._store import Views

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter

_STEP_BYTES = 1 << 20
# Views smaller than this are gathered: a system call costs more than their copy.
_GATHERED_BYTES = 64 << 10
_GATHER_BYTES = 256 << 10


class ViewsPayload(Payload):
    """The bytes of several views, as a body that botocore and aiohttp accept.

    botocore asks for a length and a `read` that it, told not to sign or sum bodies, never calls;
    `seek` and `tell` let it rewind.

    Args:
        views: The body. Held until the request has ended.
        stall_timeout_s: Seconds that the peer may take to accept one step.
    """

    def __init__(self, views: Views, stall_timeout_s: float) -> None:
        self._views = [view for view in views if view.nbytes]
        self._nbytes = sum(view.nbytes for view in self._views)
        self._stall_timeout_s = stall_timeout_s
        self.stalled = False
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
        """Write the whole body, step by step, watched."""
        loop = asyncio.get_running_loop()

        def stall() -> None:
            self.stalled = True
            if (transport := getattr(writer, "transport", None)) is not None:
                transport.abort()

        for step in _steps(self._views):
            timer = loop.call_later(self._stall_timeout_s, stall)
            try:
                await writer.write(step)
            finally:
                timer.cancel()


def _steps(views: Views) -> Iterator[memoryview | bytes]:
    """Yield the body in writes of a good size.

    The first is small, since aiohttp joins it with the request's head.
    """
    gathered: list[memoryview] = []
    held = 0
    first = True
    for whole in views:
        view = whole
        if first and view.nbytes > _GATHERED_BYTES:
            yield view[: _GATHERED_BYTES // 16]
            view = view[_GATHERED_BYTES // 16 :]
        first = False
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
