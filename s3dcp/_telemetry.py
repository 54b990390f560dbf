"""Reports as OpenTelemetry spans and metrics, where `opentelemetry-api` is installed.

Everything is emitted when a save or load has ended, from its report: nothing is left open by one
that never ends, and nothing is done per request. Spans carry the times at which things happened,
and are children of the span that was current where the save or load began.

| spans              | for each rank                                                   |
|--------------------|-----------------------------------------------------------------|
| `s3dcp.save`       | with a child for each phase, such as `s3dcp.save.write`         |
| `s3dcp.load`       | the same                                                        |

| metrics            | unit        | attributes besides `s3dcp.operation`                |
|--------------------|-------------|-----------------------------------------------------|
| `s3dcp.duration`   | s           | `s3dcp.phase`; `error.type` where it failed         |
| `s3dcp.items`      | By          |                                                     |
| `s3dcp.requests`   | {request}   | `rpc.method`, S3's name                             |
| `s3dcp.retries`    | {request}   | `rpc.method`                                        |
| `s3dcp.throttles`  | {request}   | `rpc.method`                                        |
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from s3dcp._report import Report

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

_log = logging.getLogger("s3dcp.telemetry")


def current_context() -> Context | None:
    """Return this thread's context; None where nobody asks for it."""
    if _instruments() is None:
        return None
    from opentelemetry import context

    return context.get_current()


def export(report: Report, context: Context | None) -> None:
    """Emit a report's spans and metrics.

    Args:
        report: Of a save or load that has ended.
        context: Where it began.
    """
    instruments = _instruments()
    if instruments is None:
        return
    try:
        _emit_spans(report, context)
        instruments.count(report)
    except Exception:  # noqa: BLE001 - what is reported has happened
        _log.warning("OpenTelemetry did not take the report of %s", report.uri, exc_info=True)


def _emit_spans(report: Report, context: Context | None) -> None:
    from opentelemetry import trace

    tracer = trace.get_tracer("s3dcp")
    name = f"s3dcp.{report.operation}"
    attributes: dict[str, AttributeValue] = {
        "s3dcp.uri": report.uri,
        "s3dcp.rank": report.rank,
        "s3dcp.item_bytes": report.item_bytes,
        "s3dcp.wire_bytes": report.wire_bytes,
        "s3dcp.requests": report.requests,
        "s3dcp.retries": report.retries,
        "s3dcp.throttles": report.throttles,
    }
    at_ns = int(report.started_at.timestamp() * 1e9)
    whole = tracer.start_span(name, context, start_time=at_ns, attributes=attributes)
    inside = trace.set_span_in_context(whole, context)
    for phase, seconds in report.phases.items():
        part = tracer.start_span(f"{name}.{phase}", inside, start_time=at_ns)
        at_ns += int(seconds * 1e9)
        part.end(at_ns)
    if report.error is not None:
        whole.set_attribute("error.type", report.error)
        whole.set_status(trace.StatusCode.ERROR)
    whole.end(at_ns)


class _Instruments:
    """The metrics, made once: a second of the same name is a mistake to OpenTelemetry."""

    def __init__(self) -> None:
        from opentelemetry import metrics

        meter = metrics.get_meter("s3dcp")
        self._duration = meter.create_histogram(
            "s3dcp.duration", "s", "Phases of checkpoint saves and loads"
        )
        self._items = meter.create_counter("s3dcp.items", "By", "Items saved and loaded")
        self._requests = meter.create_counter("s3dcp.requests", "{request}", "Requests to S3")
        self._retries = meter.create_counter("s3dcp.retries", "{request}", "Repeated requests")
        self._throttles = meter.create_counter(
            "s3dcp.throttles", "{request}", "Refused as too many"
        )

    def count(self, report: Report) -> None:
        operation = {"s3dcp.operation": report.operation}
        failed = {} if report.error is None else {"error.type": report.error}
        for phase, seconds in report.phases.items():
            self._duration.record(seconds, operation | failed | {"s3dcp.phase": phase})
        self._items.add(report.item_bytes, operation)
        for method, totals in report.totals.operations.items():
            attributes = operation | {"rpc.method": method}
            self._requests.add(totals.requests, attributes)
            self._retries.add(totals.retries, attributes)
            self._throttles.add(totals.throttles, attributes)


@functools.cache
def _instruments() -> _Instruments | None:
    try:
        return _Instruments()
    except ImportError:
        return None
