"""What a prefix bears: who starts, who waits, and what an answer changes."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from s3dcp import BinaryPrefixStrategy, DefaultPrefixStrategy, HexPrefixStrategy
from s3dcp._keys import S3Uri
from s3dcp._pacing import FORGET_S, Answer, Lanes, Prefix, Turn, prefix_of

SERVED, THROTTLED, NOTHING = Answer
P = ("bucket", "run/0")
Q = ("bucket", "run/1")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lanes_of(clock: Clock | None = None) -> Lanes[int]:
    return Lanes(clock or Clock())


def enter(lanes: Lanes[int], count: int, prefix: Prefix = P) -> list[Turn]:
    turns = [lanes.enter(prefix) for _ in range(count)]
    assert None not in turns
    return [turn for turn in turns if turn is not None]


def throttled(lanes: Lanes[int], count: int, prefix: Prefix = P) -> None:
    """Play a burst of which every request is refused."""
    for turn in enter(lanes, count, prefix):
        lanes.leave(turn, THROTTLED)


class TestPrefixes:
    @pytest.mark.parametrize(
        ("key", "prefix"),
        [
            ("run/step-1/__0_0.token.distcp", "run/step-1"),
            ("run/step-1/.metadata", "run/step-1"),
            ("run/step-1/a000/__10_0.token.distcp", "run/step-1/a000"),
            ("run/step-1/", "run/step-1"),
            ("object", ""),
            ("", ""),
        ],
    )
    def test_they_end_at_the_last_slash(self, key: str, prefix: str) -> None:
        assert prefix_of(S3Uri("bucket", key)) == ("bucket", prefix)

    def test_the_strategies_are_apart_and_a_rank_is_one(self) -> None:
        def of(name: str, number: int = 0) -> Prefix:
            return prefix_of(S3Uri("bucket", f"run/{name}{number}.token.distcp"))

        for strategy in (
            BinaryPrefixStrategy(prefix_count=8),
            HexPrefixStrategy(epoch_num=3, prefix_count=8),
        ):
            assert len({of(strategy(rank)) for rank in range(8)}) == 8
            assert of(strategy(1), 0) == of(strategy(1), 1)
            assert of(strategy(1)) != prefix_of(S3Uri("bucket", "run/.metadata"))
        assert of(DefaultPrefixStrategy()(0)) == of(DefaultPrefixStrategy()(1))


class TestTheLimit:
    def test_there_is_none_before_the_first_throttling(self) -> None:
        lanes = lanes_of()
        for turn in enter(lanes, 1000):
            lanes.leave(turn, SERVED)
        assert lanes.limit_of(P) == math.inf
        assert len(lanes) == 0

    @pytest.mark.parametrize(
        ("under_way", "limit"), [(1, 1), (2, 1), (3, 1.5), (8, 4), (25, 12.5), (128, 64)]
    )
    @pytest.mark.parametrize("nth", [0, -1])
    def test_a_burst_halves_what_was_under_way_once(
        self, under_way: int, limit: float, nth: int
    ) -> None:
        """Whichever of the burst is answered first."""
        lanes = lanes_of()
        turns = enter(lanes, under_way)
        lanes.leave(turns.pop(nth), THROTTLED)
        assert lanes.limit_of(P) == limit
        for turn in turns:
            lanes.leave(turn, THROTTLED)
        assert lanes.limit_of(P) == limit

    def test_the_last_of_a_burst_still_halves_the_burst(self) -> None:
        lanes = lanes_of()
        *served, last = enter(lanes, 8)
        for turn in served:
            lanes.leave(turn, SERVED)
        lanes.leave(last, THROTTLED)
        assert lanes.limit_of(P) == 4

    def test_every_window_that_is_throttled_halves_again_down_to_one(self) -> None:
        lanes = lanes_of()
        limits = []
        for count in (16, 8, 4, 2, 1, 1):
            throttled(lanes, count)
            limits.append(lanes.limit_of(P))
        assert limits == [8, 4, 2, 1, 1, 1]
        assert lanes.enter(P) is not None

    def test_it_climbs_by_one_for_a_window_that_is_kept_full(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 8)
        under_way = deque(enter(lanes, 4))
        answered = 0
        while lanes.limit_of(P) < 8:
            lanes.leave(under_way.popleft(), SERVED)
            answered += 1
            while (turn := lanes.enter(P)) is not None:
                under_way.append(turn)
        assert answered in range(4 + 5 + 6 + 7, 4 + 5 + 6 + 7 + 5)

    def test_it_does_not_climb_where_it_does_not_hold_back(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 16)
        for _ in range(100):
            [turn] = enter(lanes, 1)
            lanes.leave(turn, SERVED)
        assert lanes.limit_of(P) == 8

    def test_what_was_sent_before_the_cut_says_nothing_of_the_new_limit(self) -> None:
        lanes = lanes_of()
        first, *others = enter(lanes, 8)
        lanes.leave(first, THROTTLED)
        for turn in others:
            lanes.leave(turn, SERVED)
        assert lanes.limit_of(P) == 4

    def test_any_other_end_changes_nothing(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 8)
        for turn in enter(lanes, 4):
            lanes.leave(turn, NOTHING)
        assert lanes.limit_of(P) == 4

    def test_prefixes_are_apart(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 8)
        assert lanes.limit_of(Q) == math.inf
        enter(lanes, 4)
        assert lanes.enter(P) is None
        enter(lanes, 100, Q)

    @pytest.mark.parametrize("capacity", [1, 2, 5, 20])
    def test_it_settles_about_what_the_store_bears(self, capacity: int) -> None:
        """A store that refuses what goes over its capacity, and a client that always has more."""
        lanes = lanes_of()
        limits, refused, sent = [], 0, 0
        under_way = deque((turn, n < capacity) for n, turn in enumerate(enter(lanes, 64)))
        for step in range(5000):
            turn, fits = under_way.popleft()
            lanes.leave(turn, SERVED if fits else THROTTLED)
            while len(under_way) < 64 and (more := lanes.enter(P)) is not None:
                under_way.append((more, sum(fit for _, fit in under_way) < capacity))
                sent += 1
                refused += not under_way[-1][1]
            if step > 500:
                limits.append(lanes.limit_of(P))
        assert max(1, capacity / 2) <= min(limits)
        assert max(limits) <= capacity + 2
        assert refused <= sent / 3


class TestWaiting:
    def test_it_is_first_come_first_served(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 2)
        [turn] = enter(lanes, 1)
        for waiter in range(3):
            assert lanes.enter(P) is None
            lanes.wait(P, waiter)
        order = []
        for _ in range(3):
            [(waiter, turn)] = lanes.leave(turn, NOTHING)
            order.append(waiter)
        assert order == [0, 1, 2]
        assert lanes.leave(turn, NOTHING) == ()

    def test_what_failed_once_goes_first(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 2)
        [turn] = enter(lanes, 1)
        for waiter in range(6):
            lanes.wait(P, waiter, retry=waiter % 2 == 1)
        order = []
        for _ in range(6):
            [(waiter, turn)] = lanes.leave(turn, NOTHING)
            order.append(waiter)
        assert order == [1, 3, 5, 0, 2, 4]

    def test_a_limit_that_grows_lets_two_start(self) -> None:
        lanes = lanes_of()
        throttled(lanes, 2)
        [turn] = enter(lanes, 1)
        for waiter in range(3):
            lanes.wait(P, waiter)
        assert [waiter for waiter, _ in lanes.leave(turn, SERVED)] == [0, 1]


class TestForgetting:
    def test_a_limit_outlives_its_requests_for_a_while(self) -> None:
        clock = Clock()
        lanes = lanes_of(clock)
        throttled(lanes, 8)
        clock.now_s += FORGET_S - 1
        throttled(lanes, 4)
        assert lanes.limit_of(P) == 2
        clock.now_s += FORGET_S
        enter(lanes, 100)
        assert lanes.limit_of(P) == math.inf

    def test_the_idle_go_when_others_come_to_rest(self) -> None:
        clock = Clock()
        lanes = lanes_of(clock)
        for number in range(100):
            throttled(lanes, 2, ("bucket", str(number)))
        assert len(lanes) == 100
        clock.now_s += FORGET_S
        throttled(lanes, 2)
        assert len(lanes) == 1

    def test_there_are_never_many(self) -> None:
        lanes = lanes_of()
        for number in range(5000):
            throttled(lanes, 2, ("bucket", str(number)))
        assert len(lanes) == 1024
        assert lanes.limit_of(("bucket", "4999")) == 1
        assert lanes.limit_of(("bucket", "0")) == math.inf


class LanesMachine(RuleBasedStateMachine):
    """Whatever comes in whatever order: nobody is forgotten, overtaken, or let in too early."""

    prefixes = st.sampled_from([P, Q, ("bucket", "")])

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.lanes = lanes_of(self.clock)
        self.turns: list[tuple[Prefix, Turn]] = []
        self.queues: dict[Prefix, list[tuple[bool, int]]] = {}
        self.burst: dict[Prefix, set[Turn]] = {}  # sent before the last cut
        self.numbers = itertools.count()

    def under_way(self, prefix: Prefix) -> int:
        return Counter(name for name, _ in self.turns)[prefix]

    @rule(prefix=prefixes, count=st.integers(1, 12), retry=st.booleans())
    def arrive(self, prefix: Prefix, count: int, retry: bool) -> None:
        for _ in range(count):
            turn = self.lanes.enter(prefix)
            queue = self.queues.setdefault(prefix, [])
            if turn is None:
                number = next(self.numbers)
                self.lanes.wait(prefix, number, retry=retry)
                queue.append((not retry, number))
                queue.sort()
            else:
                assert not queue, "overtook those who wait"
                self.turns.append((prefix, turn))

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), answer=st.sampled_from(Answer))
    def leave(self, data: st.DataObject, answer: Answer) -> None:
        index = data.draw(st.integers(0, len(self.turns) - 1))
        prefix, turn = self.turns.pop(index)
        before = self.lanes.limit_of(prefix)
        crowd = self.under_way(prefix) + 1

        given = self.lanes.leave(turn, answer)

        queue = self.queues[prefix]
        expected = [number for _, number in queue[: len(given)]]
        assert [waiter for waiter, _ in given] == expected, "out of order"
        del queue[: len(given)]
        after = self.lanes.limit_of(prefix)
        old = turn in self.burst.setdefault(prefix, set())
        if old or answer is NOTHING:
            assert after == before
        elif answer is THROTTLED:
            assert after >= max(1, min(before, crowd) / 2)
            assert after <= max(1, before / 2)
            self.burst[prefix] |= {other for name, other in self.turns if name == prefix}
        else:
            assert after in {before, before + 1 / before}
        self.burst[prefix].discard(turn)
        self.turns += [(prefix, turn) for _, turn in given]

    @rule(seconds=st.sampled_from([1.0, FORGET_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def nobody_waits_where_there_is_room(self) -> None:
        for prefix, queue in self.queues.items():
            limit = self.lanes.limit_of(prefix)
            assert limit >= 1
            if queue:
                assert self.under_way(prefix) + 1 > limit

    def teardown(self) -> None:
        while self.turns:
            prefix, turn = self.turns.pop()
            given = self.lanes.leave(turn, NOTHING)
            del self.queues[prefix][: len(given)]
            self.turns += [(prefix, turn) for _, turn in given]
        assert not any(self.queues.values())
        self.clock.now_s += FORGET_S
        throttled(self.lanes, 1, ("bucket", "another"))
        assert len(self.lanes) == 1


TestAnyOrder = LanesMachine.TestCase
