"""The thread that does all I/O: one event loop, and the calls into it.

Rules:
- A portal starts its loop thread and its worker threads at once and never starts another, because
  Python 3.12 and later start no threads while the interpreter exits, and an `async_save` may still
  be in flight then. For the same reason work is handed to our own executor: those of
  `concurrent.futures` refuse it from that moment on.
- A call names a function, not a coroutine object, so that a refused call leaves nothing un-awaited.
- A call that is given up (Ctrl-C, a cancelled task) cancels its task and waits for it to end,
  within a grace: until then the loop may still be writing into the caller's memory.
- A call from the portal's own thread would wait for itself, and is refused.
- After a fork the child has no threads; `portal()` makes it a new one.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar, cast

from s3dcp._errors import PortalError

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("s3dcp.portal")

#: Seconds that a given-up call may take to let go of the caller's memory.
GRACE_S = 10.0
#: Threads for work that would hold up the loop. Checksums and copies release the GIL.
_WORKERS = min(4, os.cpu_count() or 1)


class _Workers(ThreadPoolExecutor):
    """Daemon threads that accept work for as long as the process lives.

    A `ThreadPoolExecutor` in type only, which is what `loop.set_default_executor` asks for.
    """

    def __init__(self, count: int) -> None:
        super().__init__(max_workers=count)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._daemons = [
            threading.Thread(target=self._run, name=f"s3dcp-worker-{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._daemons:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as exc:  # noqa: BLE001 - it belongs to whoever waits
                    future.set_exception(exc)

        self._jobs.put(job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        for _ in self._daemons:
            self._jobs.put(None)
        if wait:
            for thread in self._daemons:
                thread.join(GRACE_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            # A job holds on to its arguments, tensors among them, until the next one comes.
            del job


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Portal:
    """An event loop on a thread of its own.

    Args:
        loop_factory: Makes the loop; by default uvloop's where that is installed.

    Raises:
        PortalError: the thread could not start its loop.
    """

    def __init__(
        self, loop_factory: Callable[[], asyncio.AbstractEventLoop] = _new_event_loop
    ) -> None:
        self._tasks: dict[Future[Any], asyncio.Task[Any]] = {}
        # Held to hand the loop a callback, and to close: none is queued behind the loop's end. A
        # finalizer may come in between on the same thread.
        self._gate = threading.RLock()
        self._closing = False
        self._pid = os.getpid()  # a fork has the loop, and no thread that runs it
        self._closers: list[Callable[[], Awaitable[None]]] = []
        ready: Future[asyncio.AbstractEventLoop] = Future()
        self._workers = _Workers(_WORKERS)
        self._thread = threading.Thread(
            target=self._run, args=(loop_factory, ready), name="s3dcp-portal", daemon=True
        )
        self._thread.start()
        try:
            self._loop = ready.result()
        except Exception as exc:
            self._workers.shutdown(wait=False)
            raise PortalError(f"The I/O thread could not start: {exc}") from exc

    def _run(
        self,
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        ready: Future[asyncio.AbstractEventLoop],
    ) -> None:
        try:
            loop = loop_factory()
        except BaseException as exc:  # noqa: BLE001 - the constructor raises it
            ready.set_exception(exc)
            return
        asyncio.set_event_loop(loop)
        loop.set_default_executor(self._workers)
        loop.call_soon(ready.set_result, loop)
        try:
            loop.run_forever()
        finally:
            loop.close()
            for future in self._tasks:  # whose tasks the end of the loop has taken along
                future.set_exception(PortalError("The I/O thread ended before the call did"))

    @property
    def is_alive(self) -> bool:
        """Whether calls are answered."""
        # Not the thread's own word: an interrupt inside `Thread.is_alive` marks a running thread
        # as ended (CPython 3.11).
        return not self._loop.is_closed() and self._pid == os.getpid()

    def submit(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Run an async function on the portal and return a future of its outcome.

        To give it up, use `cancel`: the future itself cannot be cancelled.

        Raises:
            PortalError: the portal is closed.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def start() -> None:
            task = self._loop.create_task(_invoke(function, *args, **kwargs))
            self._tasks[future] = task
            task.add_done_callback(finish)

        def finish(task: asyncio.Task[T]) -> None:
            del self._tasks[future]
            if task.cancelled():
                future.set_exception(PortalError("The call was cancelled"))
            elif exc := task.exception():
                future.set_exception(exc)
            else:
                future.set_result(task.result())

        self._call_soon(start)
        return future

    def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run an async function on the portal and wait for its outcome.

        Raises:
            PortalError: the portal is closed, or this is its own thread.
            BaseException: whatever the function raised.
        """
        self._refuse_own_thread()
        future = self.submit(function, *args, **kwargs)
        return self.wait(future)

    def wait(self, future: Future[T]) -> T:
        """Wait for a submitted call; an interrupt cancels it first and then goes on."""
        try:
            return future.result()
        except BaseException:
            if not future.done():
                self.cancel([future])
            raise

    async def run(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await an async function that runs on the portal, from any event loop.

        Cancelling the caller cancels the function, and waits for it to end.
        """
        if asyncio.get_running_loop() is self._loop:
            return await function(*args, **kwargs)
        future = self.submit(function, *args, **kwargs)
        waiter = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            self.cancel_soon([future])
            await _settled(waiter, GRACE_S)
            raise

    def cancel(self, futures: list[Future[Any]]) -> None:
        """Cancel submitted calls and wait, within the grace, until all have ended."""
        self.cancel_soon(futures)
        ended = threading.Event()
        pending = [future for future in futures if not future.done()]
        left = len(pending)
        lock = threading.Lock()

        def count(_: Future[Any]) -> None:
            nonlocal left
            with lock:
                left -= 1
                if not left:
                    ended.set()

        for future in pending:
            future.add_done_callback(count)
        if pending and not ended.wait(GRACE_S):
            _log.warning("%d cancelled calls did not end within %g s", left, GRACE_S)

    def cancel_soon(self, futures: list[Future[Any]]) -> None:
        """Ask for calls to be cancelled without waiting: for finalizers, on whichever thread."""

        def cancel() -> None:
            for future in futures:
                if task := self._tasks.get(future):
                    task.cancel()

        try:
            self._call_soon(cancel)
        except PortalError:
            _log.debug("nothing to cancel: the portal is closed")

    def at_close(self, function: Callable[[], Awaitable[None]]) -> None:
        """Await `function` when the portal closes, before its loop stops."""
        self._closers.append(function)

    def close(self) -> None:
        """Cancel what is running, close what is open, end the threads. Idempotent."""
        if not self.is_alive:
            return
        self._refuse_own_thread()
        with self._gate:
            shutting = None if self._closing else self.submit(self._shut)
            self._closing = True
        if shutting is None:  # another thread is at it
            self._thread.join(GRACE_S)
            return
        try:
            shutting.result(GRACE_S)
        except Exception:  # noqa: BLE001 - whatever is left, the threads are to end
            _log.debug("closing the portal", exc_info=True)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GRACE_S)
        self._workers.shutdown()

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=GRACE_S)
        await self._loop.shutdown_asyncgens()
        for closer in self._closers:
            try:
                await closer()
            except Exception:  # noqa: BLE001 - the others are to be closed all the same
                _log.debug("closing the portal", exc_info=True)

    def _call_soon(self, function: Callable[[], None]) -> None:
        if not self.is_alive:
            raise PortalError("The I/O thread has ended and takes no more calls")
        with self._gate:
            if self._closing:
                raise PortalError("The I/O thread is closing and takes no more calls")
            try:
                self._loop.call_soon_threadsafe(function)
            except RuntimeError as exc:
                raise PortalError(f"The I/O thread takes no more calls: {exc}") from exc

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise PortalError("A blocking call from the I/O thread would wait for itself")


async def _settled(waiter: asyncio.Future[Any], grace_s: float) -> None:
    """Wait for a future within the grace, however often the waiting is cancelled."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    while not waiter.done() and (left_s := deadline - loop.time()) > 0:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([waiter], timeout=left_s)
    if waiter.done() and not waiter.cancelled():
        waiter.exception()  # retrieved, or asyncio complains of it later


class Calls:
    """Calls that are given up together, those included whose submission was interrupted.

    An interrupt may strike between the moment a call is handed to the loop and the moment the
    caller has its future. So it is the loop that keeps the list.

    Args:
        portal: Where they run.
    """

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._running: set[asyncio.Task[Any]] = set()  # touched by the loop alone

    def submit(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Run an async function, as `Portal.submit` does."""

        async def tracked() -> T:
            task = cast("asyncio.Task[Any]", asyncio.current_task())
            self._running.add(task)
            try:
                return await function(*args, **kwargs)
            finally:
                self._running.discard(task)

        return self._portal.submit(tracked)

    def cancel(self) -> None:
        """Cancel all of them, and wait within the grace until they have let go of their memory."""
        try:
            self._portal.call(self._cancel)
        except PortalError:
            _log.debug("nothing to cancel: the portal is closed")

    async def _cancel(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=GRACE_S)


async def _invoke(function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    return await function(*args, **kwargs)


async def offload(function: Callable[P, T], *args: P.args) -> T:  # type: ignore[valid-type]
    """Run a function that takes its time on a worker thread of the running loop."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


_lock = threading.Lock()
_portal: Portal | None = None


def portal() -> Portal:
    """Return this process's portal, started on the first call."""
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
    _lock = threading.Lock()  # another thread of the parent may have held it
    _portal = None


atexit.register(_close_portal)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_portal)
