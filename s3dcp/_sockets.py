"""A body sent by the kernel straight from the caller's memory, and without the GIL.

asyncio has no such write: uvloop's transport holds the GIL while it hands a megabyte to the kernel,
which a training loop feels, and asyncio's own copies what the socket did not take. So, for as long
as a body lasts, the transport of a plain connection lends its socket: it has nothing of its own to
write then, and goes on reading.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable

from s3dcp._store import Views

# What one connection may hand to the kernel before the others have their turn.
_BURST_BYTES = 512 << 10
# Below IOV_MAX everywhere.
_BURST_VIEWS = 64


def lent_socket(transport: asyncio.Transport) -> socket.socket | None:
    """Return a duplicate of a transport's socket, or None: the bytes are TLS's, or it has none."""
    if not hasattr(socket.socket, "sendmsg") or transport.get_extra_info("ssl_object") is not None:
        return None
    lender = transport.get_extra_info("socket")
    try:
        lent = socket.socket(fileno=os.dup(lender.fileno()))
    except (AttributeError, OSError):  # a transport without one, or no descriptor left
        return None
    lent.setblocking(False)
    return lent


async def send(
    views: Views, lent: socket.socket, transport: asyncio.Transport, moved: Callable[[int], None]
) -> None:
    """Send views over a lent socket, which stays the caller's.

    Args:
        views: The bytes.
        lent: The socket.
        transport: Whose it is. Has nothing to write until this returns.
        moved: Called with how many bytes the kernel has taken, in the same step.

    Raises:
        OSError: the connection was lost.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    left = deque(views)

    def write() -> None:
        if done.done():
            return
        try:
            if transport.is_closing():
                raise ConnectionResetError("The connection was closed")
            count = lent.sendmsg(_burst(left))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            done.set_exception(exc)
            return
        _drop(left, count)
        moved(count)
        if not left:
            done.set_result(None)

    loop.add_writer(lent, write)
    try:
        await done
    finally:
        loop.remove_writer(lent)


def _burst(views: Iterable[memoryview]) -> list[memoryview]:
    burst: list[memoryview] = []
    room = _BURST_BYTES
    for view in views:
        burst.append(view[:room])
        room -= burst[-1].nbytes
        if not room or len(burst) == _BURST_VIEWS:
            break
    return burst


def _drop(views: deque[memoryview], count: int) -> None:
    while count:
        view = views.popleft()
        if count < view.nbytes:
            views.appendleft(view[count:])
            return
        count -= view.nbytes
