"""A response's body, received by the kernel straight into the caller's memory.

aiohttp parses the response's head. Then, for as long as the body lasts, a `BufferedProtocol` of
ours takes its place on the connection's transport and hands out the caller's memory to read into.

Rules:
- What aiohttp has already read is taken first. From then to the swap nothing may await.
- aiohttp's protocol comes back once the last byte is in and the task runs again; until then uvloop
  may ask for one more buffer. It gets a spare one, and a byte landing there is an error: it belongs
  to no response.
- aiohttp's read timer knows nothing of the swap, so it is disarmed, and an idle timer of ours runs.
- Losing the connection is passed on to aiohttp's protocol: closing the client waits for it.
- However a body ends early (short, reset, stalled, cancelled), the transport is aborted before the
  caller has its memory back, and the connection never returns to the pool.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp

from s3dcp._errors import S3ConnectionError, S3Exception, S3ProtocolError, S3TimeoutError
from s3dcp._store import Scatter

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler

#: Bodies up to this size are cheaper to copy than to swap protocols for.
_COPIED_BYTES = 64 << 10


async def receive(response: aiohttp.ClientResponse, into: Scatter, idle_timeout_s: float) -> None:
    """Read a body of exactly `into.remaining` bytes.

    The caller has checked that the head promises that length. The response is released, or closed
    if anything failed.

    Raises:
        S3ConnectionError: the body broke off; `into.received` bytes are in place.
        S3TimeoutError: nothing came for `idle_timeout_s` seconds.
        S3ProtocolError: more bytes came than were promised.
    """
    try:
        if _can_swap(response, into):
            _take_buffered(response, into)
            if into.remaining:
                await _receive_raw(response, into, idle_timeout_s)
            else:
                await _expect_end(response)
        else:
            await _receive_copied(response, into)
    except S3Exception:
        response.close()
        raise
    except (TimeoutError, aiohttp.ServerTimeoutError) as exc:
        response.close()
        raise S3TimeoutError(f"No byte came for {idle_timeout_s:g} s") from exc
    except (aiohttp.ClientError, OSError) as exc:
        response.close()
        cause = str(exc) or type(exc).__name__
        raise S3ConnectionError(
            f"The body broke off with {into.remaining} bytes to come: {cause}"
        ) from exc
    except BaseException:
        response.close()
        raise
    response.release()


def _can_swap(response: aiohttp.ClientResponse, into: Scatter) -> bool:
    headers = response.headers
    return (
        into.remaining > _COPIED_BYTES
        and response.connection is not None
        and response.connection.transport is not None
        and headers.get("Content-Length") == str(into.remaining)
        and "Transfer-Encoding" not in headers
        and "Content-Encoding" not in headers
    )


def _take_buffered(response: aiohttp.ClientResponse, into: Scatter) -> None:
    content = response.content
    while not content.at_eof() and (chunk := content.read_nowait()):
        if len(chunk) > into.remaining:
            raise S3ProtocolError("The body is longer than its Content-Length")
        into.write(chunk)


async def _expect_end(response: aiohttp.ClientResponse) -> None:
    if await response.content.read(1):
        raise S3ProtocolError("The body is longer than its Content-Length")


async def _receive_copied(response: aiohttp.ClientResponse, into: Scatter) -> None:
    while into.remaining:
        chunk = await response.content.readany()
        if not chunk:
            raise S3ConnectionError(f"The body ended {into.remaining} bytes early")
        if len(chunk) > into.remaining:
            raise S3ProtocolError("The body is longer than was promised")
        into.write(chunk)
    await _expect_end(response)


async def _receive_raw(
    response: aiohttp.ClientResponse, into: Scatter, idle_timeout_s: float
) -> None:
    connection = response.connection
    if connection is None or connection.transport is None or connection.protocol is None:
        raise S3ConnectionError(f"The connection closed with {into.remaining} bytes to come")
    transport, owner = connection.transport, connection.protocol
    owner.read_timeout = None
    owner.start_timeout()  # which, with no timeout set, only cancels the one that was running
    receiver = _Receiver(into, owner, transport, idle_timeout_s)
    transport.set_protocol(receiver)
    if not transport.is_reading():
        transport.resume_reading()
    whole = False
    try:
        await receiver.done
        whole = True
    finally:
        receiver.stop()
        transport.set_protocol(owner)
        if not whole:
            transport.abort()
    if receiver.surplus:
        transport.abort()
        raise S3ProtocolError("The body is longer than its Content-Length")
    # aiohttp's parser did not see the body go by, and would take what comes next for a part of it:
    # with a new one, bytes that belong to no response close the connection.
    owner.set_response_params()
    # Told of the body's end, aiohttp takes the connection back.
    response.content.feed_eof()


class _Receiver(asyncio.BufferedProtocol):
    """Stands in for aiohttp's protocol while one body is received."""

    _spare = memoryview(bytearray(4096))

    def __init__(
        self,
        into: Scatter,
        owner: ResponseHandler,
        transport: asyncio.Transport,
        idle_timeout_s: float,
    ) -> None:
        self._into = into
        self._owner = owner
        self._transport = transport
        self._idle_timeout_s = idle_timeout_s
        self._loop = asyncio.get_running_loop()
        self._seen = into.received
        self._timer = self._loop.call_later(idle_timeout_s, self._check_progress)
        self.done: asyncio.Future[None] = self._loop.create_future()
        self.surplus = False

    def stop(self) -> None:
        """End the idle timer."""
        self._timer.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - ours is better
        return self._into.free() if self._into.remaining else self._spare

    def buffer_updated(self, nbytes: int) -> None:
        if not self._into.remaining:
            self.surplus = True
            return
        self._into.advance(nbytes)
        if not self._into.remaining and not self.done.done():
            self.done.set_result(None)

    def eof_received(self) -> None:
        self._fail(S3ConnectionError(f"The body ended {self._into.remaining} bytes early"))

    def connection_lost(self, exc: Exception | None) -> None:
        lost = S3ConnectionError(
            f"The connection was lost with {self._into.remaining} bytes to come: {exc or 'closed'}"
        )
        lost.__cause__ = exc
        self._fail(lost)
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()

    def _check_progress(self) -> None:
        if self._into.received == self._seen:
            self._fail(
                S3TimeoutError(
                    f"No byte came for {self._idle_timeout_s:g} s, "
                    f"with {self._into.remaining} to come"
                )
            )
            return
        self._seen = self._into.received
        self._timer = self._loop.call_later(self._idle_timeout_s, self._check_progress)

    def _fail(self, exc: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(exc)
