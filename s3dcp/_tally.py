"""Counts of requests: how many, how much, how long, and what went wrong."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from s3dcp._errors import (
    S3ConnectionError,
    S3Exception,
    S3TimeoutError,
    ServerError,
    ThrottledError,
)

# Seconds of requests are counted in 84 buckets, 4 to every doubling from 0.5 ms to a quarter of an
# hour: quantiles are at most 19 % too high, whatever the number of requests.
_BOUNDS_S = tuple(0.0005 * 2 ** (n / 4) for n in range(84))
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationTotals:
    """What is known of all requests of one kind.

    Attributes:
        requests: How many were answered or failed, each attempt counted.
        retries: How many of those repeated one that had failed.
        size_bytes: Of the objects' own bytes in what succeeded.
        throttles: Requests that the store refused for being too many.
        timeouts: Requests whose peer stopped reading or writing.
        lost_connections: Requests without an answer, or with one that was cut short.
        server_errors: Requests that the store failed to serve (5xx).
        max_s: The longest request.
        buckets: How many requests took how long.
    """

    requests: int = 0
    retries: int = 0
    size_bytes: int = 0
    throttles: int = 0
    timeouts: int = 0
    lost_connections: int = 0
    server_errors: int = 0
    max_s: float = 0.0
    buckets: tuple[int, ...] = field(default=(0,) * (len(_BOUNDS_S) + 1), repr=False)

    def quantile_s(self, share: float) -> float:
        """Return the seconds within which this share of the requests ended, failed ones included.

        Too high by at most 19 %, and by at most half a millisecond.
        """
        rank = max(1, math.ceil(share * self.requests))
        seen = 0
        for bound_s, count in zip(_BOUNDS_S, self.buckets, strict=False):
            seen += count
            if seen >= rank:
                return min(bound_s, self.max_s)
        return self.max_s

    def __add__(self, other: OperationTotals) -> OperationTotals:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        buckets = tuple(a + b for a, b in zip(self.buckets, other.buckets, strict=True))
        return OperationTotals(**sums, max_s=max(self.max_s, other.max_s), buckets=buckets)

    def __str__(self) -> str:
        troubles = [(name, getattr(self, name)) for name in _TROUBLES]
        return ", ".join(
            [
                f"requests {self.requests}",
                shown_bytes(self.size_bytes),
                f"p50 {self.quantile_s(0.5):.3g} s",
                f"p99 {self.quantile_s(0.99):.3g} s",
                *(f"{name.replace('_', ' ')} {count}" for name, count in troubles if count),
            ]
        )


_COUNTS = [f.name for f in fields(OperationTotals) if f.name not in {"max_s", "buckets"}]
_TROUBLES = ("retries", "throttles", "timeouts", "lost_connections", "server_errors")


@dataclass(frozen=True, slots=True)
class Totals:
    """What a tally held: by operation, under S3's names, in the order of their first requests."""

    operations: Mapping[str, OperationTotals]

    @property
    def overall(self) -> OperationTotals:
        """All operations together."""
        return sum(self.operations.values(), OperationTotals())

    def __str__(self) -> str:
        shown = [f"{name}: {totals}" for name, totals in self.operations.items()]
        return "; ".join(shown) or "no requests"


class _Counts:
    """An operation's counts while they grow."""

    __slots__ = (*_COUNTS, "buckets", "max_s")

    def __init__(self) -> None:
        self.requests = self.retries = self.size_bytes = 0
        self.throttles = self.timeouts = self.lost_connections = self.server_errors = 0
        self.max_s = 0.0
        self.buckets = [0] * (len(_BOUNDS_S) + 1)

    def fail(self, error: S3Exception) -> None:
        # A timeout is a lost connection too, and counts once.
        if isinstance(error, ThrottledError):
            self.throttles += 1
        elif isinstance(error, S3TimeoutError):
            self.timeouts += 1
        elif isinstance(error, S3ConnectionError):
            self.lost_connections += 1
        elif isinstance(error, ServerError):
            self.server_errors += 1

    def frozen(self) -> OperationTotals:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return OperationTotals(**counts, max_s=self.max_s, buckets=tuple(self.buckets))


class Tally:
    """Counts the requests of a save, of a load, or of a process, in memory that does not grow.

    Filled on the portal's loop; `totals` may be asked for on any thread.
    """

    def __init__(self) -> None:
        self._operations: dict[str, _Counts] = {}

    def add(
        self,
        operation: str,
        seconds: float,
        size_bytes: int = 0,
        *,
        error: S3Exception | None = None,
        retry: bool = False,
    ) -> None:
        """Count one request that has ended.

        Args:
            operation: S3's name, such as `UploadPart`.
            seconds: From its start to its end, waiting for its turn not included.
            size_bytes: Of the object's own bytes that it moved; none if it failed.
            error: How it failed, if it did.
            retry: Whether it repeated one that had failed.
        """
        counts = self._counts(operation)
        counts.requests += 1
        counts.retries += retry
        counts.buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        counts.max_s = max(counts.max_s, seconds)
        if error is None:
            counts.size_bytes += size_bytes
        else:
            counts.fail(error)

    def add_bytes(self, operation: str, size_bytes: int) -> None:
        """Count bytes of a request that could not say how many they would be."""
        self._counts(operation).size_bytes += size_bytes

    def totals(self) -> Totals:
        """Return what was counted so far."""
        # A list first: that is one step for other threads, a comprehension is many.
        return Totals({name: counts.frozen() for name, counts in list(self._operations.items())})

    def _counts(self, operation: str) -> _Counts:
        counts = self._operations.get(operation)
        if counts is None:
            counts = self._operations[operation] = _Counts()
        return counts


def shown_bytes(size_bytes: int) -> str:
    for unit, name in _UNITS:
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} B"
