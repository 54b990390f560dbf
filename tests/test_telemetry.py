"""Spans and metrics, as an OpenTelemetry SDK receives them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import s3dcp
from s3dcp import CheckpointExistsError, Report, S3ClientConfig, S3StorageWriter
from s3dcp import _telemetry as telemetry
from s3dcp.testing import FakeS3, slow_down
from tests._fakes import uri_of
from tests._states import MiB, StateDict, blank, fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

URI = uri_of("run/step-1")
CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True)
SAVED = ["plan", "write", "wait", "commit"]

Points = dict[tuple[str, frozenset[tuple[str, object]]], Any]


class Collected:
    """What an SDK was given."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracers, self.meters = tracers, MeterProvider([self.reader])

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def points(self) -> Points:
        """Return all points by their metrics' names and attributes."""
        data = self.reader.get_metrics_data()
        return {
            (metric.name, frozenset((point.attributes or {}).items())): point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collected]:
    """An SDK, as it is for a program that has set one up."""
    made = Collected()
    with pytest.MonkeyPatch.context() as patch:
        # In place of `set_tracer_provider` and `set_meter_provider`, which are for good.
        patch.setattr(trace, "_TRACER_PROVIDER", made.tracers)
        patch.setattr(metrics._internal, "_METER_PROVIDER", made.meters)
        telemetry._instruments.cache_clear()
        yield made
    telemetry._instruments.cache_clear()
    made.tracers.shutdown()
    made.meters.shutdown()


def state() -> StateDict:
    return {"w": fill((2 * MiB,), seed=1), "step": 7}


def test_spans_of_a_save_and_a_load(fake: FakeS3, collected: Collected) -> None:
    reports: list[Report] = []
    with trace.get_tracer("trainer").start_as_current_span("step") as outer:
        s3dcp.save(state(), URI, s3client_config=CONFIG, on_report=reports.append)
        s3dcp.load(blank(state()), URI, on_report=reports.append)
    saved, loaded = reports

    spans = collected.spans()
    assert set(spans) == {
        "step",
        "s3dcp.save",
        *(f"s3dcp.save.{phase}" for phase in SAVED),
        "s3dcp.load",
        *(f"s3dcp.load.{phase}" for phase in ("metadata", "plan", "read")),
    }
    for report in reports:
        whole = spans[f"s3dcp.{report.operation}"]
        assert whole.parent is not None
        assert whole.parent.span_id == outer.get_span_context().span_id
        assert dict(whole.attributes or {}) == {
            "s3dcp.uri": URI,
            "s3dcp.rank": 0,
            "s3dcp.item_bytes": report.item_bytes,
            "s3dcp.wire_bytes": report.wire_bytes,
            "s3dcp.requests": report.requests,
            "s3dcp.retries": 0,
            "s3dcp.throttles": 0,
        }
        at_ns = whole.start_time
        for phase, seconds in report.phases.items():
            part = spans[f"s3dcp.{report.operation}.{phase}"]
            assert part.parent == whole.get_span_context()
            assert part.start_time == at_ns
            assert part.end_time is not None
            assert part.end_time - part.start_time == int(seconds * 1e9)  # type: ignore[operator]
            at_ns = part.end_time
        assert whole.end_time == at_ns
    step, load = spans["step"], spans["s3dcp.load"]
    assert step.start_time <= spans["s3dcp.save"].start_time  # type: ignore[operator]
    assert load.end_time <= step.end_time + 1_000_000  # type: ignore[operator]
    assert saved.item_bytes == loaded.item_bytes


@pytest.mark.parametrize("call", ["async_save", "asave", "dcp.async_save"])
def test_the_context_is_the_callers(fake: FakeS3, collected: Collected, call: str) -> None:
    async def asave() -> None:
        with tracer.start_as_current_span("step"):
            await s3dcp.asave(state(), URI)

    tracer = trace.get_tracer("trainer")
    if call == "asave":
        asyncio.run(asave())
    else:
        with tracer.start_as_current_span("step"):
            saving: Any
            if call == "async_save":
                saving = s3dcp.async_save(state(), URI)
            else:
                writer = S3StorageWriter(None, URI)
                saving = dcp.async_save(state(), storage_writer=writer, no_dist=True)
        saving.result()

    spans = collected.spans()
    outer, whole = spans["step"].get_span_context(), spans["s3dcp.save"]
    assert outer is not None
    assert whole.parent is not None
    assert whole.parent.span_id == outer.span_id
    assert ("s3dcp.save.stage" in spans) == (call != "asave")


def test_without_a_span_it_begins_a_trace(fake: FakeS3, collected: Collected) -> None:
    s3dcp.save(state(), URI)
    assert collected.spans()["s3dcp.save"].parent is None


def test_a_failure_is_marked(fake: FakeS3, collected: Collected) -> None:
    s3dcp.save(state(), URI)
    collected.exporter.clear()
    with pytest.raises(CheckpointExistsError):
        s3dcp.save(state(), URI, overwrite=False)
    whole = collected.spans()["s3dcp.save"]
    assert whole.status.status_code is trace.StatusCode.ERROR
    assert (whole.attributes or {})["error.type"] == "CheckpointExistsError"
    failed = {
        ("s3dcp.operation", "save"),
        ("s3dcp.phase", "plan"),
        ("error.type", "CheckpointExistsError"),
    }
    assert collected.points()["s3dcp.duration", frozenset(failed)].count == 1


def test_metrics(fake: FakeS3, collected: Collected) -> None:
    fake.inject(slow_down(), operation="UploadPart", times=2)
    reports: list[Report] = []
    for _ in range(2):
        s3dcp.save(state(), URI, s3client_config=CONFIG, on_report=reports.append)
    points = collected.points()

    def of(name: str, **attributes: str) -> Any:
        given = {f"{key.replace('_', '.')}": value for key, value in attributes.items()}
        return points[name, frozenset({"s3dcp.operation": "save", **given}.items())]

    assert of("s3dcp.items").value == sum(report.item_bytes for report in reports)
    for operation in ("UploadPart", "PutObject", "DeleteObject"):
        assert of("s3dcp.requests", rpc_method=operation).value == sum(
            report.totals.operations[operation].requests
            for report in reports
            if operation in report.totals.operations
        )
    assert of("s3dcp.retries", rpc_method="UploadPart").value == 2
    assert of("s3dcp.throttles", rpc_method="UploadPart").value == 2
    written = of("s3dcp.duration", s3dcp_phase="write")
    assert written.count == 2
    assert written.sum == pytest.approx(sum(report.phases["write"] for report in reports))
    assert of("s3dcp.duration", s3dcp_phase="clean_up").count == 1  # of what the second replaced


def test_an_exporter_that_fails_costs_no_checkpoint(
    fake: FakeS3,
    collected: Collected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no collector")

    monkeypatch.setattr(trace, "get_tracer", broken)
    s3dcp.save(state(), URI)
    assert "no collector" in caplog.text


def test_nothing_where_it_is_not_installed(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry._instruments.cache_clear()
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert telemetry.current_context() is None
    reports: list[Report] = []
    s3dcp.save(state(), URI, on_report=reports.append)
    assert reports[0].error is None
    telemetry._instruments.cache_clear()
