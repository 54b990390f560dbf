"""Work on one thread that lets an event loop on another have its turn, again and again.

Python has a thread that holds the GIL let go of it when another has asked for 5 ms. But who lets go
of it now and then by itself, for random bytes, a checksum or a question to torch, has it back
before anyone has woken up; and whoever waits does not ask either, as it was free meanwhile. Many
such steps in a row hold up the others for 0.1 s and more. So every 4 ms the work sleeps for a
moment: where it says that it can, and whenever Python looks for garbage, which it does after some
hundreds of new objects, in whoever's code they are made.

To free many objects at once is one step, too: 15 ms for a plan or the metadata of 20,000 tensors.
So the work holds on to them until nobody else does, and frees them one by one at its end.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

_TURN_S = 0.004
_PAUSE_S = 0.0001


class GivingWay:
    """A context in which its thread's work gives way to others."""

    def __enter__(self) -> Self:
        self._held: list[list[object]] = []
        self._next_s = time.monotonic() + _TURN_S
        _here.work = self
        gc.callbacks.append(self._at_collection)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for objects in self._held:
            while objects:
                objects.pop()
                self.pause()
        _here.work = None
        with suppress(ValueError):  # someone has emptied the list, or this is a fork
            gc.callbacks.remove(self._at_collection)

    def pause(self) -> None:
        """Sleep for a moment, if it is time to."""
        if time.monotonic() >= self._next_s:
            time.sleep(_PAUSE_S)
            self._next_s = time.monotonic() + _TURN_S

    def hold(self, objects: Iterable[object]) -> None:
        """Keep objects to the end of the context."""
        self._held.append(list(objects))

    def _at_collection(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "stop" and _here.work is self:  # collections are on whichever thread
            self.pause()


class _Here(threading.local):
    work: GivingWay | None = None


_here = _Here()


def give_way() -> None:
    """Let other threads run, if this one's work is to and has not done so for 4 ms."""
    if (work := _here.work) is not None:
        work.pause()


def free_later(objects: Iterable[object]) -> None:
    """Have objects that are soon done with freed one by one, if this thread's work gives way."""
    if (work := _here.work) is not None:
        work.hold(objects)


def _forget_work() -> None:
    # Its threads are not in the child, and would not take their callbacks away.
    for callback in gc.callbacks.copy():
        if isinstance(getattr(callback, "__self__", None), GivingWay):
            gc.callbacks.remove(callback)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_work)
