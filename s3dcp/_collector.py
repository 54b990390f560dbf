"""Python's garbage collector, kept from walking old objects while work makes many that soon die.

A collection of all generations walks every object of the process: 0.2 s for those of torch alone,
in which no other thread runs, and again and again while the objects of a plan or of a pickle add
up: 5.6 s of 6.8 to load the metadata of 200,000 items. So meanwhile new objects alone are
collected, some hundreds at a time; those of the work then die young, and count for nothing. This
holds for the whole process, so it ends whenever the work waits, unless someone else needs it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import Any, Self, TypeVar

from s3dcp._giving_way import give_way
from s3dcp._waiting import wait_for

T = TypeVar("T")

# How many collections of a generation it takes for the next one to be collected with it: the most
# that can be set.
_NEVER = (1 << 31) - 1


class CollectorPause:
    """A context in which no objects but new ones are collected by themselves."""

    def __enter__(self) -> Self:
        try:
            _in_force.add(self)
            _hold_back()
            if self not in _in_force:  # another thread has ended it meanwhile
                self.__exit__()
        except BaseException:  # an interrupt, after which there is no `__exit__`
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            _in_force.discard(self)
        finally:  # even if an interrupt strikes right here
            if not _in_force:
                _let_go()

    @property
    def is_in_force(self) -> bool:
        """Whether it was entered, and has not been left."""
        return self in _in_force

    def next_of(
        self, source: queue.SimpleQueue[T], meanwhile: Callable[[], object] = lambda: None
    ) -> T:
        """Return a queue's next element; until there is one, lift the pause, as `wait_for` does."""
        try:
            return source.get_nowait()
        except queue.Empty:
            pass
        with self.lifted():
            return wait_for(source, meanwhile=meanwhile)

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Lift the pause, for as long as something is waited for."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def spare_young() -> None:
    """Have all objects count as old: those that imports leave, and that stay.

    Else the next collection walks them, for 30 ms.
    """
    if not gc.get_freeze_count():  # what someone has frozen is to stay so
        gc.freeze()
        gc.unfreeze()


def dismantle(*containers: MutableSequence[Any] | MutableMapping[Any, Any]) -> None:
    """Empty containers element by element, such that other threads run meanwhile.

    To free 100,000 objects is one step otherwise, and takes 50 ms.
    """
    for container in containers:
        take = container.pop if isinstance(container, MutableSequence) else container.popitem
        while container:
            take()
            give_way()


# The pauses in force. Adding and discarding are atomic, so threads need no lock: the last one out
# lets go, and no order of events leaves the collector held back.
_in_force: set[CollectorPause] = set()
_thresholds = gc.get_threshold()


def _hold_back() -> None:
    global _thresholds  # noqa: PLW0603 - the collector is the process's, too
    now = gc.get_threshold()
    if _NEVER not in now:
        _thresholds = now
        gc.set_threshold(now[0], _NEVER, _NEVER)


def _let_go() -> None:
    young, middle, _ = gc.get_threshold()  # the last one is always 0 from Python 3.14 on
    if middle == _NEVER:  # and not what someone has set meanwhile
        gc.set_threshold(young, *_thresholds[1:])


def _let_go_in_child() -> None:
    # The threads whose pauses these were are not in the child.
    _in_force.clear()
    _let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
