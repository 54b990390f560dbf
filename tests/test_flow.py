"""One request and its retries, and how requests share slots and prefixes."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3dcp import S3Client, S3ClientConfig
from s3dcp._errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    S3ConnectionError,
    S3Exception,
    S3ProtocolError,
    S3TimeoutError,
    ServerError,
    ThrottledError,
)
from s3dcp._flow import Channel, Pacer, RetryPolicy, Slots, wait_all
from s3dcp._keys import S3Uri
from s3dcp._pacing import Answer, Turn, prefix_of
from s3dcp._portal import Portal
from s3dcp._publish import publish, read
from s3dcp._tally import Tally
from s3dcp.testing import Exchange, FakeS3, Fault, Stall, internal_error, slow_down
from tests._stores import MemoryStore, channel_of, no_sleep

T = TypeVar("T")

URI = S3Uri("bucket", "p/key")
OTHER = S3Uri("bucket", "q/key")


def run(scenario: Callable[[], Awaitable[T]]) -> T:
    async def main() -> T:
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(main())


async def settle(rounds: int = 50) -> None:
    """Let everything run that can: nothing here waits for anything but each other."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class Clock:
    """Time that passes where it is said to: in delays, and by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def policy(self, **settings: Any) -> RetryPolicy:
        return RetryPolicy(jitter=lambda: 1.0, sleep=self.sleep, clock=self, **settings)


@pytest.mark.parametrize(
    ("asked_s", "delay_s"), [(None, 0.5), (0.0, 0.5), (3.0, 3.0), (86_400.0, 20.0)]
)
def test_a_store_that_asks_for_time_gets_it(asked_s: float | None, delay_s: float) -> None:
    error = ThrottledError("SlowDown")
    error.retry_after_s = asked_s
    assert RetryPolicy(jitter=lambda: 1.0).delay_s(1, error) == delay_s


def failing_channel(
    clock: Clock, policy: RetryPolicy, error: S3Exception, cost_s: float
) -> Channel:
    """Return a channel each of whose requests takes some seconds and fails."""
    store = MemoryStore()

    def fail(name: str, uri: S3Uri) -> None:
        clock.now_s += cost_s
        raise type(error)(error.message)

    store.before = fail
    return replace(channel_of(store), retry=policy)


def head(channel: Channel, uri: S3Uri = URI, **options: Any) -> Awaitable[Any]:
    return channel.request("HeadObject", uri, partial(channel.store.head, uri), **options)


class TestWhatFollowsAFailure:
    @pytest.mark.parametrize(
        ("failures", "error", "elapsed_s", "max_attempts", "delay_s"),
        [
            (1, ServerError(), 0.0, None, 0.05),
            (3, ServerError(), 0.0, None, 0.2),
            (1, ThrottledError(), 0.0, None, 0.5),
            (4, ServerError(), 0.0, None, 0.4),
            (5, ServerError(), 0.0, None, None),  # the policy's
            (2, ServerError(), 0.0, 3, 0.1),
            (3, ServerError(), 0.0, 3, None),  # the request's
            (2, S3ProtocolError(), 0.0, None, 0.1),
            (3, S3ProtocolError(), 0.0, None, None),  # the error's
            (1, ThrottledError(), 9.5, None, 0.5),
            (1, ThrottledError(), 9.6, None, None),  # the deadline's
            (1, S3TimeoutError(), 60.0, None, None),
        ],
    )
    def test_it_is_decided_by_counts_and_by_time(
        self,
        failures: int,
        error: S3Exception,
        elapsed_s: float,
        max_attempts: int | None,
        delay_s: float | None,
    ) -> None:
        policy = Clock().policy(max_attempts=5, timeout_s=10.0)
        assert policy.next_delay_s(failures, error, elapsed_s, max_attempts) == delay_s

    @given(st.floats(0, 1, exclude_max=True), st.integers(1, 50), st.floats(0, 400))
    def test_no_attempt_begins_after_the_deadline(
        self, jitter: float, failures: int, elapsed_s: float
    ) -> None:
        policy = RetryPolicy(max_attempts=100, timeout_s=300.0, jitter=lambda: jitter)
        delay_s = policy.next_delay_s(failures, ThrottledError(), elapsed_s)
        if delay_s is None:
            assert elapsed_s + policy.delay_s(failures, ThrottledError()) > 300
        else:
            assert 0 <= delay_s < 20
            assert elapsed_s + delay_s <= 300


class TestADeadline:
    @pytest.mark.parametrize(
        ("timeout_s", "cost_s", "attempts", "said"),
        [
            (1.0, 0.0, 5, "(given up after 5 attempts in 0.8 s)"),  # .05 + .1 + .2 + .4
            (math.inf, 0.0, 8, "(given up after 8 attempts in 6.4 s)"),
            (100.0, 60.12, 2, "(given up after 2 attempts in 120.3 s)"),
            (30.0, 60.0, 1, "(given up after 1 attempt in 60.0 s)"),
        ],
    )
    def test_the_last_error_says_when_it_was_given_up(
        self, timeout_s: float, cost_s: float, attempts: int, said: str
    ) -> None:
        clock = Clock()
        policy = clock.policy(max_attempts=8, timeout_s=timeout_s)
        channel = failing_channel(clock, policy, ServerError("500"), cost_s)

        with pytest.raises(ServerError) as caught:
            run(lambda: head(channel))

        assert str(caught.value) == f"500 {said}"
        assert channel.tally.totals().overall.requests == attempts

    def test_what_no_attempt_would_mend_is_raised_as_it_is(self) -> None:
        clock = Clock()
        channel = failing_channel(clock, clock.policy(), AccessDeniedError("403"), 1.0)
        with pytest.raises(AccessDeniedError, match=r"^403$"):
            run(lambda: head(channel))
        assert clock.slept == []

    def test_waiting_for_a_slot_does_not_count_before_the_first_attempt(self) -> None:
        clock = Clock()
        store = MemoryStore()
        store.write(URI, b"")
        failures = iter([ServerError()])

        def fail(name: str, uri: S3Uri) -> None:
            if error := next(failures, None):
                raise error

        store.before = fail
        channel = replace(channel_of(store, slots=1), retry=clock.policy(timeout_s=10.0))

        async def scenario() -> None:
            await channel.slots.acquire()
            waiting = asyncio.create_task(_awaited(head(channel)))
            await settle()
            clock.now_s += 1000
            channel.slots.release()
            await waiting

        run(scenario)
        assert len(store.requests) == 2

    @pytest.mark.parametrize(("waits_for", "others"), [("a turn", [URI]), ("a slot", [OTHER] * 2)])
    def test_waiting_counts_between_attempts(self, waits_for: str, others: list[S3Uri]) -> None:
        """Others have all of it, and never end."""
        policy = RetryPolicy(jitter=lambda: 0.0, timeout_s=0.05)
        channel = replace(channel_of(MemoryStore(), slots=2), retry=policy)
        holders: list[asyncio.Task[Turn]] = []

        async def send() -> None:
            if waits_for == "a turn":
                await throttle(channel.pacer, Slots(1), URI)
            enter = channel.pacer.enter
            holders.extend(asyncio.create_task(enter(uri, channel.slots)) for uri in others)
            await settle()
            raise ServerError("500")

        async def scenario() -> None:
            with pytest.raises(ServerError, match=r"500 \(given up after 1 attempt in \d+\.\d s\)"):
                await channel.request("HeadObject", URI, send)
            for holder in holders:
                channel.pacer.leave(await holder, channel.slots, Answer.NOTHING)
            await _assert_idle(channel, slots=2)

        run(scenario)

    @pytest.mark.parametrize("limit", ["slots", "turns"])
    def test_what_is_tried_again_goes_before_what_has_not_been_tried(self, limit: str) -> None:
        """So that the deadline of a request is not spent behind all others."""
        channel = channel_of(MemoryStore(), slots=1 if limit == "slots" else 4)
        tried: list[int] = []

        async def send(number: int) -> None:
            tried.append(number)
            await settle(8)  # until all others wait
            if tried.count(number) <= 3:
                raise ServerError

        async def scenario() -> None:
            if limit == "turns":
                await throttle(channel.pacer, channel.slots, URI)
            await wait_all(
                [partial(channel.request, "HeadObject", URI, partial(send, n)) for n in range(8)]
            )

        run(scenario)
        # Who gives a slot or a turn back has it taken by the next, and then is the first to wait.
        for number in range(8):
            tries = [at for at, other in enumerate(tried) if other == number]
            assert len(tries) == 4
            assert tries[-1] - tries[0] < 12, tried  # not 24, as in turn

    def test_a_commit_has_one_too(self) -> None:
        clock = Clock()
        store = MemoryStore()

        def fail(name: str, uri: S3Uri) -> None:
            if name == "put":
                clock.now_s += 60
                raise ThrottledError("503", status=503)

        store.before = fail
        channel = replace(channel_of(store), retry=clock.policy(timeout_s=200.0))
        with pytest.raises(S3Exception, match="every attempt failed"):
            run(lambda: publish(channel, URI, b"body", overwrite=True))
        assert [name for name, _ in store.requests].count("put") == 4


async def _awaited(what: Awaitable[T]) -> T:
    return await what


async def _assert_idle(channel: Channel, slots: int) -> None:
    """Assert that nothing is held: as many slots are free as there are, and no turn is taken."""
    assert not channel.pacer.lanes._busy
    async with asyncio.timeout(60):
        for _ in range(slots):
            await channel.slots.acquire()
    for _ in range(slots):
        channel.slots.release()


class TestTurns:
    def test_who_waits_for_its_prefix_holds_no_slot(self) -> None:
        async def scenario() -> None:
            pacer, slots = Pacer(), Slots(2)
            await throttle(pacer, slots, URI)
            turn = await pacer.enter(URI, slots)
            waiting = [asyncio.create_task(pacer.enter(URI, slots)) for _ in range(5)]
            await settle()
            assert not any(task.done() for task in waiting)
            # The other slot is free for any other prefix, again and again.
            for _ in range(3):
                other = await pacer.enter(OTHER, slots)
                pacer.leave(other, slots, Answer.SERVED)
            for task in waiting:
                pacer.leave(turn, slots, Answer.NOTHING)
                turn = await task
            pacer.leave(turn, slots, Answer.NOTHING)

        run(scenario)

    def test_what_was_queued_for_a_slot_when_the_prefix_was_throttled_waits_too(self) -> None:
        async def scenario() -> None:
            pacer, slots = Pacer(), Slots(4)
            first, *others = [await pacer.enter(URI, slots) for _ in range(4)]
            started: list[int] = []

            async def enter(number: int) -> Turn:
                turn = await pacer.enter(URI, slots)
                started.append(number)
                return turn

            waiting = [asyncio.create_task(enter(number)) for number in range(6)]
            await settle()
            pacer.leave(first, slots, Answer.THROTTLED)
            await settle()
            assert started == []  # three are under way, two may be
            for turn in others:
                pacer.leave(turn, slots, Answer.NOTHING)
            await settle()
            assert started == [0, 1]
            for task in waiting:
                pacer.leave(await task, slots, Answer.NOTHING)
            assert started == [0, 1, 2, 3, 4, 5]

        run(scenario)

    @pytest.mark.parametrize("given", [False, True])
    def test_who_is_cancelled_gives_the_turn_on(self, given: bool) -> None:
        """While it waits, and in the moment in which it got its turn."""

        async def scenario() -> None:
            pacer, slots = Pacer(), Slots(4)
            await throttle(pacer, slots, URI)
            turn = await pacer.enter(URI, slots)
            first, second = [asyncio.create_task(pacer.enter(URI, slots)) for _ in range(2)]
            await settle()
            if given:
                pacer.leave(turn, slots, Answer.NOTHING)
            first.cancel()
            if not given:
                pacer.leave(turn, slots, Answer.NOTHING)
            pacer.leave(await second, slots, Answer.NOTHING)
            with pytest.raises(asyncio.CancelledError):
                await first

        run(scenario)

    def test_who_is_cancelled_while_it_waits_for_a_slot_gives_the_turn_on(self) -> None:
        async def scenario() -> None:
            pacer, slots = Pacer(), Slots(2)
            await throttle(pacer, slots, URI)
            turn = await pacer.enter(URI, slots)
            first, second = [asyncio.create_task(pacer.enter(URI, slots)) for _ in range(2)]
            await settle()
            held = [await pacer.enter(OTHER, slots)]
            queued = asyncio.create_task(pacer.enter(OTHER, slots))
            await settle()
            pacer.leave(turn, slots, Answer.NOTHING)  # the slot is OTHER's, the turn is `first`'s
            held.append(await queued)
            await settle()
            first.cancel()
            await settle()
            for other in held:
                pacer.leave(other, slots, Answer.SERVED)
            pacer.leave(await second, slots, Answer.NOTHING)

        run(scenario)

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(["start", "start again"]), st.integers(0, 2)),
                st.tuples(st.just("end"), st.integers(0, 30)),
                st.tuples(st.just("throttle"), st.integers(0, 30)),
                st.tuples(st.just("cancel"), st.integers(0, 30)),
                st.tuples(st.just("settle"), st.just(0)),
            ),
            max_size=60,
        )
    )
    def test_nothing_is_lost_in_any_order_of_events(self, script: list[tuple[str, int]]) -> None:
        run(partial(_play, script))

    def test_channels_share_their_pacer_and_not_their_slots(self) -> None:
        async def scenario() -> None:
            store = MemoryStore()
            store.write(URI, b"")
            one = channel_of(store, slots=8)
            other = replace(one, slots=Slots(8))
            throttled = [await one.pacer.enter(URI, one.slots) for _ in range(2)]
            for turn in throttled:
                one.pacer.leave(turn, one.slots, Answer.THROTTLED)

            turn = await one.pacer.enter(URI, one.slots)
            waiting = asyncio.create_task(_awaited(head(other)))
            await settle()
            assert store.requests == []
            one.pacer.leave(turn, one.slots, Answer.NOTHING)
            await waiting

        run(scenario)


async def throttle(pacer: Pacer, slots: Slots, uri: S3Uri) -> None:
    """Bring the limit of a prefix down to one."""
    turn = await pacer.enter(uri, slots)
    pacer.leave(turn, slots, Answer.THROTTLED)


async def _play(script: list[tuple[str, int]]) -> None:
    requests = Requests(slots=3)
    for event, number in script:
        if event in {"start", "start again"}:
            requests.start(S3Uri("bucket", f"{number}/key"), retry=event != "start")
        elif event == "cancel":
            requests.cancel(number)
        elif event == "settle":
            await requests.settled()
        else:
            requests.answer(number, Answer.THROTTLED if event == "throttle" else Answer.SERVED)
    await requests.finish()


class Requests:
    """Requests that end when they are told to."""

    def __init__(self, slots: int) -> None:
        self.count = slots
        self.slots, self.pacer = Slots(slots), Pacer()
        self.tasks: dict[asyncio.Task[None], S3Uri] = {}
        self.on_the_wire: dict[asyncio.Task[None] | None, asyncio.Future[Answer]] = {}

    def start(self, uri: S3Uri, *, retry: bool) -> None:
        self.tasks[asyncio.create_task(self._run(uri, retry=retry))] = uri

    async def _run(self, uri: S3Uri, *, retry: bool) -> None:
        turn = await self.pacer.enter(uri, self.slots, retry=retry)
        task = asyncio.current_task()
        answered = self.on_the_wire[task] = asyncio.get_running_loop().create_future()
        assert len(self.on_the_wire) <= self.count
        answer = Answer.NOTHING
        try:
            answer = await answered
        finally:
            del self.on_the_wire[task]
            self.pacer.leave(turn, self.slots, answer)

    def answer(self, nth: int, answer: Answer) -> None:
        for future in list(self.on_the_wire.values())[nth : nth + 1]:
            if not future.done():
                future.set_result(answer)

    def cancel(self, nth: int) -> None:
        for task in list(self.tasks)[nth : nth + 1]:
            task.cancel()

    async def settled(self) -> None:
        """Let all go on that can, and assert that the others have a reason to wait."""
        await settle(10 + 6 * len(self.tasks))
        waiting = [t for t in self.tasks if not t.done() and t not in self.on_the_wire]
        if len(self.on_the_wire) < self.count:
            for task in waiting:
                lane = self.pacer.lanes._busy[prefix_of(self.tasks[task])]
                assert lane.under_way + 1 > lane.limit, "waits in vain"

    async def finish(self) -> None:
        """Answer all that are left, and assert that nothing is held then."""
        await self.settled()
        while self.on_the_wire:
            self.answer(0, Answer.SERVED)
            await self.settled()
        assert all(task.done() for task in self.tasks)
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert not self.pacer.lanes._busy
        assert self.slots._free == self.count


class TestTallies:
    def test_a_channel_counts_for_whom_it_is_asked_to(self) -> None:
        store = MemoryStore()
        store.write(URI, b"12345")
        channel = channel_of(store)
        mine = Tally()
        counting = channel.counting(mine)
        assert (counting.slots, counting.pacer) == (channel.slots, channel.pacer)

        run(lambda: head(channel))
        run(lambda: read(counting, URI))
        run(lambda: publish(counting, OTHER, b"123", overwrite=True))

        assert list(channel.tally.totals().operations) == ["HeadObject"]
        counted = mine.totals().operations
        assert {name: (t.requests, t.size_bytes) for name, t in counted.items()} == {
            "GetObject": (2, 5),
            "PutObject": (1, 3),
        }

    def test_every_attempt_counts_with_what_became_of_it(self) -> None:
        clock = Clock()
        store = MemoryStore()
        store.write(URI, b"")
        script: Iterator[tuple[float, S3Exception | None]] = iter(
            [
                (1.0, ThrottledError()),
                (60.0, S3TimeoutError()),
                (0.5, S3ConnectionError()),
                (0.5, ServerError()),
                (0.25, None),
                (0.5, ObjectNotFoundError()),
            ]
        )

        def play(name: str, uri: S3Uri) -> None:
            seconds, error = next(script)
            clock.now_s += seconds
            if error:
                raise error

        store.before = play
        channel = replace(channel_of(store), retry=clock.policy())
        run(lambda: head(channel, size_bytes=10))
        with pytest.raises(ObjectNotFoundError):
            run(lambda: head(channel, size_bytes=10))

        totals = channel.tally.totals().operations["HeadObject"]
        assert (totals.requests, totals.retries, totals.size_bytes) == (6, 4, 10)
        assert (totals.throttles, totals.timeouts) == (1, 1)
        assert (totals.lost_connections, totals.server_errors) == (1, 1)
        assert totals.max_s == 60
        assert totals.quantile_s(0) <= 0.25 * 2**0.25

    def test_what_is_cancelled_does_not_count(self) -> None:
        async def scenario() -> None:
            channel = channel_of(MemoryStore())
            never = asyncio.Event()
            request = asyncio.create_task(_awaited(channel.request("HeadObject", URI, never.wait)))
            await settle()
            request.cancel()
            await settle()
            assert request.cancelled()
            assert channel.tally.totals().operations == {}
            await _assert_idle(channel, slots=4)

        run(scenario)


@pytest.fixture
def server(fake: FakeS3) -> FakeS3:
    fake.create_bucket("bucket")
    return fake


def connected(server: FakeS3, **settings: Any) -> tuple[Portal, Channel]:
    return S3Client(server.region, S3ClientConfig(**settings)).connect()


def without_delays(channel: Channel) -> Channel:
    return replace(channel, retry=replace(channel.retry, sleep=no_sleep))


@dataclass
class Meeting:
    """Where requests are held until as many of each prefix are there at once as are wanted.

    Attributes:
        wanted: How many of each prefix.
        present: The server's record of how many there are now.
        most: And of how many there ever were.
    """

    wanted: Counter[str]
    present: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    held: asyncio.Event = field(default_factory=asyncio.Event)

    async def join(self, prefix: str) -> None:
        self.present[prefix] += 1
        self.most |= self.present
        if self.present == self.wanted:
            self.held.set()
        async with asyncio.timeout(60):
            await self.held.wait()
        self.present[prefix] -= 1


@dataclass(frozen=True)
class Held(Fault):
    """Goes on with another fault once a meeting is complete."""

    meeting: Meeting
    then: Fault

    async def play(self, exchange: Exchange) -> None:
        await self.meeting.join(exchange.record.key.partition("/")[0])
        await self.then.play(exchange)


class TestAgainstAServer:
    def test_a_throttled_prefix_slows_down_and_no_other(self, server: FakeS3) -> None:
        keys = [f"slow/{n}" for n in range(12)] + [f"quick/{n}" for n in range(4)]
        for key in keys:
            server.write("bucket", key, b"body")
        # All 8 slots are taken by the one prefix, and all 8 requests refused at once ...
        burst = Meeting(Counter(slow=8))
        server.inject(Held(burst, slow_down()), operation="GetObject", key="slow/*", times=8)
        # ... after which it may have 4, and the rest of the slots are the other's.
        after = Meeting(Counter(slow=4, quick=4))
        server.inject(Held(after, Fault()), operation="GetObject", times=8)
        here, channel = connected(server, max_connections=8)
        tally = Tally()

        async def scenario(channel: Channel) -> None:
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for key in keys:
                    group.create_task(read(channel, S3Uri("bucket", key)))

        here.call(scenario, without_delays(channel).counting(tally))

        assert burst.most == {"slow": 8}
        assert after.most == {"slow": 4, "quick": 4}
        statuses = Counter((r.key.partition("/")[0], r.status) for r in server.requests)
        assert statuses == {("slow", 503): 8, ("slow", 200): 12, ("quick", 200): 4}
        assert 4 <= channel.pacer.lanes.limit_of(("bucket", "slow")) < 12
        assert channel.pacer.lanes.limit_of(("bucket", "quick")) == math.inf
        totals = tally.totals().overall
        assert totals.requests == server.stats()["GetObject"] == 24
        assert (totals.throttles, totals.retries, totals.size_bytes) == (8, 8, 16 * 4)

    def test_a_deadline_ends_what_max_attempts_would_not(self, server: FakeS3) -> None:
        clock = Clock()
        server.inject(internal_error(), times=None)
        here, channel = connected(server, max_attempts=1000, retry_timeout_s=30.0)
        assert (channel.retry.max_attempts, channel.retry.timeout_s) == (1000, 30.0)
        policy = replace(channel.retry, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0)

        with pytest.raises(ServerError, match=r"InternalError \(500\).*given up after 10 attempts"):
            here.call(read, replace(channel, retry=policy), URI)
        assert len(server.requests) == 10

    def test_many_requests_to_a_store_that_stalls_end_in_time(
        self, server: FakeS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first to have failed for good ends the others, also those that wait for a slot."""
        monkeypatch.setattr("s3dcp._s3client.RetryPolicy", partial(RetryPolicy, jitter=lambda: 0.0))
        server.inject(Stall(head=False), times=None)
        here, channel = connected(
            server, max_connections=2, max_attempts=1000, read_timeout_s=0.1, retry_timeout_s=0.3
        )

        async def scenario() -> int:
            uris = [S3Uri("bucket", f"{number}") for number in range(200)]
            with pytest.raises(S3TimeoutError, match="given up after"):
                await wait_all([partial(read, channel, uri) for uri in uris])
            return len(asyncio.all_tasks())

        assert here.call(scenario) == 1
        # One after the other, all would have had their first try.
        assert len({record.key for record in server.requests}) < 20
        here.call(_assert_idle, channel, slots=2)

    def test_clients_of_one_endpoint_share_what_they_learn(
        self, server: FakeS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pacer(**settings: Any) -> Pacer:
            return connected(server, **settings)[1].pacer

        shared = pacer()
        assert pacer(max_connections=3) is shared
        assert pacer(endpoint_url=server.endpoint_url + "/") is shared
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        assert pacer() is shared
        assert pacer(endpoint_url="http://127.0.0.1:9") is not shared
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        assert pacer() is pacer(max_attempts=3)
        assert pacer() is not shared


@pytest.mark.parametrize(("asked_s", "found_s"), [(3, 3.0), (None, None)])
def test_the_time_that_a_store_asks_for_is_read(
    server: FakeS3, asked_s: int | None, found_s: float | None
) -> None:
    portal, channel = connected(server, max_attempts=1)
    server.inject(slow_down(retry_after_s=asked_s), times=1)
    with pytest.raises(ThrottledError) as caught:
        portal.call(read, channel, URI)
    assert caught.value.retry_after_s == found_s
