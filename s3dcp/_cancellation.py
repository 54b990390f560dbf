"""A blocking function on a thread of its own, awaited from any event loop, and cancelled with it.

A thread cannot be stopped, but it can be left without anything to wait for: what it has under way
on the portal is cancelled, and all that it asks of the portal from then on is refused. The function
then ends by itself, as it does when a request fails: what it tidies up runs, and its memory is let
go before the caller goes on.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

from s3dcp._calls import Call
from s3dcp._collector import CollectorPause
from s3dcp._errors import PortalError
from s3dcp._giving_way import GivingWay

P = ParamSpec("P")
T = TypeVar("T")

CancelSoon = Callable[[Iterable[Call[Any]]], None]


class Cancellation:
    """The calls of one thread, to be cancelled together, and those that would follow them.

    Without a lock, as `Call` is, and for the same reason: what two threads may do at once is a
    single step in C. A call is noted before `admit` looks, and `cancel` looks after it has said so:
    one of them sees the other.
    """

    def __init__(self) -> None:
        self._calls: dict[Call[Any], CancelSoon] = {}
        self._cancelled = False

    def admit(self, call: Call[Any], cancel_soon: CancelSoon) -> None:
        """Take note of a call that is about to start.

        Raises:
            PortalError: it is too late for that.
        """
        self._calls[call] = cancel_soon
        call.add_done_callback(self._forget)
        if self._cancelled:
            self._forget(call)
            raise PortalError("The call was cancelled")

    def cancel(self) -> None:
        """Ask for all of them to be cancelled, and refuse all others."""
        self._cancelled = True
        for call, cancel_soon in self._calls.copy().items():
            cancel_soon([call])

    def _forget(self, call: Call[Any]) -> None:
        self._calls.pop(call, None)


class _Current(threading.local):
    cancellation: Cancellation | None = None


_current = _Current()


def admit(call: Call[Any], cancel_soon: CancelSoon) -> None:
    """Have a call that this thread is about to start cancelled with the thread's function.

    Raises:
        PortalError: the function has been cancelled.
    """
    if (cancellation := _current.cancellation) is not None:
        cancellation.admit(call, cancel_soon)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a blocking function that runs on a new thread, in a copy of this context.

    Not a pool's thread: ranks wait for each other in there, and must not wait for a free thread.
    Cancelling the caller cancels what the function has under way on the portal, and then waits
    until the function has ended.

    Raises:
        BaseException: whatever the function raised.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    cancellation = Cancellation()
    work: Future[T] = Future()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(ended.set)

    call = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))
    job = [(call, work)]
    del call
    what = (job, cancellation, tell)
    threading.Thread(target=_run, args=what, name="s3dcp-blocking", daemon=True).start()
    try:
        await ended.wait()
        return work.result()
    except asyncio.CancelledError:
        cancellation.cancel()
        while not ended.is_set():
            with suppress(asyncio.CancelledError):
                await ended.wait()
        raise
    finally:
        del work  # whose error has this frame in its traceback


def _run(
    job: list[tuple[Callable[[], T], Future[T]]],
    cancellation: Cancellation,
    tell: Callable[[], None],
) -> None:
    # Taken out: a thread holds on to its arguments until it is gone, and the caller goes on before.
    call, work = job.pop()
    _current.cancellation = cancellation
    try:
        with CollectorPause(), GivingWay():  # to the caller's loop
            work.set_result(call())
    except BaseException as exc:  # noqa: BLE001 - it belongs to whoever awaits it
        work.set_exception(exc)
    finally:
        del call, work
        tell()
