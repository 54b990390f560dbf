"""What becomes of a call: all that its caller and the loop share of it."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from s3dcp._errors import PortalError
from s3dcp._waiting import wait_for

T = TypeVar("T")

_log = logging.getLogger("s3dcp.portal")

#: Seconds that a given-up call may take to let go of the caller's memory.
GRACE_S = 10.0


class Call(Generic[T]):
    """A function's run on the portal, as its caller sees it.

    Not a `concurrent.futures.Future`: that one waits on a `Condition`, which is Python code, and an
    interrupt (Ctrl-C) in the middle of it can leave its lock held. The loop then hangs when it
    comes to set the result, and every other call with it. Nothing is locked here: whatever two
    threads may do at once is a single step in C (a list's `append`, `remove` and `pop`, and
    `SimpleQueue.get`), which an interrupt lets happen wholly or not at all.

    Attributes:
        done: Whether it has ended.
    """

    __slots__ = ("_callbacks", "_error", "_task", "_value", "done")

    _value: T

    def __init__(self) -> None:
        self.done = False
        self._task: asyncio.Task[T] | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Call[T]], object]] = []

    def result(self) -> T:
        """Wait for the end and return what the function did.

        Raises:
            PortalError: the call was cancelled, or the portal ended.
            BaseException: whatever the function raised.
        """
        self.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._value
        finally:
            del self  # whose error has this frame in its traceback

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, for so many seconds at the most, and return whether it has come."""
        if not self.done:
            # One for each that waits: a wait that is interrupted takes nothing from the others.
            told: queue.SimpleQueue[Call[T]] = queue.SimpleQueue()
            self.add_done_callback(told.put)
            with suppress(queue.Empty):
                wait_for(told, timeout_s)
        return self.done

    def add_done_callback(self, function: Callable[[Call[T]], object]) -> None:
        """Have `function` called with this call at its end, on the loop's thread; or now."""
        self._callbacks.append(function)
        if self.done:
            try:
                self._callbacks.remove(function)
            except ValueError:  # the loop has called it
                return
            function(self)

    # What follows is for the thread alone that ends it, which is the loop's.

    def follow(self, task: asyncio.Task[T]) -> None:
        """End as this task ends."""
        self._task = task
        task.add_done_callback(self._finish)

    def cancel(self) -> None:
        """Ask the task to end; once, so that what it does on its way out is not disturbed."""
        if self.done:
            return
        if self._task is None:  # the caller was interrupted before the loop had the call
            self.fail(PortalError("The call was cancelled"))
        elif not self._task.cancelling():
            self._task.cancel()

    def succeed(self, value: T) -> None:
        """End with a value, which `result` returns."""
        self._value = value
        self._end()

    def fail(self, error: BaseException) -> None:
        """End with an error, which `result` raises."""
        self._error = error
        self._end()

    def _finish(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.fail(PortalError("The call was cancelled"))
        elif error := task.exception():
            self.fail(error)
        else:
            self.succeed(task.result())

    def _end(self) -> None:
        self._task = None
        self.done = True
        while self._callbacks:
            try:
                function = self._callbacks.pop(0)
            except IndexError:  # who added it has called it
                return
            function(self)


async def ended(call: Call[T]) -> T:
    """Await the outcome of a call on the loop that it runs on."""
    told = asyncio.Event()
    call.add_done_callback(lambda _: told.set())
    await told.wait()
    return call.result()


def settle(calls: Sequence[Call[Any]], before: Callable[[], None] = lambda: None) -> None:
    """Wait for the calls' ends within the grace, and only then raise what interrupts this.

    Args:
        calls: What to wait for.
        before: Called first, and again after every interrupt.
    """
    deadline_s = time.monotonic() + GRACE_S

    def wait() -> None:
        before()
        for call in calls:
            call.wait(deadline_s - time.monotonic())

    _persist(wait)
    if left := sum(not call.done for call in calls):
        _log.warning("%d calls did not end within %g s", left, GRACE_S)


def _persist(wait: Callable[[], None]) -> None:
    try:
        wait()
    except BaseException:
        _persist(wait)
        raise
