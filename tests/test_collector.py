"""The pause of the garbage collector, and what must not leave it off."""

from __future__ import annotations

import gc
import os
import queue
from collections.abc import Iterator

import pytest

from s3dcp._collector import CollectorPause, _in_force


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert not _in_force
    gc.enable()


def test_it_is_off_meanwhile_and_on_afterwards() -> None:
    with CollectorPause():
        assert not gc.isenabled()
        with CollectorPause():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_was_made_meanwhile_is_old() -> None:
    """Else the next collections would walk it."""
    with CollectorPause():
        made: list[list[int]] = [[] for _ in range(10)]
    old = {id(each) for each in gc.get_objects(generation=2)}
    assert all(id(each) in old for each in made)
    assert not gc.get_freeze_count()


def test_what_is_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with CollectorPause():
            pass
        assert gc.get_freeze_count() >= frozen > 0
    finally:
        gc.unfreeze()


def test_where_it_is_off_it_stays_off() -> None:
    gc.disable()
    with CollectorPause() as pause:
        source: queue.SimpleQueue[int] = queue.SimpleQueue()
        source.put(1)
        assert pause.next_of(source) == 1
    assert not gc.isenabled()


def test_an_interrupt_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gc, "disable", interrupt)
    with pytest.raises(KeyboardInterrupt), CollectorPause():
        pass
    assert gc.isenabled()


def test_an_interrupt_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(queue.SimpleQueue[int]):
        def get(self, block: bool = True, timeout: float | None = None) -> int:
            assert gc.isenabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CollectorPause() as pause:
        pause.next_of(Interrupted())
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process :DeprecationWarning")
def test_a_fork_in_the_middle() -> None:
    """The child has not the threads whose pauses were in force."""
    with CollectorPause():
        child = os.fork()
        if not child:
            os._exit(7 if gc.isenabled() else 1)
        assert not gc.isenabled()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
