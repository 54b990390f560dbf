"""The budget that all saves and loads of a process share: its rule, and that nobody gets stuck."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from s3dcp._budget import Budget, Share, admits, budget

LIMIT = 100


@pytest.mark.parametrize(
    ("size", "own", "everyone", "oldest", "admitted"),
    [
        (100, 0, 0, False, True),
        (10, 0, 90, False, True),
        (11, 0, 90, False, False),
        (11, 30, 90, False, False),
        (11, 30, 90, True, True),  # nobody is waited for by the oldest
        (11, 90, 90, False, True),  # nobody has anything that could be waited for
        (500, 0, 0, False, True),  # an item larger than the limit passes alone
        (500, 0, 1, False, False),
    ],
)
def test_who_may_take(size: int, own: int, everyone: int, oldest: bool, admitted: bool) -> None:
    assert admits(size, LIMIT, own_bytes=own, all_bytes=everyone, oldest=oldest) is admitted


def test_all_is_given_back_at_the_end() -> None:
    shared = Budget()
    with suppress(ZeroDivisionError), shared.share(LIMIT) as share:
        assert share.try_take(60)
        share.take(60)  # as the oldest
        assert not share.try_take(1)
        assert shared.held_bytes == 120
        raise ZeroDivisionError
    assert shared.held_bytes == 0
    assert not shared.shares


def test_a_younger_party_waits_for_room() -> None:
    shared = Budget()
    with shared.share(LIMIT) as old, shared.share(LIMIT) as young, ThreadPoolExecutor(1) as threads:
        old.take(90)
        taking = threads.submit(young.take, 20)
        old.give(5)
        assert not wait([taking], 0.05).done
        old.give(5)
        taking.result(60)
        assert shared.held_bytes == 100


def test_the_next_one_is_the_oldest_when_the_oldest_ends() -> None:
    shared = Budget()
    with ThreadPoolExecutor(1) as threads, shared.share(LIMIT) as young:
        with shared.share(LIMIT) as late:
            late.take(10)
            shared.shares.reverse()
            taking = threads.submit(young.take, 500)
            assert not wait([taking], 0.05).done
        taking.result(60)


def test_nobody_waits_for_a_party_that_waits_for_it() -> None:
    """A save's planner that loads: within the save, and on its thread."""
    shared = Budget()
    with ThreadPoolExecutor(1) as threads, shared.share(LIMIT) as save:
        with threads.submit(shared.share, LIMIT).result() as other:
            with shared.share(LIMIT) as load:
                save.take(80)
                other.take(10)
                load.take(20)  # as old as the save
                assert shared.held_bytes == 110
                assert not threads.submit(other._admitted, 10).result()
            shared.shares.reverse()  # now the other one is older
            assert not save._admitted(20)
        with shared.share(LIMIT) as load:
            shared.shares.reverse()
            load.take(30)  # nobody else holds anything
            assert shared.held_bytes == 110
    assert shared.held_bytes == 0


def test_a_signal_may_strike_where_the_lock_is_held() -> None:
    """Its handler saves before the job is ended, as many do on SIGTERM."""
    shared = Budget()
    with shared.lock:
        assert shared.lock.acquire(blocking=False)
        shared.lock.release()


def test_an_interrupt_leaves_nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Budget()
    share = shared.share(LIMIT)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(share, "_ring", interrupted)
    with pytest.raises(KeyboardInterrupt), share:
        share.take(60)
    assert shared.held_bytes == 0


def test_patience_ends() -> None:
    """The oldest's planner, say, waits for what only the younger one would do."""
    shared = Budget(patience_s=0.01)
    with shared.share(LIMIT) as old, shared.share(LIMIT) as young:
        old.take(90)
        young.take(20)
        assert shared.held_bytes == 110


def test_a_forked_child_has_a_budget_of_its_own() -> None:
    with budget().share(LIMIT) as share:
        share.take(10)
        with budget().lock:  # as another thread may, at that moment
            child = os.fork()
            if not child:
                with budget().share(LIMIT) as own:
                    own.take(1)
                    os._exit(budget().held_bytes)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1


def test_parties_that_hold_it_all_and_want_more_all_end() -> None:
    """Each collects parts of several pieces before it has anything to send."""
    shared = Budget(patience_s=1e9)
    peak = 0

    def party(seed: int) -> None:
        nonlocal peak
        chance = random.Random(seed)
        with shared.share(LIMIT) as share:
            for _ in range(20):
                pieces = [chance.randrange(1, 30) for _ in range(chance.randrange(1, 5))]
                for piece in pieces:
                    share.take(piece)
                    peak = max(peak, shared.held_bytes)
                for piece in pieces:  # which its request has sent
                    share.give(piece)

    with ThreadPoolExecutor(32) as threads:
        for ended in [threads.submit(party, seed) for seed in range(100)]:
            ended.result(60)
    assert shared.held_bytes == 0
    # What all may hold, and what one may need at once.
    assert peak <= LIMIT + 4 * 29


class Parties(RuleBasedStateMachine):
    """Parties that take and give in any order; a `take` that would wait is not made."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget()
        self.over = 0  # the most that was taken over the limit, by right

    @rule()
    def begin(self) -> None:
        self.budget.share(LIMIT).__enter__()

    def _pick(self, pick: int) -> Share:
        return self.budget.shares[pick % len(self.budget.shares)]

    @precondition(lambda self: self.budget.shares)
    @rule(pick=st.integers(0, 9))
    def end(self, pick: int) -> None:
        self._pick(pick).__exit__(None, None, None)

    @precondition(lambda self: self.budget.shares)
    @rule(pick=st.integers(0, 9), size=st.integers(0, 2 * LIMIT))
    def take(self, pick: int, size: int) -> None:
        share = self._pick(pick)
        before = self.budget.held_bytes
        if share.try_take(size):
            assert before + size <= LIMIT
        elif share is self.budget.shares[0] or before == share.held_bytes:
            share.take(size)
        else:
            return
        assert self.budget.held_bytes == before + size

    @precondition(lambda self: self.budget.held_bytes)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        share = data.draw(st.sampled_from([each for each in self.budget.shares if each.held_bytes]))
        share.give(data.draw(st.integers(1, share.held_bytes)))

    @invariant()
    def all_is_accounted_for(self) -> None:
        assert self.budget.held_bytes == sum(each.held_bytes for each in self.budget.shares)
        assert all(each.held_bytes >= 0 for each in self.budget.shares)

    @invariant()
    def somebody_may_always_go_on(self) -> None:
        """Whatever it asks for."""
        if self.budget.shares:
            assert self.budget.shares[0]._admitted(10 * LIMIT)


TestParties = Parties.TestCase
