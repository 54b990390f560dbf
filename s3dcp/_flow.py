"""How much at once, and what to do when a request fails.

Retrying is done here and nowhere else: botocore is told to try once. Every attempt is a new
request with a signature of its own. It needs a slot, and a turn of its prefix where that has been
throttled; it holds no slot while it waits for a turn, so that no prefix holds up another. What is
tried again goes before what has not been tried: it has a deadline, which is the store's to use up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from s3dcp._config import ChecksumName
from s3dcp._errors import S3Exception, ThrottledError
from s3dcp._keys import S3Uri
from s3dcp._pacing import Answer, Lanes, Prefix, Queue, Turn, prefix_of
from s3dcp._store import Store
from s3dcp._tally import Tally

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
        timeout_s: Seconds from the first try's start on after which there is no other, waiting
            included. A try that is under way then goes on: while bytes move it is not failing,
            and once they do not, the read timeout ends it.
        jitter: A number in [0, 1); injected by tests.
        sleep: Waits for seconds; injected by tests.
        clock: Seconds; injected by tests.
    """

    max_attempts: int = 10
    timeout_s: float = math.inf
    jitter: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic

    def delay_s(self, failures: int, error: S3Exception) -> float:
        """Return how long to wait after the `failures`-th failure, in seconds.

        At least as long as the store asks for, within the same bound as any delay.
        """
        base = _THROTTLED_BASE_S if isinstance(error, ThrottledError) else _BASE_S
        delay_s = self.jitter() * min(_MAX_DELAY_S, base * 2.0 ** (failures - 1))
        return max(delay_s, min(error.retry_after_s or 0.0, _MAX_DELAY_S))

    def next_delay_s(
        self,
        failures: int,
        error: S3Exception,
        elapsed_s: float,
        max_attempts: int | None = None,
    ) -> float | None:
        """Return how long to wait before the next try, or None if that was the last.

        Args:
            failures: How often the request has failed.
            error: How it did the last time.
            elapsed_s: Seconds since it was first sent.
            max_attempts: Less than the policy's, where more would not help.
        """
        limits = (self.max_attempts, max_attempts, error.max_attempts)
        if failures >= min(n for n in limits if n is not None):
            return None
        delay_s = self.delay_s(failures, error)
        return delay_s if elapsed_s + delay_s <= self.timeout_s else None


class Slots:
    """How many requests may be on the wire at once.

    Waiting happens here rather than in the connection pool, so that a request is signed, and its
    timeouts start, only when it can be sent.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = count
        self._waiting: Queue[asyncio.Future[None]] = Queue()

    async def acquire(self, *, retry: bool = False) -> None:
        """Wait for a slot: first come, first served, but for retries, which go first."""
        if self._free:
            self._free -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(waiter, retry=retry)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self.release()  # it came, too late
            raise

    def release(self) -> None:
        """Give a slot to the next."""
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.done():  # cancelled
                waiter.set_result(None)
                return
        self._free += 1


class Pacer:
    """Lets requests start, as many at once as their prefix bears.

    Used on one loop, by all channels to one endpoint.

    Args:
        clock: Seconds; injected by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lanes: Lanes[asyncio.Future[Turn]] = Lanes(clock)

    async def enter(self, uri: S3Uri, slots: Slots, *, retry: bool = False) -> Turn:
        """Wait until a request may start, and return what `leave` wants back.

        Those that wait for their prefix hold no slot. Within a prefix they go in order, retries
        first.
        """
        await slots.acquire(retry=retry)
        prefix = prefix_of(uri)
        turn = self.lanes.enter(prefix)
        if turn is not None:
            return turn
        slots.release()  # at once, to whoever is next: no prefix holds up another
        turn = await self._wait(prefix, retry=retry)
        try:
            await slots.acquire(retry=retry)
        except BaseException:
            self._give_back(turn, Answer.NOTHING)
            raise
        return turn

    def leave(self, turn: Turn, slots: Slots, answer: Answer) -> None:
        """Let the next requests start."""
        slots.release()
        self._give_back(turn, answer)
        if answer is Answer.THROTTLED:
            lane = turn.lane
            _log.debug("s3://%s/%s: at most %.1f requests at once", *lane.prefix, lane.limit)

    async def _wait(self, prefix: Prefix, *, retry: bool) -> Turn:
        waiter: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self.lanes.wait(prefix, waiter, retry=retry)
        try:
            return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._give_back(waiter.result(), Answer.NOTHING)  # it came, too late
            raise

    def _give_back(self, turn: Turn, answer: Answer) -> None:
        left = self.lanes.leave(turn, answer)
        if not left:
            return
        given = deque(left)
        while given:
            waiter, turn = given.popleft()
            if waiter.done():  # cancelled, and has not run since
                given.extend(self.lanes.leave(turn, Answer.NOTHING))
            else:
                waiter.set_result(turn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """A store, and what all requests to it share.

    Args:
        store: Where requests go.
        slots: How many may be on the wire.
        retry: What follows a failure.
        checksum: The checksum that uploads carry.
        pacer: How many may be, of each prefix.
        tally: Counts them.
    """

    store: Store
    slots: Slots
    retry: RetryPolicy
    checksum: ChecksumName | None
    pacer: Pacer = field(default_factory=Pacer)
    tally: Tally = field(default_factory=Tally)

    def counting(self, tally: Tally) -> Channel:
        """Return the same channel, whose requests are counted by another tally."""
        return replace(self, tally=tally)

    async def request(
        self,
        operation: str,
        uri: S3Uri,
        send: Callable[[], Awaitable[T]],
        *,
        size_bytes: int = 0,
        max_attempts: int | None = None,
    ) -> T:
        """Await `send()` until it succeeds, fails for good, or has failed for too long.

        Args:
            operation: S3's name of the request, for the log and the tally.
            uri: What it is about, which says what it is throttled with.
            send: Makes one attempt.
            size_bytes: Of the object's own bytes that it moves, for the tally.
            max_attempts: Less than the policy's, where more would not help.

        Raises:
            S3Exception: the last attempt's error. If it was worth another attempt, its message
                says after how many, and how many seconds, it was given up.
        """
        retry = self.retry
        failures = 0
        turn = await self.pacer.enter(uri, self.slots)
        started_s = retry.clock()
        while True:
            try:
                return await self._send(turn, operation, send, size_bytes, retry=failures > 0)
            except S3Exception as exc:
                if not exc.retryable:
                    raise
                failures += 1
                elapsed_s = retry.clock() - started_s
                delay_s = retry.next_delay_s(failures, exc, elapsed_s, max_attempts)
                if delay_s is None:
                    _give_up(exc, failures, elapsed_s)
                    raise
                _log.debug("%s %s failed, again in %.2f s: %s", operation, uri, delay_s, exc)
                await retry.sleep(delay_s)
                left_s = started_s + retry.timeout_s - retry.clock()
                try:
                    async with asyncio.timeout(left_s):
                        turn = await self.pacer.enter(uri, self.slots, retry=True)
                except TimeoutError:  # others that were tried again went first
                    _give_up(exc, failures, retry.clock() - started_s)
                    raise exc from exc.__cause__

    async def attempt(
        self,
        operation: str,
        uri: S3Uri,
        send: Callable[[], Awaitable[T]],
        *,
        size_bytes: int = 0,
        retry: bool = False,
    ) -> T:
        """Await `send()` once, in its turn; `retry` says that it repeats one that failed.

        For those who decide for themselves what follows a failure.
        """
        turn = await self.pacer.enter(uri, self.slots, retry=retry)
        return await self._send(turn, operation, send, size_bytes, retry=retry)

    async def _send(
        self,
        turn: Turn,
        operation: str,
        send: Callable[[], Awaitable[T]],
        size_bytes: int,
        *,
        retry: bool,
    ) -> T:
        clock = self.retry.clock
        answer = Answer.NOTHING
        started_s = clock()
        try:
            result = await send()
        except S3Exception as exc:
            if isinstance(exc, ThrottledError):
                answer = Answer.THROTTLED
            self.tally.add(operation, clock() - started_s, error=exc, retry=retry)
            raise
        else:
            answer = Answer.SERVED
            self.tally.add(operation, clock() - started_s, size_bytes, retry=retry)
            return result
        finally:
            self.pacer.leave(turn, self.slots, answer)


def _give_up(error: S3Exception, attempts: int, seconds: float) -> None:
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    error.message = f"{error.message} (given up after {tries} in {seconds:.1f} s)"


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
