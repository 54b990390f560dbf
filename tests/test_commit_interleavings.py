"""Writers that save to one path, their requests interleaved and failing as hypothesis likes.

Every request waits until the machine says how it goes: it works, fails, takes effect without the
writer being told, or takes effect at any later time, after the writer has given it up. Whatever the
order, what `.metadata` names is there, and every writer's outcome is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from s3dcp._commit import deletions
from s3dcp._errors import (
    AccessDeniedError,
    CheckpointExistsError,
    CommitConflictError,
    ConflictError,
    S3ConnectionError,
    S3Exception,
    S3ProtocolError,
    ServerError,
    ThrottledError,
)
from s3dcp._flow import Channel
from s3dcp._keys import S3Uri
from s3dcp._publish import delete_quietly, publish
from s3dcp._store import Checksum, Condition, Moved, ObjectInfo, Receipt, Views
from tests._stores import MemoryStore, channel_of

T = TypeVar("T")

URI = S3Uri("bucket", "run/.metadata")
_WRITERS = 3
_TICKS = 25  # of the loop, more than any writer needs from an answer to its next request

WRITER: ContextVar[object] = ContextVar("WRITER", default=None)
_PICKS = st.integers(0, 9)  # of the requests that wait, in circles

#: When a request that fails takes effect all the same, and what its writer is told.
TROUBLES: Sequence[tuple[str, Callable[[], S3Exception]]] = (
    ("none", S3ConnectionError),
    ("none", partial(ServerError, status=500)),
    ("none", partial(ConflictError, status=409)),
    ("none", partial(AccessDeniedError, status=403)),
    ("now", S3ConnectionError),
    ("now", S3ProtocolError),
    ("now", S3Exception),
    ("now", partial(ThrottledError, status=503)),
    ("later", S3ConnectionError),
)


def uri_of(name: str) -> S3Uri:
    return S3Uri("bucket", f"run/{name}")


def names_in(body: bytes | bytearray) -> list[str]:
    return bytes(body).decode().split()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")


@dataclass(eq=False)
class Waiting:
    """A request that has been sent.

    Attributes:
        take_effect: Does what it asks for, and returns or raises the answer.
    """

    name: str
    take_effect: Callable[[], Any]
    answer: asyncio.Future[Any]
    owner: object


class SteppedStore(MemoryStore):
    """A store whose every request waits for its turn."""

    def __init__(self, *, honours_conditions: bool) -> None:
        super().__init__(honours_conditions=honours_conditions)
        self.waiting: list[Waiting] = []
        #: What was published, in order.
        self.published: list[bytes] = []

    def write(self, uri: S3Uri, body: bytes) -> str:
        if uri == URI:
            self.published.append(body)
        return super().write(uri, body)

    async def _turn(self, name: str, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        owner = WRITER.get()
        self.waiting.append(Waiting(name, lambda: run(request()), answer, owner))
        return await answer

    async def get(self, uri: S3Uri) -> tuple[bytes | bytearray, ObjectInfo]:
        return await self._turn(f"get {uri.key}", partial(super().get, uri))

    async def put(
        self,
        uri: S3Uri,
        body: Views,
        *,
        checksum: Checksum | None = None,
        condition: Condition | None = None,
        moved: Moved | None = None,
    ) -> Receipt:
        held = [memoryview(bytes(view)) for view in body]
        put = partial(super().put, uri, held, checksum=checksum, condition=condition)
        return await self._turn(f"put {uri.key}", put)

    async def delete(self, uri: S3Uri, *, if_match: str | None = None) -> None:
        await self._turn(f"delete {uri.key}", partial(super().delete, uri, if_match=if_match))


@dataclass(eq=False)
class Writer:
    """One save: its objects, its commit, and its deletion of what it replaced.

    Attributes:
        task: Ends with the body that was replaced.
    """

    number: int
    overwrite: bool
    names: list[str] = field(init=False)
    body: bytes = field(init=False)
    task: asyncio.Task[bytes | None] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [f"{self.number}"]
        self.body = " ".join(self.names).encode()

    async def save(self, channel: Channel) -> bytes | None:
        """As `S3StorageWriter` does it."""
        WRITER.set(self)
        uris = [uri_of(name) for name in self.names]
        for uri in uris:
            channel.store.write(uri, b"data")  # type: ignore[attr-defined]  # ours, at once
        replaced = await publish(channel, URI, self.body, overwrite=self.overwrite, objects=uris)
        if replaced is None:
            return None
        old = deletions(names_in(replaced.body), self.names)
        await delete_quietly(channel, [uri_of(name) for name in old])
        return bytes(replaced.body)


class Writers(RuleBasedStateMachine):
    """Up to three writers at once on a store that honours conditions."""

    honours_conditions = True
    one_at_a_time = False

    def __init__(self) -> None:
        super().__init__()
        self.store = SteppedStore(honours_conditions=self.honours_conditions)
        self.store.conditional_writes = self.honours_conditions
        self.channel = channel_of(self.store, slots=100)
        self.writers: list[Writer] = []
        self.late: list[Waiting] = []
        self.clean = True  # whether no deletion has failed
        self.runner = asyncio.Runner()

    # What may happen.

    def _may_start(self) -> bool:
        running = sum(not writer.task.done() for writer in self.writers)
        return running < (1 if self.one_at_a_time else _WRITERS)

    @initialize(old=st.booleans())
    def there_may_be_a_checkpoint(self, old: bool) -> None:
        if old:
            self.start(overwrite=True)
            self.all_of_the_last_writer_work()

    @precondition(lambda self: self._may_start())
    @rule(overwrite=st.booleans())
    def start(self, overwrite: bool) -> None:
        writer = Writer(len(self.writers), overwrite)
        self.writers.append(writer)

        async def create() -> None:
            writer.task = asyncio.create_task(writer.save(self.channel))

        self.runner.run(create())
        self._settle()

    def _take(self, pick: int) -> Waiting:
        return self.store.waiting.pop(pick % len(self.store.waiting))

    # As three rules, since most requests work.
    @precondition(lambda self: self.store.waiting)
    @rule(pick=_PICKS)
    def it_works(self, pick: int) -> None:
        self._answer(self._take(pick))

    @precondition(lambda self: self.store.waiting)
    @rule(pick=_PICKS)
    def another_works(self, pick: int) -> None:
        self._answer(self._take(pick))

    @precondition(lambda self: self.store.waiting)
    @rule()
    def all_of_the_last_writer_work(self) -> None:
        """A whole save between two requests of another's."""
        last = self.store.waiting[-1].owner
        while theirs := [each for each in self.store.waiting if each.owner is last]:
            self.store.waiting.remove(theirs[0])
            self._answer(theirs[0])
            self.what_is_named_is_there()

    @precondition(lambda self: self.store.waiting)
    @rule(pick=_PICKS, how=st.sampled_from(TROUBLES))
    def something_goes_wrong(self, pick: int, how: tuple[str, Callable[[], S3Exception]]) -> None:
        effect, error = how
        waiting = self._take(pick)
        if effect == "later" and not self.one_at_a_time:
            self.late.append(waiting)
        elif effect != "none":
            try:
                waiting.take_effect()
            except S3Exception as exc:
                self._refuse(waiting, exc)
                return
        self._refuse(waiting, error())

    @precondition(lambda self: self.late)
    @rule(pick=_PICKS)
    def it_arrives_late(self, pick: int) -> None:
        waiting = self.late.pop(pick % len(self.late))
        with suppress(S3Exception):  # nobody is there to be told
            waiting.take_effect()

    # What must hold.

    @invariant()
    def what_is_named_is_there(self) -> None:
        if URI in self.store.objects:
            for name in names_in(self.store.objects[URI][0]):
                assert uri_of(name) in self.store.objects

    @invariant()
    def outcomes_are_true(self) -> None:
        published = self.store.published
        for writer in self.writers:
            count = published.count(writer.body)
            assert count <= (1 if self.honours_conditions else 100)
            at = published.index(writer.body) if count else 0
            before = published[at - 1] if at else None
            if count and not writer.overwrite:
                assert before is None
            if not writer.task.done():
                continue
            error = writer.task.exception()
            if error is None:
                assert count
                if self.honours_conditions:
                    assert writer.task.result() == before
            elif isinstance(error, CheckpointExistsError):
                assert not count
                assert not writer.overwrite
                if self.clean:
                    assert not any(uri_of(name) in self.store.objects for name in writer.names)
            else:
                assert isinstance(error, S3Exception)

    def teardown(self) -> None:
        """All that is left works; then only what nobody could know the fate of may be left over."""
        try:
            while self.store.waiting:
                self._answer(self.store.waiting.pop(0))
                self.what_is_named_is_there()
            for waiting in self.late:
                with suppress(S3Exception):
                    waiting.take_effect()
                self.what_is_named_is_there()
            assert all(writer.task.done() for writer in self.writers)
            self.outcomes_are_true()
            self._nothing_is_left_over()
        finally:
            self.runner.close()

    def _nothing_is_left_over(self) -> None:
        """After outcomes that are known, the bucket has what is published and nothing else."""
        errors = [writer.task.exception() for writer in self.writers]
        if self.clean and all(
            error is None or isinstance(error, CheckpointExistsError) for error in errors
        ):
            last = names_in(self.store.published[-1]) if self.store.published else []
            expected = {uri_of(name) for name in last} | ({URI} if last else set())
            assert set(self.store.objects) == expected

    # How it is done.

    def _answer(self, waiting: Waiting) -> None:
        try:
            waiting.answer.set_result(waiting.take_effect())
        except S3Exception as exc:
            waiting.answer.set_exception(exc)
        self._settle()

    def _refuse(self, waiting: Waiting, error: S3Exception) -> None:
        if waiting.name.startswith("delete"):
            self.clean = False
        waiting.answer.set_exception(error)
        self._settle()

    def _settle(self) -> None:
        async def settle() -> None:
            for _ in range(_TICKS):
                await asyncio.sleep(0)

        self.runner.run(settle())


class OneWriter(Writers):
    """One writer after the other on a store that ignores conditions, without late arrivals."""

    honours_conditions = False
    one_at_a_time = True


_STEPS = settings(max_examples=50, stateful_step_count=30)
TestWriters = Writers.TestCase
TestWriters.settings = _STEPS
TestOneWriter = OneWriter.TestCase
TestOneWriter.settings = _STEPS


# What hypothesis would find too, given longer than a test takes.


def test_a_commit_that_arrives_after_the_next_attempt_was_refused() -> None:
    machine = Writers()
    machine.start(overwrite=True)
    machine.it_works(0)
    machine.something_goes_wrong(0, ("later", S3ConnectionError))
    machine.it_works(0)
    machine.something_goes_wrong(0, ("none", partial(AccessDeniedError, status=403)))
    assert isinstance(machine.writers[0].task.exception(), AccessDeniedError)
    machine.it_arrives_late(0)
    machine.what_is_named_is_there()
    machine.teardown()


def test_a_commit_that_was_lost_and_replaced_is_not_published_again() -> None:
    machine = Writers()
    machine.there_may_be_a_checkpoint(old=True)
    machine.start(overwrite=True)
    machine.it_works(0)
    machine.something_goes_wrong(0, ("now", S3ConnectionError))
    machine.start(overwrite=True)
    machine.all_of_the_last_writer_work()
    machine.what_is_named_is_there()
    machine.it_works(0)
    assert isinstance(machine.writers[1].task.exception(), CommitConflictError)
    machine.teardown()
