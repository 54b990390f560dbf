"""A checkpoint is replaced while it is loaded: the load is of one of the two, or fails and says so.

What runs on ranks are module-level functions; their asserts are the tests' too.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from s3dcp import (
    CheckpointChangedError,
    S3Exception,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
)
from s3dcp.testing import Cut, Exchange, FakeS3, Fault, Rule, Stall
from tests._states import StateDict, assert_same, blank, fill

if TYPE_CHECKING:
    from tests._ranks import RankPool

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")


def state(seed: int) -> StateDict:
    return {"a": fill((60, 40), seed=seed), "b": fill((70, 50), seed=seed + 10), "step": seed}


def save(uri: str, seed: int) -> None:
    writer = S3StorageWriter(None, uri, thread_count=2)
    dcp.save(state(seed), storage_writer=writer, no_dist=True)


# On ranks.


class Meeting(S3StorageReader):
    """Of two ranks, one replaces the checkpoint between its step of the load and the other's."""

    def __init__(self, uri: str, step: str, *, first: int) -> None:
        super().__init__(None, uri)
        self._uri = uri
        self._step = step
        self._is_first = dist.get_rank() == first

    def _in_turn(self, step: str, function: Callable[[], Any]) -> Any:
        if step != self._step:
            return function()
        if not self._is_first:
            dist.barrier()
            return function()
        found = function()
        save(self._uri, 2)
        dist.barrier()
        return found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: Metadata = self._in_turn(
            "read_metadata", lambda: super(Meeting, self).read_metadata(*args, **kwargs)
        )
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        found: Future[None] = self._in_turn(
            "read_data", lambda: super(Meeting, self).read_data(plan, planner)
        )
        return found


def load_while_replaced(uri: str, step: str, first: int) -> dict[int, BaseException]:
    target = blank(state(1))
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, storage_reader=Meeting(uri, step, first=first))
    if step == "read_metadata":
        assert_same(target, blank(state(1)))  # no byte of either was read
    dcp.load(target, storage_reader=S3StorageReader(None, uri))
    assert_same(target, state(2))
    return {rank: failure for rank, (failure, _) in caught.value.failures.items()}


@pytest.fixture
def uri(fake: FakeS3) -> str:
    bucket = f"replaced-{secrets.token_hex(6)}"
    fake.create_bucket(bucket)
    return f"s3://{bucket}/ck"


@pytest.fixture(params=["fake", "rclone"])
def place(request: pytest.FixtureRequest) -> str:
    """Where to save, on each server."""
    if request.param == "rclone":
        return f"s3://{request.getfixturevalue('bucket')}/ck"
    found: str = request.getfixturevalue("uri")
    return found


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_read_different_metadata(ranks2: RankPool, place: str, first: int) -> None:
    save(place, 1)
    for failures in ranks2.run(load_while_replaced, place, "read_metadata", first):
        assert list(failures) == [0]  # who compares
        assert isinstance(failures[0], CheckpointChangedError)


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_of_which_one_comes_too_late(ranks2: RankPool, place: str, first: int) -> None:
    save(place, 1)
    for failures in ranks2.run(load_while_replaced, place, "read_data", first):
        assert list(failures) == [1 - first]  # the other had the old one, whole
        assert isinstance(failures[1 - first], CheckpointChangedError)


# At every moment of one rank's reads.


@dataclass(frozen=True)
class Hold(Fault):
    """Serves a request once the rule is released."""

    async def play(self, exchange: Exchange) -> None:
        await exchange.stall()
        await super().play(exchange)


@contextmanager
def replaced_at(rule: Rule, uri: str, *, requests: int = 1) -> Iterator[None]:
    """Save over a checkpoint as soon as requests for it are stalled; then let them go on."""

    def replace() -> None:
        rule.wait(requests)
        try:
            save(uri, 2)
        finally:
            rule.release()

    with ThreadPoolExecutor(1) as thread:
        replacing = thread.submit(replace)
        yield
        replacing.result()


def load(uri: str, make: Callable[[], Any]) -> StateDict:
    target: StateDict = blank(state(1))
    reader = S3StorageReader(None, uri, reader_constructor=make())
    dcp.load(target, storage_reader=reader, no_dist=True)
    return target


def error_of(uri: str, make: Callable[[], Any]) -> S3Exception:
    with pytest.raises(dcp.CheckpointException) as caught:
        load(uri, make)
    [(error, _)] = caught.value.failures.values()
    assert isinstance(error, S3Exception)
    return error


readers = pytest.mark.parametrize(
    "make",
    [
        S3ReaderConstructor.dcp_optimized,
        S3ReaderConstructor.sequential,
        S3ReaderConstructor.range_based,
    ],
    ids=lambda make: make.__name__,
)


@readers
@pytest.mark.parametrize("skip", [0, 1])
def test_objects_vanish_before_they_are_read(
    fake: FakeS3, uri: str, make: Callable[[], Any], skip: int
) -> None:
    save(uri, 1)
    held = fake.inject(Hold(), operation="GetObject", key="*.distcp", skip=skip)
    with replaced_at(held, uri):
        error = error_of(uri, make)
    assert isinstance(error, CheckpointChangedError)
    assert_same(load(uri, make), state(2))


@readers
def test_an_object_vanishes_while_it_is_read(
    fake: FakeS3, uri: str, make: Callable[[], Any]
) -> None:
    save(uri, 1)
    cut = fake.inject(Cut(body_bytes=1000), operation="GetObject", key="*.distcp")
    resumed = fake.inject(
        Hold(),
        operation="GetObject",
        where=lambda record: any(record.key == each.key for each in cut.struck),
    )
    with replaced_at(resumed, uri):
        error = error_of(uri, make)
    assert isinstance(error, CheckpointChangedError)


@readers
def test_an_object_changes_while_it_is_read(
    fake: FakeS3, uri: str, make: Callable[[], Any]
) -> None:
    """As under another library, whose saves use the same names again."""
    save(uri, 1)
    bucket = uri.split("/")[2]
    key = min(key for key in fake.keys(bucket) if key.endswith(".distcp"))
    fake.inject(Cut(body_bytes=100), operation="GetObject", key=key)
    resumed = fake.inject(Hold(), operation="GetObject", key=key)

    def replace() -> None:
        resumed.wait()
        fake.write(bucket, key, bytes(len(fake.read(bucket, key))))
        resumed.release()

    with ThreadPoolExecutor(1) as thread:
        replacing = thread.submit(replace)
        error = error_of(uri, make)
        replacing.result()
    assert isinstance(error, CheckpointChangedError)


def test_objects_vanish_that_the_store_has_begun_to_send(fake: FakeS3, uri: str) -> None:
    save(uri, 1)
    stalled = fake.inject(Stall(body_bytes=10), operation="GetObject", key="*.distcp", times=2)
    with replaced_at(stalled, uri, requests=2):
        assert_same(load(uri, S3ReaderConstructor.dcp_optimized), state(1))


@pytest.mark.parametrize(
    ("fault", "seed"),
    [(Stall(body_bytes=10), None), (Hold(), 2)],
    ids=["while it is read", "before it is read"],
)
def test_metadata_is_replaced(fake: FakeS3, uri: str, fault: Fault, seed: int | None) -> None:
    save(uri, 1)
    stalled = fake.inject(fault, operation="GetObject", key="*/.metadata")
    with replaced_at(stalled, uri):
        if seed is None:  # the old one, whose objects are gone
            error = error_of(uri, S3ReaderConstructor.dcp_optimized)
            assert isinstance(error, CheckpointChangedError)
        else:
            assert_same(load(uri, S3ReaderConstructor.dcp_optimized), state(seed))


def test_an_object_changes_between_two_reads_of_it(fake: FakeS3, uri: str) -> None:
    save(uri, 1)
    bucket = uri.split("/")[2]
    sizes = {key: len(fake.read(bucket, key)) for key in fake.keys(bucket)}
    key = max(sizes, key=sizes.__getitem__)
    held = fake.inject(Hold(), operation="GetObject", key=key, skip=1)

    def replace() -> None:
        held.wait()
        fake.write(bucket, key, bytes(sizes[key]))
        held.release()

    with ThreadPoolExecutor(1) as thread:
        replacing = thread.submit(replace)
        error = error_of(uri, partial(S3ReaderConstructor.range_based, 100))
        replacing.result()
    assert isinstance(error, CheckpointChangedError)
