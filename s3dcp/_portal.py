"""Calls into a thread that does I/O.

Rules:
- A call names a function, not a coroutine object, so that a refused call leaves nothing un-awaited.
- A call that is given up (Ctrl-C, a cancelled task) cancels its task and waits for it to end,
  within a grace: until then the loop may still be writing into the caller's memory.
- An interrupt may strike anywhere on the caller's thread. So a `Call` exists before the loop has
  it, and the two threads share no lock that is held by Python code.
- A call from the portal's own thread would wait for itself, and is refused.
- However the loop comes to stop, what runs is cancelled and every call ends.
- After a fork the child has no threads; `portal()` makes it a new one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from s3dcp._calls import GRACE_S, Call, settle
from s3dcp._cancellation import admit
from s3dcp._errors import PortalError
from s3dcp._loop_thread import LoopThread, new_event_loop

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("s3dcp.portal")


class Portal:
    """An event loop on a thread of its own, and the calls that it has not answered yet.

    Args:
        loop_factory: Makes the loop; by default uvloop's where that is installed.

    Raises:
        PortalError: there is no loop or no thread to be had.
    """

    def __init__(
        self, loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop
    ) -> None:
        self._calls: set[Call[Any]] = set()
        self._thread = LoopThread(loop_factory, self._fail_the_rest)

    @property
    def is_alive(self) -> bool:
        """Whether calls are accepted."""
        return self._thread.is_alive

    def submit(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Call[T]:
        """Run an async function on the portal without waiting for it.

        Raises:
            PortalError: the portal is closed.
        """
        call: Call[T] = Call()
        self.start(call, function, *args, **kwargs)
        return call

    def start(
        self,
        call: Call[T],
        function: Callable[P, Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Run an async function as `call`, which can be cancelled even if this is interrupted.

        Raises:
            PortalError: the portal is closed.
        """
        call.add_done_callback(self._calls.discard)
        self._calls.add(call)
        try:
            self._thread.call_soon(partial(self._begin, call, partial(function, *args, **kwargs)))
        except PortalError:
            self._calls.discard(call)
            raise

    def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run an async function on the portal and wait for its outcome.

        An interrupt cancels it first, and then goes on.

        Raises:
            PortalError: the portal is closed, or this is its own thread.
            BaseException: whatever the function raised.
        """
        self._thread.refuse_own()
        call: Call[T] = Call()
        try:
            admit(call, self.cancel_soon)
            self.start(call, function, *args, **kwargs)
            return call.result()
        except BaseException:
            self.cancel([call])
            raise
        finally:
            del call  # whose error has this frame in its traceback

    def wait(self, call: Call[T]) -> T:
        """Wait for the outcome of a submitted call; an interrupt cancels it, as in `call`."""
        try:
            return call.result()
        except BaseException:
            self.cancel([call])
            raise
        finally:
            del call

    async def run(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await an async function that runs on the portal, from any event loop.

        Cancelling the caller cancels the function, and waits for it to end.

        Raises:
            PortalError: the portal is closed.
            BaseException: whatever the function raised.
        """
        loop = asyncio.get_running_loop()
        if loop is self._thread.loop:
            return await function(*args, **kwargs)
        ended = asyncio.Event()

        def wake(_: Call[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(ended.set)

        call: Call[T] = Call()
        call.add_done_callback(wake)
        try:
            self.start(call, function, *args, **kwargs)
            await ended.wait()
            return call.result()
        except BaseException as exc:
            if not call.done:
                self.cancel_soon([call])
                if isinstance(exc, asyncio.CancelledError):
                    await _settled(ended, GRACE_S)
            raise
        finally:
            del call

    def cancel(self, calls: Iterable[Call[Any]]) -> None:
        """Cancel calls and wait, within the grace, until all have ended.

        An interrupt meanwhile is raised only then: the loop may be writing to the caller's memory.
        """
        pending = [call for call in tuple(calls) if call in self._calls and not call.done]
        if pending and self._thread.is_of_this_process:
            settle(pending, before=partial(self.cancel_soon, pending))

    def cancel_soon(self, calls: Iterable[Call[Any]]) -> None:
        """Ask for calls to be cancelled without waiting: for finalizers, on whichever thread."""
        try:
            self._thread.call_soon(partial(_cancel, tuple(calls)))
        except PortalError:
            _log.debug("nothing to cancel: the portal is closed")

    def settle(self, calls: Iterable[Call[Any]]) -> None:
        """Wait, within the grace, until calls have ended; interrupts are raised only then."""
        pending = [call for call in calls if call in self._calls and not call.done]
        if self._thread.is_of_this_process:
            settle(pending)

    def call_later(self, delay_s: float, function: Callable[[], object]) -> Callable[[], object]:
        """Call `function` on the portal after a while, unless what this returns is called before.

        Raises:
            PortalError: the portal is closed.
        """
        return self._thread.call_later(delay_s, function)

    def at_close(self, function: Callable[[], Awaitable[None]]) -> None:
        """Await `function` when the portal closes, before its loop ends."""
        self._thread.at_close(function)

    def close(self) -> None:
        """Cancel what is running, close what is open, end the threads. Idempotent.

        Raises:
            PortalError: this is its own thread.
        """
        self._thread.close()

    # What follows is for the loop's thread.

    def _begin(self, call: Call[T], function: Callable[[], Awaitable[T]]) -> None:
        if not call.done:  # it may have been cancelled already
            call.follow(self._thread.loop.create_task(_invoke(function)))

    def _fail_the_rest(self) -> None:
        for call in tuple(self._calls):
            call.fail(PortalError("The I/O thread ended before the call did"))


async def _invoke(function: Callable[[], Awaitable[T]]) -> T:
    return await function()


def _cancel(calls: Iterable[Call[Any]]) -> None:
    for call in calls:
        call.cancel()


async def _settled(ended: asyncio.Event, grace_s: float) -> None:
    """Wait for an event within the grace, however often the waiting is cancelled."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + grace_s
    while not ended.is_set() and (left_s := deadline_s - loop.time()) > 0:
        with contextlib.suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(ended.wait(), left_s)


class Calls:
    """Calls that are given up together, those included whose submission was interrupted.

    Args:
        portal: Where they run.
    """

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._running: set[Call[Any]] = set()

    def submit(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Call[T]:
        """Run an async function, as `Portal.submit` does."""
        call: Call[T] = Call()
        call.add_done_callback(self._running.discard)
        self._running.add(call)
        admit(call, self._portal.cancel_soon)
        self._portal.start(call, function, *args, **kwargs)
        return call

    def cancel(self) -> None:
        """Cancel all of them, as `Portal.cancel` does."""
        self._portal.cancel(self._running)

    def abandon(self, tidy: Callable[[], Awaitable[None]]) -> None:
        """Cancel all of them, then undo by `tidy` what they did; each within the grace.

        What takes longer goes on, and is waited for no more. An interrupt meanwhile is raised
        only then.
        """
        try:
            self.cancel()
        finally:
            try:
                tidying = self._portal.submit(tidy)
                self._portal.settle([tidying])
                if tidying.done:
                    tidying.result()
            except Exception as exc:  # noqa: BLE001 - what led here is what is to be seen
                _log.warning("could not tidy up after a failure: %r", exc)


async def offload(function: Callable[P, T], *args: P.args) -> T:  # type: ignore[valid-type]
    """Run a function that takes its time on a worker thread of the running loop."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


# A signal's handler, or a finalizer, may come in between on the same thread.
_lock = threading.RLock()
_portal: Portal | None = None


def portal() -> Portal:
    """Return this process's portal, started on the first call.

    Raises:
        PortalError: it cannot be started.
    """
    global _portal  # noqa: PLW0603 - one per process is the point
    with _lock:
        if _portal is None or not _portal.is_alive:
            _portal = Portal()
        return _portal


def _close_portal() -> None:
    if _portal is not None:
        _portal.close()


def _forget_portal() -> None:
    global _lock, _portal  # noqa: PLW0603
    _lock = threading.RLock()  # another thread of the parent may have held it
    _portal = None


atexit.register(_close_portal)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_portal)
