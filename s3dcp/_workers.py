"""Threads for work that would hold up the loop. Checksums and copies release the GIL."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers(ThreadPoolExecutor):
    """Daemon threads that accept work for as long as the process lives.

    Those of `concurrent.futures` refuse it from the moment on when the interpreter exits, and an
    `async_save` may still be in flight then. A `ThreadPoolExecutor` in type only, which is what
    `loop.set_default_executor` asks for.

    Args:
        count: How many.
        name: What the threads' names begin with.
    """

    def __init__(self, count: int, name: str = "s3dcp-worker") -> None:
        super().__init__(max_workers=count)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._daemons = [
            threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True)
            for n in range(count)
        ]

    def start(self) -> None:
        """Start all threads.

        Raises:
            RuntimeError: the system, or the exiting interpreter, has no more threads.
        """
        for thread in self._daemons:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on a thread."""
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
        """Let the threads end when they have done what was submitted; `join` waits for that."""
        for _ in self._daemons:
            self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the ends of all threads, for so long altogether."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._daemons:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            # A job holds on to its arguments, tensors among them, until the next one comes.
            del job
