"""Which request is played which fault."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from threading import Condition, Lock

from s3dcp.testing._faults import Fault
from s3dcp.testing._records import Record

_WAIT_S = 60.0


class Gate:
    """An event that coroutines wait for and any thread opens."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open = False
        self._events: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def open(self) -> None:
        """Let all pass, now and later."""
        with self._lock:
            self._open = True
            for loop, event in self._events:
                with suppress(RuntimeError):  # the loop has ended, and so has who waited
                    loop.call_soon_threadsafe(event.set)
            self._events.clear()

    def event(self) -> asyncio.Event:
        """Return an event of the running loop that is set when the gate is opened."""
        event = asyncio.Event()
        with self._lock:
            if self._open:
                event.set()
            else:
                self._events.append((asyncio.get_running_loop(), event))
        return event


@dataclass(kw_only=True, eq=False)
class Rule:
    """A fault, and the requests that it is played to.

    Attributes:
        fault: What is played.
        operation: S3's name for the operation, "Connect" for a new connection; any by default.
        key: A shell pattern of the keys; any by default.
        index: The index of one request among all of the server's.
        where: Further asked of a request's record.
        skip: How many requests that fit are let pass first.
        times: How many are then played the fault; all by default.
        struck: The records of those that were.
    """

    fault: Fault
    operation: str | None = None
    key: str | None = None
    index: int | None = None
    where: Callable[[Record], bool] | None = None
    skip: int = 0
    times: int | None = 1
    struck: list[Record] = field(default_factory=list)
    gate: Gate = field(default_factory=Gate, repr=False)
    _seen: int = field(default=0, init=False)
    _condition: Condition = field(default_factory=Condition, init=False, repr=False)

    def takes(self, record: Record) -> bool:
        """Decide for one request, and count it."""
        if (
            record.operation != self.operation
            if self.operation is not None
            else record.operation == "Connect"
        ):
            return False
        if self.key is not None and not fnmatchcase(record.key, self.key):
            return False
        if self.index is not None and record.index != self.index:
            return False
        if self.where is not None and not self.where(record):
            return False
        self._seen += 1
        nth = self._seen - self.skip
        return nth >= 1 and (self.times is None or nth <= self.times)

    def note(self, record: Record) -> None:
        """Remember that the fault was played, or that it is stalling."""
        with self._condition:
            if not any(each is record for each in self.struck):
                self.struck.append(record)
                self._condition.notify_all()

    def wait(self, times: int = 1, timeout_s: float = _WAIT_S) -> Record:
        """Block until the fault has struck: until it was played, or began to stall.

        Returns:
            The record of the last request that it struck.

        Raises:
            TimeoutError: It has not, `times` times.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: len(self.struck) >= times, timeout_s):
                raise TimeoutError(f"{self.fault} struck {len(self.struck)} times, not {times}")
            return self.struck[-1]

    def release(self) -> None:
        """Let what is stalled go on, and stall no more."""
        self.gate.open()
