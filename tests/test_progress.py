"""How far a save or a load is: what is counted, who is told, when, and what a terminal shows."""

from __future__ import annotations

import dataclasses
import gc
import logging
import re
import sys
import termios
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import s3dcp
from s3dcp import (
    Report,
    S3ClientConfig,
    S3ConfigError,
    S3HuggingFaceStorageReader,
    S3HuggingFaceStorageWriter,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
    ThrottledError,
)
from s3dcp._keys import S3Uri
from s3dcp._portal import portal
from s3dcp._progress import Meter
from s3dcp._recording import Audience, Recording
from s3dcp._saving import SavedItems
from s3dcp.testing import Cut, FakeS3, Stall, slow_down
from tests import _commands
from tests._fakes import BUCKET, unwrapped, uri_of
from tests._states import MiB, StateDict, assert_same, blank, fill
from tests._stores import MemoryStore, channel_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests._ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

URI = uri_of("run/step-1")
CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Told(list[tuple[int, int]]):
    """A callback that keeps what it is told, and on which threads."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[threading.Thread] = set()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        self.append((done_bytes, total_bytes))
        self.threads.add(threading.current_thread())

    def check(self, size_bytes: int) -> None:
        """Assert that it went forward, and came to the end."""
        done = [each for each, _ in self]
        assert done == sorted(done)
        assert all(each <= total for each, total in self)
        assert self[-1] == (size_bytes, size_bytes)


class TestMeter:
    def test_it_tells_at_a_bounded_rate_and_of_the_end(self) -> None:
        clock, told = Clock(), Told()
        meter = Meter(clock)
        meter.show(told)
        meter.expect(100)
        for _ in range(100):
            meter.advance(1)
            clock.now_s += 0.01
        meter.finish()
        meter.finish()

        assert told[0] == (0, 100)
        assert len(told) == 11
        assert told[-1] == (100, 100)

    def test_what_is_under_way_is_shown_and_never_taken_back(self) -> None:
        clock, told = Clock(), Told()
        meter = Meter(clock)
        meter.show(told)
        under_way = iter([0, 40, 100, 0, 60, 100, 0, 100])  # the first one is tried again
        meter.watch(lambda: next(under_way))
        meter.expect(200)
        for _ in range(5):
            clock.now_s += 1
            meter.look()
        assert meter.done_bytes == 0
        clock.now_s += 1
        meter.advance(100)
        clock.now_s += 1
        meter.look()
        meter.advance(100)
        meter.finish()

        assert [done for done, _ in told] == [0, 38, 95, 95, 95, 95, 100, 195, 200]

    def test_a_slow_callback_is_called_seldom(self) -> None:
        clock = Clock()
        calls = 0

        def slow(_done: int, _total: int) -> None:
            nonlocal calls
            calls += 1
            clock.now_s += 1

        meter = Meter(clock)
        meter.show(slow)
        while clock.now_s < 1000:
            meter.advance(1)
            clock.now_s += 0.01

        assert 40 <= calls <= 50  # s of 1000

    def test_what_it_raises_is_logged_and_ends_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = []

        def broken(done: int, _total: int) -> None:
            calls.append(done)
            raise ValueError("no terminal")

        meter = Meter(Clock())
        meter.show(broken)
        meter.advance(1)
        meter.advance(1)
        meter.finish()

        assert calls == [1]
        assert meter.done_bytes == 2
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert "ValueError: no terminal" in caplog.text

    def test_an_interrupt_is_raised(self) -> None:
        def interrupted(_done: int, _total: int) -> None:
            raise KeyboardInterrupt

        meter = Meter()
        meter.show(interrupted)
        with pytest.raises(KeyboardInterrupt):
            meter.advance(1)

    def test_an_estimate_that_was_too_low_is_not_exceeded(self) -> None:
        told = Told()
        meter = Meter()
        meter.show(told)
        meter.expect(10)
        meter.advance(20)
        meter.expect(10)
        meter.finish()
        told.check(20)

    def test_nobody_need_be_told(self) -> None:
        meter = Meter(lambda: pytest.fail("it asked for the time"))
        meter.expect(10)
        meter.advance(10)
        assert (meter.done_bytes, meter.total_bytes) == (10, 10)


@pytest.fixture
def fake(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    monkeypatch.setattr(s3dcp._progress, "_INTERVAL_S", 0.0)  # tell of everything
    return fake


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors as they are, and taken for a device's: the same copies, without a GPU."""
    if request.param == "device":
        monkeypatch.setattr(s3dcp._landing, "is_host", lambda _: False)
        monkeypatch.setattr(s3dcp._saving, "is_host", lambda _: False)


def state() -> StateDict:
    """Items that go every way: from their memory, copied, staged, and by `torch.save`."""
    return {
        "large": fill((3 * MiB,), seed=1),
        "turned": fill((700, 500), seed=2).t(),
        "small": {str(n): fill((n + 1,), seed=n) for n in range(50)},
        "text": "x" * 100_000,
        "step": 7,
    }


def stored_bytes(fake: FakeS3) -> int:
    keys = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
    return sum(len(fake.read(BUCKET, key)) for key in keys)


class TestCallback:
    @pytest.mark.usefixtures("place")
    @pytest.mark.parametrize("options", [{}, {"thread_count": 3}, {"single_file_per_rank": False}])
    def test_of_a_save(self, fake: FakeS3, options: dict[str, Any]) -> None:
        fake.inject(slow_down(), operation="UploadPart", times=2)
        told = Told()
        writer = S3StorageWriter(None, URI, CONFIG, progress=told, **options)
        dcp.save(state(), storage_writer=writer, no_dist=True)

        told.check(stored_bytes(fake))
        assert told.threads == {threading.current_thread()}
        # An estimate that helps: all that is unknown is what goes through pickles.
        assert abs(told[0][1] / told[-1][1] - 1) < 0.02

    @pytest.mark.usefixtures("place")
    def test_of_a_load(self, fake: FakeS3) -> None:
        s3dcp.save(state(), URI, s3client_config=CONFIG)
        fake.inject(Cut(1 * MiB), operation="GetObject", key="*.distcp", times=2)
        told = Told()
        s3dcp.load(blank(state()), URI, s3client_config=CONFIG, progress=told)

        told.check(stored_bytes(fake))
        assert {total for _, total in told} == {stored_bytes(fake)}

    def test_of_safetensors(self, fake: FakeS3) -> None:
        tensors, saved, loaded = {"w": fill((3 * MiB,), seed=1)}, Told(), Told()
        reports: list[Report] = []
        writer = S3HuggingFaceStorageWriter(
            None, URI, CONFIG, progress=saved, on_report=reports.append
        )
        reader = S3HuggingFaceStorageReader(
            None, URI, CONFIG, progress=loaded, on_report=reports.append
        )
        dcp.save(tensors, storage_writer=writer, no_dist=True)
        dcp.load(blank(tensors), storage_reader=reader, no_dist=True)

        [key] = [key for key in fake.keys(BUCKET) if key.endswith(".safetensors")]
        with_header = len(fake.read(BUCKET, key))
        saved.check(with_header)
        loaded.check(12 * MiB)
        assert [(each.operation, each.item_bytes) for each in reports] == [
            ("save", with_header),
            ("load", 12 * MiB),
        ]

    def test_it_moves_while_a_request_is_under_way(self, fake: FakeS3) -> None:
        """Of an object in one request: no answer comes, or half of one, before that was shown."""
        kept = {"w": fill((3 * MiB,), seed=1)}
        config = S3ClientConfig(part_size=64 * MiB)

        class Seen(Told):
            """Lets the store go on."""

            def __call__(self, done_bytes: int, total_bytes: int) -> None:
                super().__call__(done_bytes, total_bytes)
                if 4 * MiB < done_bytes < total_bytes:
                    rule.release()

        saving, loading = Seen(), Seen()
        rule = fake.inject(Stall(head=False), operation="PutObject", key="*.distcp")
        s3dcp.save(kept, URI, s3client_config=config, progress=saving)
        rule = fake.inject(Stall(6 * MiB), operation="GetObject", key="*.distcp")
        s3dcp.load(blank(kept), URI, s3client_config=config, progress=loading)

        for told in (saving, loading):
            told.check(stored_bytes(fake))
            assert any(4 * MiB < done < 12 * MiB for done, _ in told)

    def test_of_another_layout_than_was_guessed(self, fake: FakeS3, tmp_path: Path) -> None:
        """A transposed tensor of torch's own writer is read twice."""
        kept = {"turned": fill((900, 700), seed=3).t()}
        dcp.save(kept, checkpoint_id=tmp_path, no_dist=True)
        for path in tmp_path.iterdir():
            fake.write(BUCKET, f"run/step-1/{path.name}", path.read_bytes())
        told = Told()
        target = {"turned": torch.zeros(700, 900)}
        s3dcp.load(target, URI, progress=told)

        assert_same(target, kept)
        told.check(2 * stored_bytes(fake))

    def test_of_readers_that_go_file_by_file(self, fake: FakeS3) -> None:
        s3dcp.save(state(), URI)
        told = Told()
        reader = S3StorageReader(
            None, URI, reader_constructor=S3ReaderConstructor.sequential(), progress=told
        )
        dcp.load(blank(state()), storage_reader=reader, no_dist=True)

        told.check(stored_bytes(fake))
        assert reader.report.totals.operations["GetObject"].size_bytes >= stored_bytes(fake)

    def test_of_an_async_save(self, fake: FakeS3) -> None:
        told = Told()
        s3dcp.async_save(state(), URI, progress=told).result()
        told.check(stored_bytes(fake))
        assert threading.current_thread() not in told.threads

    @pytest.mark.parametrize("kept", [{}, {"w": torch.ones(7)}], ids=["nothing", "a little"])
    def test_of_little(self, fake: FakeS3, kept: StateDict) -> None:
        told = Told()
        s3dcp.save(kept, URI, progress=told)
        told.check(stored_bytes(fake))
        told = Told()
        s3dcp.load(blank(kept), URI, progress=told)
        told.check(stored_bytes(fake))

    def test_of_a_shard(self) -> None:
        """Neither its estimate nor its parts are those of the tensor that it is a shard of."""
        planner = DefaultSavePlanner()
        planner.set_up_planner({"w": fill((10 * MiB,), seed=1)}, is_coordinator=True)
        [item] = planner.create_local_plan().items
        assert item.tensor_data is not None
        whole = dataclasses.replace(item.tensor_data, size=torch.Size([1 << 40]))
        shard = dataclasses.replace(item, tensor_data=whole)
        store, meter, told = MemoryStore(), Meter(), Told()
        meter.show(told)
        SavedItems(
            portal(), channel_of(store), CONFIG, planner, _StorageWriterTransforms(), meter
        ).write([(S3Uri(BUCKET, "run/0"), "0", [shard])])
        meter.finish()

        [(body, _)] = store.objects.values()
        told.check(len(body))
        assert abs(told[0][1] - len(body)) < 100
        assert [name for name, _ in store.requests].count("upload_part") == 5

    def test_a_save_that_fails_does_not_come_to_its_end(self, fake: FakeS3) -> None:
        fake.inject(slow_down(), operation="UploadPart", times=None)
        told = Told()
        config = S3ClientConfig(part_size=5 * MiB, max_attempts=1)
        with pytest.raises(ThrottledError):
            s3dcp.save(state(), URI, s3client_config=config, progress=told)
        assert told[-1][0] < told[-1][1]

    @pytest.mark.parametrize("cls", [S3StorageWriter, S3StorageReader])
    def test_what_failed_lets_go_of_its_tensors(
        self, fake: FakeS3, cls: type[S3StorageWriter | S3StorageReader]
    ) -> None:
        """The writer and the reader keep the meter, for the next report."""
        s3dcp.save(state(), URI)
        fake.inject(slow_down(), key="*.distcp", times=None)
        target = state()
        tensor = weakref.ref(target["large"])
        facade = cls(None, URI, S3ClientConfig(max_attempts=1))
        call = (
            partial(dcp.save, storage_writer=facade)
            if isinstance(facade, S3StorageWriter)
            else partial(dcp.load, storage_reader=facade)
        )
        with pytest.raises(ThrottledError), unwrapped():
            call(target, no_dist=True)
        del target
        gc.collect()
        assert tensor() is None

    def test_one_that_raises_costs_no_checkpoint(
        self, fake: FakeS3, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(_done: int, _total: int) -> None:
            raise OSError("closed")

        s3dcp.save(state(), URI, progress=broken)
        s3dcp.load(blank(state()), URI, progress=broken)
        assert caplog.text.count("is not called again") == 2


@pytest.mark.parametrize("progress", ["yes", 1, None])
@pytest.mark.parametrize("cls", [S3StorageWriter, S3StorageReader])
def test_anything_else_is_refused(cls: Callable[..., object], progress: object) -> None:
    with pytest.raises(S3ConfigError, match="progress must be True"):
        cls(None, URI, progress=progress)
    with pytest.raises(S3ConfigError, match="on_report must be a callable"):
        cls(None, URI, on_report=progress or "yes")


def test_a_bar_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(S3ConfigError, match=r'pip install "s3dcp\[cli\]"'):
        S3StorageWriter(None, URI, progress=True)
    S3StorageWriter(None, URI, progress=print)


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Make standard error a terminal, and yield what reads what it shows."""
    with (
        _commands.terminal() as (ours, theirs),
        open(theirs, "w", closefd=False) as stderr,
        pytest.MonkeyPatch.context() as patch,
    ):
        termios.tcsetwinsize(theirs, (24, 100))
        patch.setattr(sys, "stderr", stderr)
        yield partial(_commands.shown, ours, theirs)


class TestBar:
    def test_on_a_terminal(self, fake: FakeS3) -> None:
        with terminal() as shown:
            s3dcp.save(state(), URI, progress=True)
            saved = shown()
            s3dcp.load(blank(state()), URI, progress=True)
            loaded = shown()
        for text in (saved, loaded):
            first, last = text.split("\r")[1], text.rstrip("\r\n").split("\r")[-1]
            assert first.startswith("step-1:   0%|")
            assert last.startswith("step-1: 100%|")
            # So many bytes of so many, in which time, how long it will take, and how fast.
            assert re.search(r" 13\.\dM/13\.\dM \[00:\d\d<00:00, [\d.]+[kMG]?B/s\]$", last)
            assert text.endswith("\r\n")  # what follows has a line of its own

    def test_of_a_save_that_fails(self, fake: FakeS3) -> None:
        fake.inject(slow_down(), operation="UploadPart", times=None)
        config = S3ClientConfig(part_size=5 * MiB, max_attempts=1)
        with terminal() as shown:
            with pytest.raises(ThrottledError):
                s3dcp.save(state(), URI, s3client_config=config, progress=True)
            text = shown()
        assert text.endswith("\r\n")
        assert "100%|" not in text

    def test_it_ends_with_its_bytes_whatever_comes_of_other_ranks(self) -> None:
        with terminal() as shown:
            recording = Recording("save", URI, Audience(progress=True))
            recording.identify(self, URI, 0, is_coordinator=True)
            recording.meter.expect(1000)
            recording.meter.advance(1000)
            recording.finish_bytes()
            text = shown()
            recording.end()
            assert shown() == ""
        assert "step-1: 100%|" in text
        assert text.endswith("\r\n")

    def test_elsewhere_it_is_silent(self, fake: FakeS3, capfd: pytest.CaptureFixture[str]) -> None:
        s3dcp.save(state(), URI, progress=True)
        s3dcp.load(blank(state()), URI, progress=True)
        assert capfd.readouterr() == ("", "")

    def test_a_name_cannot_steer_the_terminal(self, fake: FakeS3) -> None:
        with terminal() as shown:
            s3dcp.save({"step": 1}, uri_of("run/\x1b[2J"), progress=True)
            assert r"\x1b[2J: 100%|" in shown()


def _saved_and_loaded(uri: str) -> tuple[str, list[tuple[int, int]], int]:
    """Save and load a sharded tensor, with a bar on a terminal and with a callback."""
    config = S3ClientConfig(conditional_writes=False, checksum=None)  # no warning of those
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(fill((600, 1024), seed=1), mesh, [Shard(0)])
    with terminal() as shown:
        s3dcp.save({"w": sharded}, uri, progress=True, s3client_config=config)
        s3dcp.load({"w": torch.zeros_like(sharded)}, uri, progress=True)
        text = shown()
    told = Told()
    reports: list[s3dcp.Report] = []
    s3dcp.save({"w": sharded}, uri, progress=told, on_report=reports.append)
    [report] = reports
    told.check(report.item_bytes)
    return text, list(told), report.item_bytes


def test_on_two_ranks(ranks2: RankPool, bucket: str) -> None:
    (first, _, _), (second, told, size_bytes) = ranks2.run(
        _saved_and_loaded, f"s3://{bucket}/step-1"
    )
    assert first.count("step-1: 100%|") >= 2
    assert second == ""
    assert told[-1] == (size_bytes, size_bytes)
    assert 300 * 1024 * 4 < size_bytes < 301 * 1024 * 4
