"""One rank's save or load while it goes on: requests, bytes, phases; and its report in the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import torch.distributed as dist

from s3dcp import _telemetry as telemetry
from s3dcp._progress import Bar, Meter, ProgressCallback, check_progress
from s3dcp._report import Report
from s3dcp._tally import Tally

_log = logging.getLogger("s3dcp.reports")

#: What is told of reports, on the thread that saved or loaded; what it raises is logged.
ReportCallback = Callable[[Report], object]


@dataclass(frozen=True, slots=True)
class Audience:
    """Who is told.

    Args:
        progress: True for a bar, or a callback.
        on_report: Is given the report.

    Raises:
        S3ConfigError: `progress` is neither, or tqdm is missing.
    """

    progress: bool | ProgressCallback = False
    on_report: ReportCallback | None = None

    def __post_init__(self) -> None:
        check_progress(self.progress)


class Recording:
    """What is known of a save or a load, from its begin to its end.

    Phases follow each other: each lasts from the end of the one before. Belongs to the thread that
    saves or loads; the tally is filled by the portal's.

    Args:
        operation: `save` or `load`.
        uri: The checkpoint's, as far as it is known.
        audience: Who is told.

    Attributes:
        tally: Of its requests.
        meter: Of its items' bytes.
    """

    def __init__(self, operation: Literal["save", "load"], uri: str, audience: Audience) -> None:
        self.tally = Tally()
        self.meter = Meter()
        self._operation = operation
        self._audience = audience
        self._uri = uri
        self._rank: int | None = None
        self._bar: Bar | None = None
        self._context = telemetry.current_context()
        self._started_at = datetime.now(UTC)
        self._lap_s = time.monotonic()
        self._phases: dict[str, float] = {}
        self._error: str | None = None
        self._ended = False

    def __reduce__(self) -> tuple[object, ...]:
        # What has been done here is not another process's business.
        return type(self), (self._operation, self._uri, self._audience)

    def identify(self, uri: str, rank: int | None, *, is_coordinator: bool) -> None:
        """Take note of what is saved or loaded, and of who does it, as soon as that is known."""
        self._uri, self._rank = uri, rank or 0
        progress = self._audience.progress
        if progress is True:
            if is_coordinator and not _rank():
                name = uri.rstrip("/").rpartition("/")[2]
                self._bar = Bar(repr(name)[1:-1])
                self.meter.show(self._bar)
        elif progress is not False:
            self.meter.show(progress)

    def lap(self, phase: str) -> None:
        """End a phase, or go on with the last one up to now."""
        now_s = time.monotonic()
        self._phases[phase] = self._phases.get(phase, 0.0) + now_s - self._lap_s
        self._lap_s = now_s

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """End a phase with the block, and all of it with the block's error."""
        try:
            yield
        except BaseException as exc:
            self.lap(phase)
            self.end(exc)
            raise
        self.lap(phase)

    def end(self, error: BaseException | None = None) -> None:
        """End it, once: log, export and hand over the report."""
        if self._ended or (self._rank is None and not self._phases):  # or has not begun
            return
        self._ended = True
        self._error = None if error is None else type(error).__name__
        if self._bar is not None:
            self._bar.close()
        report = self.report()
        _log.info("%s", report)
        _log.debug("%s", report.totals)
        telemetry.export(report, self._context)
        if self._audience.on_report is not None:
            try:
                self._audience.on_report(report)
            except Exception:  # noqa: BLE001 - what is reported has happened
                _log.warning("on_report failed", exc_info=True)

    def report(self) -> Report:
        """Return what is known so far."""
        return Report(
            operation=self._operation,
            uri=self._uri,
            rank=_rank() if self._rank is None else self._rank,
            started_at=self._started_at,
            phases=dict(self._phases),
            item_bytes=self.meter.done_bytes,
            totals=self.tally.totals(),
            error=self._error,
        )


def _rank() -> int:
    """Return this process's rank in the job; groups have ranks, and coordinators, of their own."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
