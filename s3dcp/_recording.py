"""One rank's save or load while it goes on: requests, bytes, phases; and its report in the end.

DCP does not tell a writer or reader that another rank has failed, or the planner. So a recording
that nobody has ended is ended when its writer or reader saves or loads again; when that is gone, as
soon as another one saves or loads; or when the process ends. Not by a finalizer: it would come in
between anywhere, and whom it tells may wait for a lock that is held there.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import torch.distributed as dist

from s3dcp import _telemetry as telemetry
from s3dcp._config import check_callable
from s3dcp._planning import PlanningPause
from s3dcp._progress import Bar, Meter, ProgressCallback, check_progress
from s3dcp._report import Report
from s3dcp._tally import Tally

_log = logging.getLogger("s3dcp.reports")

#: What is told of reports, on the thread that saved or loaded; or, of what DCP gave up without a
#: word, on the next one that does. What it raises is logged.
ReportCallback = Callable[[Report], object]


@dataclass(frozen=True, slots=True)
class Audience:
    """Who is told.

    Args:
        progress: True for a bar, or a callback.
        on_report: Is given the report.

    Raises:
        S3ConfigError: `progress` is neither, or tqdm is missing; or `on_report` is no callback.
    """

    progress: bool | ProgressCallback = False
    on_report: ReportCallback | None = None

    def __post_init__(self) -> None:
        check_progress(self.progress)
        check_callable("on_report", self.on_report)


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
        planning_pause: Of the collector; for whoever plans to begin, and ended with the rest.
    """

    def __init__(self, operation: Literal["save", "load"], uri: str, audience: Audience) -> None:
        self.tally = Tally()
        self.meter = Meter()
        self.planning_pause = PlanningPause()
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

    def identify(self, owner: object, uri: str, rank: int | None, *, is_coordinator: bool) -> None:
        """Take note of what is saved or loaded, and of who does it, as soon as that is known.

        Args:
            owner: The writer or reader, which does one thing at a time.
            uri: The checkpoint's.
            rank: In the group.
            is_coordinator: Whether the rank is the group's coordinator.
        """
        _end_left(lambda other: other is None or other is owner)
        _begun[self] = weakref.ref(owner)
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

    def finish_bytes(self) -> None:
        """All bytes of the rank are done, and so is its bar, whatever becomes of other ranks."""
        self.meter.finish()
        self._close_bar()

    def end(self, error: BaseException | None = None) -> None:
        """End it, once: log, export and hand over the report."""
        self._end(None if error is None else type(error).__name__)

    def _end(self, error: str | None) -> None:
        self.planning_pause.end()
        if self._ended or (self._rank is None and not self._phases):  # or has not begun
            return
        self._ended = True
        _begun.pop(self, None)
        self._error = error
        self._close_bar()
        report = self.report()
        _log.info("%s", report)
        _log.debug("%s", report.totals)
        telemetry.export(report, self._context)
        if self._audience.on_report is not None:
            try:
                self._audience.on_report(report)
            except Exception:  # noqa: BLE001 - what is reported has happened
                _log.warning("on_report failed", exc_info=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

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


# Those that have begun and not ended, and whose they are.
_begun: dict[Recording, weakref.ref[object]] = {}


def _end_left(is_left: Callable[[object], bool] = lambda _: True) -> None:
    """End recordings whose owners satisfy `is_left`; an owner that is gone is None."""
    for recording, owner in list(_begun.items()):
        if is_left(owner()) and _begun.pop(recording, None) is not None:  # nobody else ends it
            recording._end("unknown")  # noqa: SLF001 - that is this module's


atexit.register(_end_left)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begun.clear)  # they go on in the parent


def _rank() -> int:
    """Return this process's rank in the job; groups have ranks, and coordinators, of their own."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
