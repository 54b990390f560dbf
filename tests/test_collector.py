"""The pause of the garbage collector, and what must not leave it off."""

from __future__ import annotations

import gc
import os
import queue
from collections.abc import Iterator

import pytest

from s3dcp._collector import (
    _NEVER,
    CollectorPause,
    _in_force,
    dismantle,
    spare_young,
)

USUAL = gc.get_threshold()
HELD_BACK = (USUAL[0], _NEVER, _NEVER)


@pytest.fixture(autouse=True)
def _as_usual() -> Iterator[None]:
    for pause in tuple(_in_force):
        pause.__exit__()  # what DCP gave up in another test
    assert gc.get_threshold() == USUAL
    yield
    assert not _in_force
    assert gc.get_threshold() == USUAL
    assert gc.isenabled()


@pytest.fixture
def generations() -> Iterator[list[int]]:
    """The generations that were collected, one after the other."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_containers_are_emptied_element_by_element() -> None:
    left: list[int] = []

    class Element:
        def __del__(self) -> None:
            left.append(len(elements) + len(mapping))

    elements = [Element() for _ in range(3)]
    mapping = {n: Element() for n in range(3)}
    dismantle(elements, mapping)
    assert left == [5, 4, 3, 2, 1, 0]


def test_young_objects_become_old_ones() -> None:
    mine: list[object] = []
    assert any(each is mine for each in gc.get_objects(generation=0))

    spare_young()
    assert any(each is mine for each in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_what_someone_has_frozen_stays_so() -> None:
    gc.freeze()
    try:
        spare_young()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_it_is_held_back_meanwhile() -> None:
    with CollectorPause():
        assert gc.get_threshold() == HELD_BACK
        with CollectorPause():
            pass
        assert gc.get_threshold() == HELD_BACK


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_one_that_another_thread_ends_while_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = CollectorPause()
    get_threshold = gc.get_threshold

    def meanwhile() -> tuple[int, int, int]:
        found = get_threshold()
        monkeypatch.undo()
        pause.__exit__()
        return found

    monkeypatch.setattr(gc, "get_threshold", meanwhile)
    with pause:
        assert not pause.is_in_force
        assert gc.get_threshold() == USUAL


def test_new_objects_alone_are_collected_meanwhile(generations: list[int]) -> None:
    held = []
    with CollectorPause():
        for _ in range(100 * USUAL[0]):
            held.append([0])
            Cycle()
        meanwhile = set(generations)
    del held[:]
    held.extend([0] for _ in range(2 * USUAL[0]))

    assert meanwhile == {0}
    assert 1 in generations


def test_what_someone_else_has_set_stays() -> None:
    try:
        with CollectorPause():
            gc.set_threshold(500, 5, 5)
        assert gc.get_threshold() == (500, 5, 5)
        with CollectorPause():
            assert gc.get_threshold() == (500, _NEVER, _NEVER)
        assert gc.get_threshold() == (500, 5, 5)
    finally:
        gc.set_threshold(*USUAL)


def test_where_it_is_off_it_stays_off() -> None:
    gc.disable()
    try:
        with CollectorPause() as pause:
            source: queue.SimpleQueue[int] = queue.SimpleQueue()
            source.put(1)
            assert pause.next_of(source) == 1
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_interrupt_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc, "set_threshold", interrupt)
        with pytest.raises(KeyboardInterrupt), CollectorPause():
            pass


def test_it_is_let_go_while_it_waits() -> None:
    class Interrupted(queue.SimpleQueue[int]):
        def get(self, block: bool = True, timeout: float | None = None) -> int:
            assert gc.get_threshold() == USUAL
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CollectorPause() as pause:
        pause.next_of(Interrupted())


def test_it_is_held_back_while_another_one_waits() -> None:
    """As that of an awaited save, whose caller's loop goes on."""

    class Watched(queue.SimpleQueue[int]):
        def get(self, block: bool = True, timeout: float | None = None) -> int:
            assert gc.get_threshold() == HELD_BACK
            return 1

    with CollectorPause(), CollectorPause() as pause:
        assert pause.next_of(Watched()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process :DeprecationWarning")
def test_a_fork_in_the_middle() -> None:
    """The child has not the threads whose pauses were in force."""
    with CollectorPause():
        child = os.fork()
        if not child:
            os._exit(7 if gc.get_threshold() == USUAL else 1)
        assert gc.get_threshold() == HELD_BACK
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_it_is_let_go_where_the_last_threshold_is_always_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As from Python 3.14 on."""
    usual, known = gc.get_threshold(), gc.get_threshold
    monkeypatch.setattr(gc, "get_threshold", lambda: (*known()[:2], 0))
    with CollectorPause():
        assert known()[:2] == (usual[0], _NEVER)
    assert known()[:2] == usual[:2]
    monkeypatch.undo()
    gc.set_threshold(*usual)
