"""Work that lets others have their turn: when it sleeps, and on whose thread."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import s3dcp._giving_way
from s3dcp._giving_way import _PAUSE_S, _TURN_S, GivingWay, free_later, give_way


class Clock:
    """Stands for `time`; sleeping takes its time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.slept_s.append(pause_s)
        self.now_s += pause_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(s3dcp._giving_way, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = gc.callbacks.copy()
    yield
    assert gc.callbacks == before


def make_objects() -> None:
    """Make so many that some are looked at by the collector."""
    assert [[] for _ in range(2 * gc.get_threshold()[0])]


ASK = {"asked": give_way, "collecting": make_objects}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_it_sleeps_once_a_turn(clock: Clock, ask: Callable[[], None]) -> None:
    with GivingWay():
        ask()
        assert not clock.slept_s
        for turns in (1, 2, 3):
            clock.now_s += _TURN_S
            ask()
            ask()
            assert clock.slept_s == [_PAUSE_S] * turns


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_nobody_else_sleeps(clock: Clock, ask: Callable[[], None]) -> None:
    ask()
    with ThreadPoolExecutor(1) as threads:
        with GivingWay():
            clock.now_s += _TURN_S
            threads.submit(ask).result()
        ask()
    assert not clock.slept_s


def test_two_threads_give_way_each_in_its_time(clock: Clock) -> None:
    def work() -> None:
        with GivingWay():
            give_way()

    with GivingWay(), ThreadPoolExecutor(1) as threads:
        clock.now_s += _TURN_S
        threads.submit(work).result()  # its turn has just begun
        assert not clock.slept_s
        give_way()
    assert clock.slept_s == [_PAUSE_S]


def test_an_error_ends_it(clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError), GivingWay():
        raise ZeroDivisionError
    clock.now_s += _TURN_S
    give_way()
    assert not clock.slept_s


class Element:
    """Takes a turn's time to be freed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __del__(self) -> None:
        self._clock.now_s += _TURN_S


def test_objects_are_freed_one_by_one_at_the_end(clock: Clock) -> None:
    elements = [Element(clock) for _ in range(3)]
    with GivingWay():
        free_later(elements)
        elements.clear()
        assert clock.now_s == 0
    assert clock.slept_s == [_PAUSE_S] * 3


def test_nothing_is_held_where_nobody_gives_way(clock: Clock) -> None:
    elements = [Element(clock)]
    free_later(elements)
    elements.clear()
    assert clock.now_s == _TURN_S
    assert not clock.slept_s


def test_what_others_have_stays(clock: Clock) -> None:
    elements = [Element(clock) for _ in range(3)]
    with GivingWay():
        free_later(elements)
    assert len(elements) == 3
    assert clock.now_s == 0


def test_callbacks_that_someone_has_removed_meanwhile(clock: Clock) -> None:
    before = gc.callbacks.copy()
    with GivingWay():
        gc.callbacks[:] = before
    clock.now_s += _TURN_S
    give_way()
    assert not clock.slept_s


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process :DeprecationWarning")
def test_a_fork_in_the_middle() -> None:
    """The child has not the threads whose callbacks these were."""
    before = gc.callbacks.copy()
    with GivingWay():
        child = os.fork()
        if not child:
            os._exit(7 if gc.callbacks == before else 1)
        assert gc.callbacks != before
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
