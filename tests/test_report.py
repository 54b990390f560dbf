"""What a save and a load report: the value, its one line, and who gets it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import math
import pickle
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

import s3dcp
from s3dcp import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    Report,
    RequestPrices,
    S3ClientConfig,
    S3StorageReader,
    S3StorageWriter,
    ThrottledError,
    Totals,
)
from s3dcp._recording import Audience, Recording
from s3dcp._tally import Tally
from s3dcp.testing import FakeS3, internal_error, slow_down
from tests._fakes import BUCKET, uri_of
from tests._states import MiB, StateDict, blank, fill

if TYPE_CHECKING:
    from tests._ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

URI = uri_of("run/step-1")
CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True)
SAVED, LOADED = ["plan", "write", "wait", "commit"], ["metadata", "plan", "read"]
AT = datetime(2026, 1, 2, tzinfo=UTC)


def totals_of(**requests: int) -> Totals:
    tally = Tally()
    for operation, count in requests.items():
        for _ in range(count):
            tally.add(operation, 0.25, MiB)
    return tally.totals()


class TestPrices:
    @pytest.mark.parametrize(
        ("operation", "usd"),
        [
            ("PutObject", 0.005),
            ("CreateMultipartUpload", 0.005),
            ("UploadPart", 0.005),
            ("CompleteMultipartUpload", 0.005),
            ("CopyObject", 0.005),
            ("ListObjectsV2", 0.005),
            ("GetObject", 0.0004),
            ("HeadObject", 0.0004),
            ("DeleteObject", 0.0),
            ("AbortMultipartUpload", 0.0),
        ],
    )
    def test_of_a_thousand_requests(self, operation: str, usd: float) -> None:
        assert RequestPrices().cost_usd(totals_of(**{operation: 1000})) == pytest.approx(usd)

    def test_what_the_store_failed_to_serve_is_free(self) -> None:
        tally = Tally()
        for refused in (ThrottledError(), s3dcp.ServerError()):
            tally.add("PutObject", 1.0, error=refused)
        assert RequestPrices().cost_usd(tally.totals()) == 0
        for other in (s3dcp.S3TimeoutError(), s3dcp.ObjectNotFoundError()):
            tally.add("PutObject", 1.0, error=other)
        assert RequestPrices(put_usd=1000).cost_usd(tally.totals()) == 2

    def test_others(self) -> None:
        report = Report(
            operation="save",
            uri=URI,
            rank=0,
            started_at=AT,
            totals=totals_of(PutObject=2, GetObject=10),
        )
        assert report.cost_usd() == pytest.approx(2 * 0.000005 + 10 * 0.0000004)
        assert report.cost_usd(RequestPrices(put_usd=10, get_usd=2)) == pytest.approx(0.04)


class TestValue:
    report = Report(
        operation="save",
        uri=URI,
        rank=3,
        started_at=AT,
        phases={"plan": 0.5, "write": 2.0, "wait": 0.25, "commit": 0.0625},
        item_bytes=3 << 30,
        totals=totals_of(UploadPart=4, PutObject=1),
    )

    def test_what_follows_from_it(self) -> None:
        assert self.report.seconds == 2.8125
        assert self.report.gib_per_s == 1.5
        assert self.report.requests == 5
        assert self.report.wire_bytes == 5 * MiB
        assert self.report.retries == self.report.throttles == 0
        assert self.report.p50_s == self.report.p99_s == 0.25
        loaded = dataclasses.replace(self.report, operation="load", phases={"read": 1.0})
        assert loaded.gib_per_s == 3

    def test_half_of_the_requests_and_99_of_100(self) -> None:
        tally = Tally()
        for seconds in [0.01] * 60 + [0.1] * 38 + [1.0] * 2:
            tally.add("PutObject", seconds)
        report = dataclasses.replace(self.report, totals=tally.totals())
        assert report.p50_s == pytest.approx(0.01, rel=0.3)
        assert report.p99_s == pytest.approx(1.0, rel=0.3)

    def test_it_is_a_value(self) -> None:
        assert pickle.loads(pickle.dumps(self.report)) == self.report
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.report.rank = 1  # type: ignore[misc]

    def test_its_line(self) -> None:
        assert str(self.report) == (
            "rank 3 saved 's3://bkt/run/step-1': 3.0 GiB in 2.812 s "
            "(plan 0.500, write 2.000, wait 0.250, commit 0.062), 1.5 GiB/s; "
            "requests 5, 5.0 MiB, p50 0.25 s, p99 0.25 s, about $0.000025"
        )

    def test_the_line_of_a_failure(self) -> None:
        failed = Report(
            operation="load", uri="s3://b/a\nb", rank=0, started_at=AT, error="ThrottledError"
        )
        assert str(failed).startswith(
            r"rank 0 failed to load (ThrottledError) 's3://b/a\nb': 0 B in 0.000 s (nothing done)"
        )
        assert "\n" not in str(failed)


def state() -> StateDict:
    return {"w": fill((3 * MiB,), seed=1), "small": fill((5,), seed=2), "step": 7}


def stored_bytes(fake: FakeS3) -> int:
    keys = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
    return sum(len(fake.read(BUCKET, key)) for key in keys)


class TestOfDcp:
    def test_it_counts_what_happened(self, fake: FakeS3) -> None:
        fake.inject(slow_down(), operation="UploadPart", times=2)
        writer = S3StorageWriter(None, URI, CONFIG)
        before = datetime.now(UTC)
        dcp.save(state(), storage_writer=writer, no_dist=True)
        saved = writer.report
        reader = S3StorageReader(None, URI)
        dcp.load(blank(state()), storage_reader=reader, no_dist=True)
        loaded = reader.report

        assert (saved.operation, saved.uri, saved.rank, saved.error) == ("save", URI, 0, None)
        assert before <= saved.started_at <= loaded.started_at
        assert (list(saved.phases), list(loaded.phases)) == (SAVED, LOADED)
        assert all(seconds >= 0 for seconds in [*saved.phases.values(), *loaded.phases.values()])
        assert saved.item_bytes == loaded.item_bytes == stored_bytes(fake)
        metadata_bytes = len(fake.read(BUCKET, "run/step-1/.metadata"))
        assert saved.wire_bytes == loaded.wire_bytes == stored_bytes(fake) + metadata_bytes
        assert (saved.retries, saved.throttles) == (2, 2)
        assert saved.requests + loaded.requests == len(fake.requests)
        assert saved.gib_per_s > 0
        # One that looks for a checkpoint, and two that were throttled; all others write.
        assert saved.cost_usd() == pytest.approx((saved.requests - 3) * 5e-6 + 4e-7)

    def test_a_save_that_replaces_cleans_up(self, fake: FakeS3) -> None:
        writer = S3StorageWriter(None, URI, CONFIG)
        for _ in range(2):
            dcp.save(state(), storage_writer=writer, no_dist=True)
        assert list(writer.report.phases) == [*SAVED, "clean_up"]
        assert writer.report.totals.operations["DeleteObject"].requests == 1

    @pytest.mark.parametrize(("recent_s", "looks"), [(math.inf, 1), (0.0, 2)])
    def test_the_commit_goes_by_a_recent_look_alone(
        self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch, recent_s: float, looks: int
    ) -> None:
        monkeypatch.setattr("s3dcp._publish._RECENT_S", recent_s)
        writer = S3StorageWriter(None, URI, CONFIG)
        dcp.save(state(), storage_writer=writer, no_dist=True)
        assert writer.report.totals.operations["GetObject"].requests == looks

    def test_a_save_after_one_that_could_not_be_staged(
        self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reports: list[Report] = []
        writer = S3StorageWriter(None, URI, CONFIG, on_report=reports.append)
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.stage", _full)
            with pytest.raises(MemoryError):
                writer.stage(state())
        dcp.save(state(), storage_writer=writer, no_dist=True)
        assert [report.error for report in reports] == ["MemoryError", None]

    def test_one_line_is_logged(self, fake: FakeS3, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "s3dcp"):
            writer = S3StorageWriter(None, URI, CONFIG)
            dcp.save(state(), storage_writer=writer, no_dist=True)
            reader = S3StorageReader(None, URI)
            dcp.load(blank(state()), storage_reader=reader, no_dist=True)
        logged = [record for record in caplog.records if record.levelno == logging.INFO]
        assert [record.getMessage() for record in logged] == [
            str(writer.report),
            str(reader.report),
        ]
        assert {record.name for record in logged} == {"s3dcp.reports"}

    def test_failures_are_reported(self, fake: FakeS3, caplog: pytest.LogCaptureFixture) -> None:
        reports: list[Report] = []
        writer = S3StorageWriter(None, URI, CONFIG, overwrite=False, on_report=reports.append)
        with pytest.raises(BaseException, match=r"[Nn]o checkpoint"):
            dcp.load(
                {},
                storage_reader=S3StorageReader(None, URI, on_report=reports.append),
                no_dist=True,
            )
        dcp.save(state(), storage_writer=writer, no_dist=True)
        with pytest.raises(BaseException, match="already exists"):
            dcp.save(state(), storage_writer=writer, no_dist=True)
        assert [(report.operation, report.error) for report in reports] == [
            ("load", "CheckpointNotFoundError"),
            ("save", None),
            ("save", "CheckpointExistsError"),
        ]
        assert [list(report.phases) for report in reports] == [["metadata"], SAVED, ["plan"]]

    @pytest.mark.parametrize("begins", ["again", "another"])
    def test_what_dcp_does_not_tell_is_reported_with_the_next(
        self, fake: FakeS3, begins: str
    ) -> None:
        """A planner's failure: the writer and the reader are not told of it."""
        reports: list[Report] = []

        class SavePlanner(DefaultSavePlanner):
            def create_local_plan(self) -> Any:
                raise ValueError("nothing to save")

        class LoadPlanner(DefaultLoadPlanner):
            def create_local_plan(self) -> Any:
                raise ValueError("nothing to load")

        dcp.save(state(), storage_writer=S3StorageWriter(None, URI, CONFIG), no_dist=True)

        def save() -> None:
            writer = S3StorageWriter(None, URI, CONFIG, on_report=reports.append)
            with pytest.raises(CheckpointException, match="nothing to save"):
                dcp.save(state(), storage_writer=writer, planner=SavePlanner(), no_dist=True)
            if begins == "again":
                assert reports == []
                dcp.save(state(), storage_writer=writer, no_dist=True)

        def load() -> None:
            reader = S3StorageReader(None, URI, on_report=reports.append)
            with pytest.raises(CheckpointException, match="nothing to load"):
                dcp.load(blank(state()), storage_reader=reader, planner=LoadPlanner(), no_dist=True)
            if begins == "again":
                dcp.load(blank(state()), storage_reader=reader, no_dist=True)

        for work in (save, load):
            work()
            gc.collect()  # what the error's traceback held on to
            dcp.save(state(), storage_writer=S3StorageWriter(None, URI, CONFIG), no_dist=True)
        assert [(report.operation, report.error) for report in reports if report.error] == [
            ("save", "unknown"),
            ("load", "unknown"),
        ]
        assert len(reports) == (4 if begins == "again" else 2)

    def test_at_the_latest_when_the_process_ends(self, fake: FakeS3) -> None:
        script = f"""
import logging, sys
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
import s3dcp

class Planner(DefaultSavePlanner):
    def create_local_plan(self):
        raise ValueError("nothing to save")

logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)
writer = s3dcp.S3StorageWriter(None, {URI!r}, on_report=lambda report: print(report.error))
dcp.save({{}}, storage_writer=writer, planner=Planner(), no_dist=True)
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "nothing to save" in done.stderr
        line, error = done.stdout.splitlines()[-2:]
        assert line.startswith(f"s3dcp.reports: rank 0 failed to save (unknown) {URI!r}")
        assert error == "unknown"

    def test_before_and_elsewhere_it_is_blank(self, fake: FakeS3) -> None:
        writer, reader = S3StorageWriter(None, URI, CONFIG), S3StorageReader(None, URI)
        assert writer.report.phases == reader.report.phases == {}
        dcp.save(state(), storage_writer=writer, no_dist=True)
        again = pickle.loads(pickle.dumps(writer))
        assert (again.report.phases, again.report.requests) == ({}, 0)
        assert again.report.uri == URI

    def test_callbacks_go_along_to_another_process(self) -> None:
        for cls in (S3StorageWriter, S3StorageReader):
            again = pickle.loads(pickle.dumps(cls(None, URI, progress=print, on_report=repr)))
            assert again._audience == Audience(print, repr)

    def test_what_was_staged_for_another_process_is_not_of_the_next_save(
        self, fake: FakeS3
    ) -> None:
        writer = S3StorageWriter(None, URI, CONFIG)
        writer.stage(state())
        pickle.dumps(writer)
        dcp.save(state(), storage_writer=writer, no_dist=True)
        assert list(writer.report.phases) == SAVED

    def test_an_async_save_begins_with_staging(self, fake: FakeS3) -> None:
        writer = S3StorageWriter(None, URI, CONFIG)
        future: Any = dcp.async_save(state(), storage_writer=writer, no_dist=True)
        future.result()
        assert list(writer.report.phases) == ["stage", *SAVED]


class TestOfOneCall:
    def test_everyone_reports(self, fake: FakeS3) -> None:
        reports: list[Report] = []
        s3dcp.save(state(), URI, on_report=reports.append)
        s3dcp.load(blank(state()), URI, on_report=reports.append)
        s3dcp.async_save(state(), URI, on_report=reports.append).result()

        async def main() -> None:
            await s3dcp.asave(state(), URI, on_report=reports.append)
            await s3dcp.aload(blank(state()), URI, on_report=reports.append)

        asyncio.run(main())
        assert [report.operation for report in reports] == ["save", "load", "save", "save", "load"]
        assert {report.item_bytes for report in reports} == {stored_bytes(fake)}
        assert {report.uri for report in reports} == {URI}

    def test_failures_are_reported(self, fake: FakeS3) -> None:
        reports: list[Report] = []

        class Planner(DefaultSavePlanner):
            def create_local_plan(self) -> Any:
                raise ValueError("nothing to save")

        with pytest.raises(CheckpointNotFoundError):
            s3dcp.load({}, URI, on_report=reports.append)
        with pytest.raises(ValueError, match="nothing to save"):
            s3dcp.save(state(), URI, planner=Planner(), on_report=reports.append)
        fake.inject(internal_error(), operation="PutObject", key="*/.metadata", times=None)
        config = S3ClientConfig(max_attempts=1)
        with pytest.raises(s3dcp.S3Exception):
            s3dcp.save(state(), URI, s3client_config=config, on_report=reports.append)
        fake.forget()
        s3dcp.save(state(), URI)
        saving: Any = s3dcp.async_save(state(), URI, overwrite=False, on_report=reports.append)
        with pytest.raises(CheckpointExistsError):
            saving.result()
        assert [report.error for report in reports] == [
            "CheckpointNotFoundError",
            "ValueError",
            "CommitConflictError",
            "CheckpointExistsError",
        ]
        assert list(reports[2].phases) == SAVED
        assert reports[2].totals.operations["PutObject"].server_errors >= 1

    def test_what_on_report_raises_costs_no_checkpoint(
        self, fake: FakeS3, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(_: Report) -> None:
            raise ValueError("no such dashboard")

        metadata = s3dcp.save(state(), URI, on_report=broken)
        assert metadata.state_dict_metadata
        assert "on_report failed" in caplog.text
        assert "no such dashboard" in caplog.text


def test_phases_follow_each_other() -> None:
    recording = Recording("save", URI, Audience())
    with recording.during("plan"):
        pass
    recording.lap("plan")
    with pytest.raises(ThrottledError), recording.during("write"):
        raise ThrottledError
    recording.end()  # it has ended
    report = recording.report()
    assert list(report.phases) == ["plan", "write"]
    assert report.error == "ThrottledError"
    assert report.seconds <= (datetime.now(UTC) - report.started_at).total_seconds() + 0.001


def _saved(uri: str) -> tuple[list[Report], list[Report]]:
    """Save, then save where another rank fails."""
    well: list[Report] = []
    badly: list[Report] = []
    tensors = {f"rank-{dist.get_rank()}": torch.ones(1000)}
    s3dcp.save(tensors, uri, on_report=well.append)

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if dist.get_rank() == 1:
                raise ValueError("lost")
            return super().resolve_data(write_item)

    with pytest.raises(ValueError, match="lost"):
        s3dcp.save(tensors, uri, planner=Planner(), on_report=badly.append)
    return well, badly


def _failed_plainly(uri: str) -> list[str | None]:
    """Save by `dcp.save` where another rank fails, and again."""
    reports: list[Report] = []
    writer = S3StorageWriter(None, uri, on_report=reports.append)
    tensors = {f"rank-{dist.get_rank()}": torch.ones(1000)}

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if dist.get_rank() == 1:
                raise ValueError("lost")
            return super().resolve_data(write_item)

    with pytest.raises(CheckpointException, match="lost"):
        dcp.save(tensors, storage_writer=writer, planner=Planner())
    dcp.save(tensors, storage_writer=writer)
    return [report.error for report in reports]


def test_the_coordinator_is_not_told_of_another_ranks_failure(
    ranks2: RankPool, bucket: str
) -> None:
    found = ranks2.run(_failed_plainly, f"s3://{bucket}/run")
    assert found == [["unknown", None], ["ValueError", None]]


def test_every_rank_has_its_own(ranks2: RankPool, bucket: str) -> None:
    (first, first_badly), (second, second_badly) = ranks2.run(_saved, f"s3://{bucket}/run")
    [mine], [theirs] = first, second
    assert (mine.rank, theirs.rank) == (0, 1)
    assert list(mine.phases) == SAVED
    assert list(theirs.phases) == ["plan", "write"]  # the other commits
    assert mine.error is theirs.error is None
    assert mine.item_bytes > 4000
    assert theirs.item_bytes > 4000
    # A rank that did its part hears of the other's failure before it could commit.
    assert [report.error for report in first_badly + second_badly] == ["ValueError", "ValueError"]


def _full(*_: object) -> None:
    raise MemoryError
