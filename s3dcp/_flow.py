"""How much at once, and what to do when a request fails.

Retrying is done here and nowhere else: botocore is told to try once. Every attempt is a new
request with a signature of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from s3dcp._config import ChecksumName
from s3dcp._errors import S3Exception, ThrottledError
from s3dcp._store import Store

T = TypeVar("T")

_log = logging.getLogger("s3dcp.flow")

# "Full jitter" (AWS Architecture Blog, Exponential Backoff And Jitter): any moment up to the bound
# is as good as another, so that clients that failed together do not come back together.
_BASE_S = 0.05
_THROTTLED_BASE_S = 0.5
_MAX_DELAY_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed request is sent again.

    Args:
        max_attempts: Tries of one request, the first included.
        jitter: A number in [0, 1); injected by tests.
        sleep: Waits for seconds; injected by tests.
    """

    max_attempts: int = 10
    jitter: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def delay_s(self, failures: int, error: S3Exception) -> float:
        """Return how long to wait after the `failures`-th failure, in seconds."""
        base = _THROTTLED_BASE_S if isinstance(error, ThrottledError) else _BASE_S
        return self.jitter() * min(_MAX_DELAY_S, base * 2.0 ** (failures - 1))


class Slots:
    """How many requests may be on the wire at once.

    Waiting happens here rather than in the connection pool, so that a request is signed, and its
    timeouts start, only when it can be sent.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._semaphore = asyncio.Semaphore(count)

    async def __aenter__(self) -> None:
        await self._semaphore.acquire()

    async def __aexit__(self, *exc_info: object) -> None:
        self._semaphore.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """A store, and what all requests to it share.

    Args:
        store: Where requests go.
        slots: How many may be on the wire.
        retry: What follows a failure.
        checksum: The checksum that uploads carry.
    """

    store: Store
    slots: Slots
    retry: RetryPolicy
    checksum: ChecksumName | None

    async def request(
        self, what: str, send: Callable[[], Awaitable[T]], *, max_attempts: int | None = None
    ) -> T:
        """Await `send()` until it succeeds, fails for good, or has failed often enough.

        Args:
            what: The request, for the log.
            send: Makes one attempt.
            max_attempts: Less than the policy's, where more would not help.

        Raises:
            S3Exception: the last attempt's error.
        """
        failures = 0
        while True:
            try:
                async with self.slots:
                    return await send()
            except S3Exception as exc:
                failures += 1
                limits = (self.retry.max_attempts, max_attempts, exc.max_attempts)
                if not exc.retryable or failures >= min(n for n in limits if n is not None):
                    raise
                delay_s = self.retry.delay_s(failures, exc)
                _log.debug("%s failed, again in %.2f s: %s", what, delay_s, exc)
                await self.retry.sleep(delay_s)


async def wait_all(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Await calls together; if one fails, cancel the others and raise its error alone."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_invoke(call)) for call in calls]
    except BaseExceptionGroup as exc:
        error = exc.exceptions[0]
        raise error from error.__cause__
    return [task.result() for task in tasks]


async def _invoke(call: Callable[[], Awaitable[T]]) -> T:
    return await call()
