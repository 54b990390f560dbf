"""What a save or a load reports when it has ended: how much, how long, what went wrong, what cost.

A report is one rank's. It is a value: it pickles, compares, and is the line that is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from s3dcp._tally import OperationTotals, Totals, shown_bytes

_FREE = frozenset({"DeleteObject", "AbortMultipartUpload"})
_READS = frozenset({"GetObject", "HeadObject"})
_GiB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPrices:
    """What requests cost, in USD for 1,000 of them.

    The defaults are those of S3 Standard in us-east-1, as https://aws.amazon.com/s3/pricing/ had
    them in 2025. Nobody keeps them up to date: pass those of the bucket's region and storage class
    where it matters.

    Args:
        put_usd: For PUT, COPY, POST and LIST requests, and so for each part of an upload.
        get_usd: For GET and HEAD requests.
    """

    put_usd: float = 0.005
    get_usd: float = 0.0004

    def cost_usd(self, totals: Totals) -> float:
        """Return what requests cost, in USD.

        Answers of 5xx are free, throttling among them, and so are deletions and aborted uploads.
        What was lost on its way may have been served, and counts.
        """
        return sum(
            (each.requests - each.throttles - each.server_errors) * self._usd(operation) / 1000
            for operation, each in totals.operations.items()
        )

    def _usd(self, operation: str) -> float:
        if operation in _FREE:
            return 0.0
        return self.get_usd if operation in _READS else self.put_usd


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank did in a save or a load.

    Attributes:
        operation: `save` or `load`.
        uri: The checkpoint's.
        rank: The rank, in the process group that saved or loaded.
        started_at: When it began.
        phases: Seconds, in the order of the phases, which follow each other without a gap.
            Of a save: `stage` (copying for an `async_save`), `plan`, `write`, and where the rank
            commits, `wait` (for other ranks), `commit` and `clean_up` (deleting what the
            checkpoint replaced). Of a load: `metadata`, `plan`, `read`.
        item_bytes: Of the rank's items, as they are stored: tensors, other values, and what
            `torch.save` puts around each.
        totals: The rank's requests.
        error: The name of the error's type, if it failed. `unknown` if DCP alone knows it: under
            plain `dcp.save` and `dcp.load`, where another rank or the planner has failed. Such a
            report comes with the next save or load, or when the process ends.
    """

    operation: Literal["save", "load"]
    uri: str
    rank: int
    started_at: datetime
    phases: Mapping[str, float] = field(default_factory=dict)
    item_bytes: int = 0
    totals: Totals = field(default_factory=lambda: Totals({}))
    error: str | None = None

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(self.phases.values())

    @property
    def gib_per_s(self) -> float:
        """GiB of items for each second of the phase that moves them, `write` or `read`."""
        seconds = self.phases.get("write" if self.operation == "save" else "read", 0.0)
        return self.item_bytes / _GiB / seconds if seconds else 0.0

    @property
    def wire_bytes(self) -> int:
        """Of all bodies that were sent or received whole: items, gaps between them, `.metadata`."""
        return self._overall.size_bytes

    @property
    def requests(self) -> int:
        """How many requests were answered or failed, each attempt counted."""
        return self._overall.requests

    @property
    def retries(self) -> int:
        """How many of those repeated one that had failed."""
        return self._overall.retries

    @property
    def throttles(self) -> int:
        """How many the store refused for being too many."""
        return self._overall.throttles

    @property
    def p50_s(self) -> float:
        """Seconds within which half of the requests ended, failed ones included."""
        return self._overall.quantile_s(0.5)

    @property
    def p99_s(self) -> float:
        """Seconds within which 99 of 100 requests ended, failed ones included."""
        return self._overall.quantile_s(0.99)

    @property
    def _overall(self) -> OperationTotals:
        return self.totals.overall

    def cost_usd(self, prices: RequestPrices | None = None) -> float:
        """Estimate what the requests cost, in USD: storage and traffic not included.

        Args:
            prices: The bucket's. By default those of S3 Standard, as `RequestPrices` has them; the
                line that is logged goes by these.
        """
        return (prices or RequestPrices()).cost_usd(self.totals)

    def __str__(self) -> str:
        done = {"save": "saved", "load": "loaded"}[self.operation]
        if self.error:
            done = f"failed to {self.operation} ({self.error})"
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases.items())
        # A key may hold anything, and this is one line.
        return (
            f"rank {self.rank} {done} {self.uri!r}: {shown_bytes(self.item_bytes)} "
            f"in {self.seconds:.3f} s ({phases or 'nothing done'}), {self.gib_per_s:.3g} GiB/s; "
            f"{self._overall}, about ${self.cost_usd():.6f}"
        )
