"""`s3dcp.save`, `load`, `async_save`, `asave` and `aload`, as a user calls them."""

from __future__ import annotations

import asyncio
import collections
import gc
import inspect
import logging
import pickle
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

import s3dcp
import s3dcp._checkpoint
from s3dcp import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    IntegrityError,
    S3ClientConfig,
    S3ConfigError,
    UnsafeItemError,
    WrongRegionError,
)
from s3dcp._checkpoint import plain, shared_error
from s3dcp._loop_thread import new_event_loop
from s3dcp._portal import portal
from s3dcp.testing import FakeS3, Stall, internal_error, wrong_region
from tests._fakes import BUCKET, data_keys, uri_of
from tests._ranks import RankPool
from tests._states import MiB, assert_same, blank, fill, finite

URI = uri_of("run/step-1")
CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True, max_attempts=2)
RAN: list[str] = []


class Bomb:
    """A type of a user's own, whose pickle runs code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return RAN.append, ("boom",)


class Settings:
    """A type of a user's own that does no harm."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


@pytest.fixture
def server(fake: FakeS3) -> FakeS3:
    return fake


def state() -> dict[str, Any]:
    return {
        "model": {"weights": fill((2200, 1024), seed=1), "bias": fill((7,), seed=2)},
        "step": 100,
        "history": [1.5, "warm-up", {"lr": 3e-4}],
    }


def empty() -> dict[str, Any]:
    return {
        "model": {"weights": torch.zeros(2200, 1024), "bias": torch.zeros(7)},
        "step": 0,
        "history": [0.0, "", {"lr": 0.0}],
    }


def some_arguments(name: str) -> dict[str, object]:
    """Return something for each keyword of one of our functions."""
    parameters = inspect.signature(getattr(s3dcp, name)).parameters.values()
    return {each.name: object() for each in parameters if each.kind is each.KEYWORD_ONLY}


class TestSaveAndLoad:
    def test_what_was_saved_comes_back_without_a_warning(self, server: FakeS3) -> None:
        metadata = s3dcp.save(state(), URI)
        target = empty()
        s3dcp.load(target, URI)

        assert_same(target, state())
        assert "model.weights" in metadata.state_dict_metadata

    def test_another_default_device(self, server: FakeS3) -> None:
        """Our own tensors are the host's, wherever the caller has new ones made."""
        saved = {
            "large": fill((2200, 1024), seed=1),
            "turned": fill((700, 1000), seed=2).t(),
            "small": fill((7,), seed=3),
            "empty": torch.empty(0, 3),
            "wider": finite((1000, 1000), seed=4),
        }
        target = blank(saved) | {"wider": torch.zeros(1000, 1000, dtype=torch.float64)}
        with torch.device("meta"):
            s3dcp.save(saved, URI)
            s3dcp.load(target, URI)
        assert_same(target, saved | {"wider": saved["wider"].double()})

    def test_stateful_objects_are_loaded(self, server: FakeS3) -> None:
        saved, loaded = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        s3dcp.save({"model": saved}, URI)
        s3dcp.load({"model": loaded}, URI)

        assert torch.equal(saved.weight, loaded.weight)

    def test_arguments_reach_the_writer_and_dcp(self, server: FakeS3) -> None:
        class Planner(DefaultSavePlanner):
            used = False

            def create_local_plan(self) -> Any:
                Planner.used = True
                return super().create_local_plan()

        strategy = s3dcp.RoundRobinPrefixStrategy(["left"])
        s3dcp.save(
            state(),
            URI,
            planner=Planner(),
            no_dist=True,
            region="us-east-1",
            s3client_config=CONFIG,
            prefix_strategy=strategy,
            thread_count=2,
        )
        target = empty()
        s3dcp.load(
            target,
            URI,
            no_dist=True,
            region="us-east-1",
            s3client_config=CONFIG,
            reader_constructor=s3dcp.S3ReaderConstructor.sequential(),
        )

        assert Planner.used
        assert len(data_keys(server, "run/step-1/left")) == 2
        assert_same(target, state())

    @pytest.mark.parametrize("name", ["save", "load", "async_save"])
    def test_every_argument_goes_to_dcp_or_the_storage(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        storage = "GroupReader" if name == "load" else "S3StorageWriter"
        handed: list[object] = []

        def take(*args: Any, **kwargs: Any) -> Any:
            handed.extend([*args, *kwargs.values()])
            return Future()

        monkeypatch.setattr(s3dcp._checkpoint, storage, take)
        monkeypatch.setattr(dcp, name, take)
        given = some_arguments(name)
        getattr(s3dcp, name)({}, URI, **given)

        lost = {key for key, value in given.items() if value not in handed}
        assert lost == ({"weights_only"} if name == "load" else set())  # the planner decides

    @pytest.mark.parametrize("name", ["save", "load"])
    def test_every_argument_goes_from_the_awaited(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        given = some_arguments(name)
        taken: dict[str, object] = {}
        monkeypatch.setattr(
            s3dcp._checkpoint, name, lambda _state, _uri, **kwargs: taken.update(kwargs)
        )
        asyncio.run(getattr(s3dcp, f"a{name}")({}, URI, **given))

        assert taken == given

    def test_a_path_that_is_no_uri_is_refused(self) -> None:
        with pytest.raises(s3dcp.InvalidS3UriError):
            s3dcp.save({}, "/tmp/run")
        with pytest.raises(s3dcp.InvalidS3UriError):
            s3dcp.load({}, "file:///tmp/run")
        with pytest.raises(S3ConfigError, match="thread_count"):
            s3dcp.async_save({}, URI, thread_count=0)


class TestErrors:
    @pytest.mark.parametrize("wrong", [None, [], "s3://bucket/run", torch.nn.Linear(1, 1)])
    def test_no_state_dict(self, wrong: Any) -> None:
        """Refused before there is a request: this test has no server."""
        calls: list[Callable[[], object]] = [
            lambda: s3dcp.save(wrong, URI),
            lambda: s3dcp.load(wrong, URI),
            lambda: s3dcp.async_save(wrong, URI),
            lambda: asyncio.run(s3dcp.asave(wrong, URI)),
            lambda: asyncio.run(s3dcp.aload(wrong, URI)),
        ]
        for call in calls:
            with pytest.raises(S3ConfigError, match=f"a dict, got {type(wrong).__name__}: pass"):
                call()

    def test_an_item_that_cannot_be_saved_is_named(self, server: FakeS3) -> None:
        with pytest.raises(TypeError, match="cannot pickle") as caught:
            s3dcp.save({"data": {"batches": (n for n in [1])}}, URI)
        assert "save data.batches" in "".join(traceback.format_exception(caught.value))
        with pytest.raises(S3ConfigError, match=r"model\.weight is on the meta device.*to_empty"):
            s3dcp.save({"model": torch.nn.Linear(2, 2, device="meta").state_dict()}, URI)
        assert server.keys(BUCKET) == []

    def test_a_checkpoint_that_is_there(self, server: FakeS3) -> None:
        s3dcp.save(state(), URI)
        with pytest.raises(CheckpointExistsError) as caught:
            s3dcp.save(state(), URI, overwrite=False)

        assert isinstance(caught.value.__cause__, CheckpointException)
        assert "CheckpointExistsError" in "".join(traceback.format_exception(caught.value))

    def test_a_checkpoint_that_is_not_there(self, server: FakeS3) -> None:
        with pytest.raises(CheckpointNotFoundError, match="step-1") as caught:
            s3dcp.load(empty(), URI)

        cause = caught.value.__cause__
        assert isinstance(cause, CheckpointException)
        assert [type(error) for error, _ in cause.failures.values()] == [CheckpointNotFoundError]

    def test_torch_logs_nothing_of_metadata_that_is_not_there(
        self, server: FakeS3, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(CheckpointNotFoundError):
            s3dcp.load(empty(), URI)
        s3dcp.save(state(), URI, use_collectives=False)
        s3dcp.load(empty(), URI)  # from a rank's own

        warned = {
            each.name
            for each in caplog.records
            # pytest also sees what torch keeps to itself.
            if each.levelno >= logging.WARNING and logging.getLogger(each.name).propagate
        }
        assert warned <= {"s3dcp.commits"}

    def test_metadata_that_is_not_ours_to_read(self, server: FakeS3) -> None:
        server.write(BUCKET, "run/step-1/.metadata", pickle.dumps(Bomb()))
        with pytest.raises(CorruptMetadataError):
            s3dcp.load(empty(), URI)

        assert not RAN

    def test_damage(self, server: FakeS3) -> None:
        s3dcp.save(state(), URI)
        [key] = data_keys(server, "run/step-1")
        body = bytearray(server.read(BUCKET, key))
        body[len(body) // 2] ^= 1
        server.write(BUCKET, key, bytes(body))
        with pytest.raises(IntegrityError, match=r"model\.weights"):
            s3dcp.load(empty(), URI)

    def test_another_region_is_named(self, server: FakeS3) -> None:
        server.inject(wrong_region("eu-west-1"), times=None)
        with pytest.raises(WrongRegionError, match="eu-west-1"):
            s3dcp.save(state(), URI)

    def test_an_error_of_the_planner(self, server: FakeS3) -> None:
        s3dcp.save(state(), URI)
        with pytest.raises(RuntimeError, match="unknown"):
            s3dcp.load({"unknown": torch.zeros(1)}, URI)

    def test_an_interrupt(self, server: FakeS3) -> None:
        class Planner(DefaultSavePlanner):
            def resolve_data(self, write_item: Any) -> Any:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            s3dcp.save(state(), URI, planner=Planner())

        assert not server.keys(BUCKET)


def wrapped(*errors: BaseException) -> CheckpointException:
    return CheckpointException(
        "write", {rank: (error, traceback.StackSummary()) for rank, error in enumerate(errors)}
    )


INTERRUPT = KeyboardInterrupt()
FIRST, SECOND = IntegrityError("a"), IntegrityError("b")


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([FIRST], FIRST),
        ([FIRST, SECOND], FIRST),
        ([FIRST, ValueError("c")], None),
        ([FIRST, INTERRUPT], INTERRUPT),
        ([INTERRUPT], INTERRUPT),
    ],
)
def test_which_error_is_raised(errors: list[BaseException], expected: BaseException | None) -> None:
    assert shared_error(plain(wrapped(*errors))) is expected


class TestItemsThatAreNoTensors:
    @pytest.fixture(autouse=True)
    def _nothing_ran(self) -> None:
        RAN.clear()

    def test_are_not_executed(self, server: FakeS3) -> None:
        s3dcp.save({"optimizer": {"hook": Bomb()}}, URI)
        RAN.clear()
        with pytest.raises(UnsafeItemError) as caught:
            s3dcp.load({"optimizer": {"hook": None}}, URI)

        assert not RAN
        assert "optimizer.hook" in str(caught.value)
        assert "weights_only=False" in str(caught.value)
        assert "add_safe_globals" in str(caught.value)

    def test_name_the_type_that_is_refused(self, server: FakeS3) -> None:
        s3dcp.save({"counts": collections.deque([1])}, URI)
        with pytest.raises(UnsafeItemError, match=r"counts .*collections\.deque"):
            s3dcp.load({"counts": None}, URI)

    def test_are_executed_where_the_user_says_so(self, server: FakeS3) -> None:
        s3dcp.save({"counts": collections.deque([1])}, URI)
        for options in ({"weights_only": False}, {"planner": DefaultLoadPlanner()}):
            target: dict[str, Any] = {"counts": None}
            s3dcp.load(target, URI, **options)
            assert target == {"counts": collections.deque([1])}

    def test_are_loaded_where_their_type_is_admitted(self, server: FakeS3) -> None:
        s3dcp.save({"settings": Settings(0.5)}, URI)
        target: dict[str, Any] = {"settings": None}
        with torch.serialization.safe_globals([Settings]):
            s3dcp.load(target, URI)

        assert target["settings"].rate == 0.5

    def test_a_flat_plan_is_filled_too(self, server: FakeS3) -> None:
        s3dcp.save({"step": 3}, URI)
        target = {"step": 0}
        planner = s3dcp.WeightsOnlyLoadPlanner(
            flatten_state_dict=False, flatten_sharded_tensors=False
        )
        s3dcp.load(target, URI, planner=planner)

        assert target == {"step": 3}


class TestAsyncSave:
    def test_the_copy_is_saved(self, server: FakeS3) -> None:
        kept = state()
        saving = s3dcp.async_save(kept, URI)
        assert isinstance(saving, Future)
        kept["model"]["weights"].zero_()
        saving.result(60)
        target = empty()
        s3dcp.load(target, URI)

        assert_same(target, state())

    def test_its_future_raises_the_error_itself(self, server: FakeS3) -> None:
        s3dcp.save(state(), URI)
        saving = s3dcp.async_save(state(), URI, overwrite=False)
        assert isinstance(saving, Future)
        with pytest.raises(CheckpointExistsError) as caught:
            saving.result(60)

        assert isinstance(caught.value.__cause__, CheckpointException)
        assert not saving.cancel()

    def test_staging_in_the_background(self, server: FakeS3) -> None:
        s3dcp.save({"step": 1}, URI)
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_non_blocking_copy=False
        )
        stager = DefaultStager(options)
        try:
            response = s3dcp.async_save({"step": 1}, URI, async_stager=stager, overwrite=False)
            assert isinstance(response, AsyncSaveResponse)
            response.staging_completion.result(60)
            with pytest.raises(CheckpointExistsError):
                response.upload_completion.result(60)
        finally:
            stager.close()


def on_asyncio(main: Awaitable[Any]) -> Any:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(main)  # type: ignore[arg-type]


def on_uvloop(main: Awaitable[Any]) -> Any:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)  # type: ignore[arg-type]


async def round_trip(uri: str) -> None:
    await s3dcp.asave(state(), uri)
    target = empty()
    await s3dcp.aload(target, uri)
    assert_same(target, state())


async def tasks() -> int:
    return len(asyncio.all_tasks())


@pytest.mark.parametrize("run", [on_asyncio, on_uvloop])
class TestAwaited:
    def test_what_was_saved_comes_back(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]
    ) -> None:
        run(round_trip(URI))

    def test_errors_are_themselves(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]
    ) -> None:
        async def main() -> None:
            with pytest.raises(CheckpointNotFoundError):
                await s3dcp.aload(empty(), URI)
            server.inject(internal_error(), operation="UploadPart", times=None)
            with pytest.raises(s3dcp.ServerError):
                await s3dcp.asave(state(), URI, s3client_config=CONFIG)

        run(main())

    def test_the_loop_goes_on(self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]) -> None:
        """While a request is held back, and by nothing but the loop's own turn released."""
        rule = server.inject(Stall(head=False), operation="PutObject", key="*/.metadata")

        async def main() -> None:
            saving = asyncio.create_task(s3dcp.asave(state(), URI))
            await asyncio.to_thread(rule.wait)
            for _ in range(100):
                await asyncio.sleep(0)
            assert not saving.done()
            rule.release()
            await saving

        run(main())

    @pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
    def test_a_cancelled_save_leaves_nothing(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any], operation: str
    ) -> None:
        rule = server.inject(Stall(head=False), operation=operation, times=None)

        async def main() -> None:
            saving = asyncio.create_task(s3dcp.asave(state(), URI, s3client_config=CONFIG))
            await asyncio.to_thread(rule.wait)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving

        run(main())
        assert portal().call(tasks) == 1
        assert not portal()._calls
        assert not server.keys(BUCKET)
        assert not server.uploads(BUCKET)
        for thread in threading.enumerate():  # it may be on its last line
            if thread.name == "s3dcp-blocking":
                thread.join(60)
                assert not thread.is_alive()
        rule.release()

    def test_a_cancelled_load_writes_no_more(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]
    ) -> None:
        s3dcp.save(state(), URI)
        rule = server.inject(Stall(head=False), operation="GetObject", key="*.distcp", times=None)
        target = empty()

        async def main() -> None:
            loading = asyncio.create_task(s3dcp.aload(target, URI))
            await asyncio.to_thread(rule.wait)
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert not portal()._calls

        run(main())
        before = target["model"]["weights"].clone()
        rule.release()
        assert torch.equal(before, target["model"]["weights"])

    def test_nothing_is_held_after_a_cancellation(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]
    ) -> None:
        rule = server.inject(Stall(head=False), operation="UploadPart", times=None)

        async def main() -> weakref.ref[torch.Tensor]:
            kept = state()
            held = weakref.ref(kept["model"]["weights"])
            saving = asyncio.create_task(s3dcp.asave(kept, URI))
            await asyncio.to_thread(rule.wait)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            return held

        held = run(main())
        gc.collect()
        assert held() is None

    def test_cancelled_before_it_began(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]
    ) -> None:
        async def main() -> None:
            saving = asyncio.create_task(s3dcp.asave(state(), URI))
            await asyncio.sleep(0)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving

        run(main())
        assert not server.uploads(BUCKET)

    def test_cancelled_between_two_requests(
        self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]
    ) -> None:
        reached, going_on = threading.Event(), threading.Event()

        class Planner(DefaultSavePlanner):
            def resolve_data(self, write_item: Any) -> Any:
                reached.set()
                going_on.wait()
                return super().resolve_data(write_item)

        async def main() -> None:
            saving = asyncio.create_task(s3dcp.asave(state(), URI, planner=Planner()))
            await asyncio.to_thread(reached.wait)
            for _ in range(3):  # as often as one likes
                saving.cancel()
                await asyncio.sleep(0)
                assert not saving.done()
            going_on.set()
            with pytest.raises(asyncio.CancelledError):
                await saving

        run(main())
        assert not server.keys(BUCKET)
        assert not server.uploads(BUCKET)
        asked = {record.operation for record in server.requests}
        assert asked <= {"GetObject", "CreateMultipartUpload", "AbortMultipartUpload"}

    def test_a_timeout(self, server: FakeS3, run: Callable[[Awaitable[Any]], Any]) -> None:
        server.inject(Stall(head=False), times=None)

        async def main() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await s3dcp.aload(empty(), URI)
            assert not portal()._calls

        run(main())


def test_several_loops_at_once(server: FakeS3) -> None:
    runs = (on_asyncio, on_uvloop, on_asyncio, on_uvloop)
    with ThreadPoolExecutor(len(runs)) as pool:
        ends = [pool.submit(run, round_trip(f"{URI}-{number}")) for number, run in enumerate(runs)]
        for end in ends:
            end.result(60)


class FailsOn(DefaultSavePlanner):
    """Fails on one rank."""

    def __init__(self, ranks: dict[int, BaseException]) -> None:
        super().__init__()
        self._ranks = ranks

    def resolve_data(self, write_item: Any) -> Any:
        if (error := self._ranks.get(dist.get_rank())) is not None:
            raise error
        return super().resolve_data(write_item)


def raised_by(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    try:
        function(*args, **kwargs)
    except BaseException as exc:  # noqa: BLE001 - what it is, is what is asked
        return type(exc).__name__, type(exc.__cause__).__name__
    return "", ""


def on_a_rank(uri: str) -> list[tuple[str, str]]:
    own = {"rank": torch.full((3,), float(dist.get_rank())), f"own-{dist.get_rank()}": 1}
    s3dcp.save(own, uri)
    s3dcp.load({f"own-{dist.get_rank()}": 0}, uri)
    asyncio.run(s3dcp.asave(own, uri))
    one: dict[int, BaseException] = {1: IntegrityError("x")}
    different: dict[int, BaseException] = {0: ValueError("y"), 1: IntegrityError("x")}
    interrupt: dict[int, BaseException] = {1: KeyboardInterrupt()}
    return [
        raised_by(s3dcp.save, own, uri, overwrite=False),
        raised_by(s3dcp.load, dict(own), f"{uri}-not-there"),
        raised_by(s3dcp.save, own, uri, planner=FailsOn(one)),
        raised_by(s3dcp.save, own, uri, planner=FailsOn(different)),
        raised_by(s3dcp.save, own, uri, planner=FailsOn(interrupt)),
    ]


def test_on_ranks(ranks2: RankPool, server: FakeS3) -> None:
    expected = [
        ("CheckpointExistsError", "CheckpointException"),
        ("CheckpointNotFoundError", "CheckpointException"),
        ("IntegrityError", "CheckpointException"),
        ("CheckpointException", "NoneType"),
        ("KeyboardInterrupt", "CheckpointException"),
    ]

    assert ranks2.run(on_a_rank, URI) == [expected, expected]
