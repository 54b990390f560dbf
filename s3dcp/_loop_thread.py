"""An event loop on a thread of its own: how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from s3dcp._calls import GRACE_S
from s3dcp._errors import PortalError
from s3dcp._node import local_cores
from s3dcp._workers import Workers

if sys.platform == "win32":
    from asyncio import ProactorEventLoop as EventLoop
else:
    from asyncio import SelectorEventLoop as EventLoop

T = TypeVar("T")

_log = logging.getLogger("s3dcp.portal")

# Nothing runs any more: what still waits then waits for a peer that does not read.
_CLOSE_S = 2.0
_MAX_WORKERS = 4
# aiohttp asks for a host once at a time: one that hangs takes one of them.
_RESOLVERS = 2


def worker_count() -> int:
    """Return this rank's share of the node's cores, of which it needs no more than a few."""
    return min(_MAX_WORKERS, local_cores())


class _Here(threading.local):
    resolvers: Workers | None = None


_here = _Here()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's loop where that is installed, asyncio's otherwise.

    On a portal's thread names are looked up by threads that do nothing else: asyncio has its
    workers do it, whose checksums would wait for a resolver that hangs. uvloop would start libuv's
    own threads, whose ends libuv waits for when the process ends: also in a fork, which does not
    have them, and crashes.
    """
    _open_standard_files()
    try:
        import uvloop
    except ImportError:
        return _AsyncioLoop()

    class Loop(uvloop.Loop):
        async def getaddrinfo(self, host: Any, port: Any, **kwargs: Any) -> Any:
            return await _getaddrinfo(host, port, **kwargs)

        async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
            return await _look_up(socket.getnameinfo, sockaddr, flags)

    return Loop()


def _open_standard_files() -> None:
    """Let the files 0 to 2 be nothing, where they are closed, as in a daemon.

    A socket with such a number gets what libraries print; and when libuv closes one, it aborts.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


class _AsyncioLoop(EventLoop):
    async def getaddrinfo(self, host: Any, port: Any, **kwargs: Any) -> Any:
        return await _getaddrinfo(host, port, **kwargs)

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
        return await _look_up(socket.getnameinfo, sockaddr, flags)


async def _getaddrinfo(host: Any, port: Any, *, flags: int = 0, **kwargs: Any) -> Any:
    def look_up(flags: int) -> Any:
        return socket.getaddrinfo(host, port, flags=flags, **kwargs)

    try:  # an address is asked for as well, when uvloop connects to it, and needs no resolver
        return look_up(flags | socket.AI_NUMERICHOST)
    except socket.gaierror:
        return await _look_up(look_up, flags)


async def _look_up(function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_here.resolvers, function, *args)


class LoopThread:
    """The thread, its workers and its resolvers. All are started at once, and never another.

    Python 3.12 and later start no threads while the interpreter exits, and an `async_save` may
    still be in flight then.

    Args:
        loop_factory: Makes the loop.
        at_end: Called on the thread when the loop has ended, whyever it has.

    Attributes:
        loop: The loop.

    Raises:
        PortalError: there is no loop or no thread to be had.
    """

    def __init__(
        self,
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        at_end: Callable[[], None],
    ) -> None:
        self._at_end = at_end
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._later: dict[Callable[[], None], asyncio.TimerHandle] = {}
        # Held to hand the loop a callback, and to close: none is queued behind the loop's end. A
        # finalizer may come in between on the same thread.
        self._gate = threading.RLock()
        self._closing = False
        self._pid = os.getpid()
        self._workers = Workers(worker_count())
        self._resolvers = Workers(_RESOLVERS, "s3dcp-resolver")
        self._thread = threading.Thread(target=self._run, name="s3dcp-portal", daemon=True)
        try:
            self.loop = loop_factory()
        except Exception as exc:
            raise PortalError(f"The I/O thread could not start: {exc}") from exc
        try:
            self._workers.start()
            self._resolvers.start()
            self._thread.start()
        except RuntimeError as exc:
            self._let_go()
            self.loop.close()
            raise PortalError(f"The I/O thread could not start: {exc}") from exc
        except BaseException:  # an interrupt
            self._let_go()
            self.loop.call_soon_threadsafe(self.loop.stop)
            raise

    @property
    def is_of_this_process(self) -> bool:
        """False in a fork, which has the loop, and no thread that runs it."""
        return self._pid == os.getpid()

    @property
    def is_alive(self) -> bool:
        """Whether callbacks are accepted."""
        return self.is_of_this_process and not self._closing

    def call_soon(self, function: Callable[[], None]) -> None:
        """Have the loop call `function`; from any thread.

        Raises:
            PortalError: the loop has ended.
        """
        if not self.is_of_this_process:
            raise PortalError("The I/O thread is another process's, of which this is a fork")
        with self._gate:
            if self._closing:
                raise PortalError(
                    "The I/O thread has ended, as the process does: save and load before it exits"
                )
            self.loop.call_soon_threadsafe(function)

    def call_later(self, delay_s: float, function: Callable[[], object]) -> Callable[[], object]:
        """Have the loop call `function` after a while, unless what this returns is called before.

        Both from any thread. If the loop ends, it calls the function then.

        Raises:
            PortalError: the loop has ended.
        """

        def call() -> None:
            del self._later[call]
            function()

        def set_off() -> None:
            self._later[call] = self.loop.call_later(delay_s, call)

        def take_back() -> None:
            if (timer := self._later.pop(call, None)) is not None:
                timer.cancel()

        def take_back_there() -> None:
            with contextlib.suppress(PortalError):
                self.call_soon(take_back)

        self.call_soon(set_off)
        return take_back_there

    def refuse_own(self) -> None:
        """Refuse to block the thread.

        Raises:
            PortalError: it is the one that runs this.
        """
        if threading.current_thread() is self._thread:
            raise PortalError(
                "A blocking call from the I/O thread would wait for itself: await S3Client there"
            )

    def at_close(self, function: Callable[[], Awaitable[None]]) -> None:
        """Await `function` when all else on the loop has ended."""
        self._closers.append(function)

    def close(self) -> None:
        """Cancel what is running, close what is open, end the threads. Idempotent."""
        if not self.is_of_this_process:
            return
        self.refuse_own()
        with self._gate:
            if not self._closing:
                self._closing = True
                self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(GRACE_S)
        self._let_go()  # of a loop that hangs, too
        self._workers.join(GRACE_S)
        self._resolvers.join(_CLOSE_S)  # nothing ends a lookup that hangs

    def _let_go(self) -> None:
        self._workers.shutdown()
        self._resolvers.shutdown()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.set_default_executor(self._workers)
        _here.resolvers = self._resolvers
        try:
            self.loop.run_forever()
        finally:
            with self._gate:
                self._closing = True
            for call in tuple(self._later):
                call()
            try:
                self.loop.run_until_complete(self._shut())
            finally:
                self.loop.close()
                self._let_go()
                self._at_end()

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=GRACE_S)
        await self.loop.shutdown_asyncgens()
        deadline_s = self.loop.time() + _CLOSE_S
        for closer in self._closers:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await closer()
            except Exception:  # noqa: BLE001 - the others are to be closed all the same
                _log.debug("closing the portal", exc_info=True)
