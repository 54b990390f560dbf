"""One budget of memory for all saves and loads of a process.

Every save and every load takes from it as it goes, each on a thread of its own, and gives back as
its requests settle. All of it may come to be held by parties that want more before they can send
anything. So the parties are ordered by age:

- A party with requests of its own under way waits for those, and for nobody else.
- Any other waits until there is room, or it is the oldest, or nobody else holds anything: then it
  takes what it needs, room or not. A party within another one (a save's planner that loads) is as
  old as that one.

The oldest party thus never waits for another one; it ends, and gives back all that it held; and
then another one is the oldest. What is held is within the limit, but for what one party needs at
once: as much as it would have taken alone.

That the oldest goes on is up to its planner, too, which is the user's. If nothing at all has been
given back for `PATIENCE_S`, whoever waits goes on over the limit.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import Self

from s3dcp._waiting import wait_for

#: Seconds without anything being given back after which a limit is not kept any more.
PATIENCE_S = 10.0


def admits(
    size_bytes: int, limit_bytes: int, *, own_bytes: int, all_bytes: int, oldest: bool
) -> bool:
    """Decide whether a party without requests under way may take so many bytes.

    Args:
        size_bytes: What it asks for.
        limit_bytes: What all may hold, as it sees it.
        own_bytes: What it holds.
        all_bytes: What all hold, itself included.
        oldest: Whether no party is older.
    """
    return all_bytes + size_bytes <= limit_bytes or oldest or all_bytes == own_bytes


class Budget:
    """What the saves and loads of a process hold together.

    Args:
        patience_s: `PATIENCE_S`; injected by tests.

    Attributes:
        bells: Rung when something is given back.
        shares: Those that are under way, the oldest first.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.patience_s = patience_s
        # A lock in C, and bells: an interrupt inside a Condition can leave it locked. Reentrant,
        # since a signal's handler that saves may strike where it is held.
        self.lock = threading.RLock()
        self.bells: list[queue.SimpleQueue[None]] = []
        self.shares: list[Share] = []

    @property
    def held_bytes(self) -> int:
        """How much they hold: counted, so that no interrupt can leave it wrong."""
        return sum(share.held_bytes for share in self.shares)

    def share(self, limit_bytes: int) -> Share:
        """Return a new party's share: a context, at whose end all of it is given back.

        Args:
            limit_bytes: What all parties may hold when this one takes more.
        """
        return Share(self, limit_bytes)


class Share:
    """What one save or load holds. Used by the thread that drives it.

    Attributes:
        held_bytes: How much that is.
        thread: The thread.
    """

    def __init__(self, budget: Budget, limit_bytes: int) -> None:
        self._budget = budget
        self._limit_bytes = limit_bytes
        self.thread = threading.get_ident()
        self.held_bytes = 0

    def __enter__(self) -> Self:
        with self._budget.lock:
            self._budget.shares.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._budget.lock:
            self._budget.shares.remove(self)
            self._ring()

    def try_take(self, size_bytes: int) -> bool:
        """Take bytes if there is room; for a party that has requests of its own to wait for."""
        with self._budget.lock:
            if self._budget.held_bytes + size_bytes > self._limit_bytes:
                return False
            self._change(size_bytes)
            return True

    def take(self, size_bytes: int) -> None:
        """Take bytes, waiting for other parties; for one that has nothing under way itself."""
        patient = True
        while True:
            bell: queue.SimpleQueue[None] = queue.SimpleQueue()
            with self._budget.lock:
                if not patient or self._admitted(size_bytes):
                    self._change(size_bytes)
                    return
                self._budget.bells.append(bell)
            try:
                wait_for(bell, self._budget.patience_s)
            except queue.Empty:
                patient = False

    def give(self, size_bytes: int) -> None:
        """Give bytes back."""
        with self._budget.lock:
            self._change(-size_bytes)

    def _admitted(self, size_bytes: int) -> bool:
        shares = self._budget.shares
        # All that this thread drives waits along: a save whose planner loads is held up by that.
        here = threading.get_ident()
        own = [share for share in shares if share is self or share.thread == here]
        return admits(
            size_bytes,
            self._limit_bytes,
            own_bytes=sum(share.held_bytes for share in own),
            all_bytes=self._budget.held_bytes,
            oldest=shares[0] in own,
        )

    def _change(self, size_bytes: int) -> None:
        self.held_bytes += size_bytes
        if size_bytes <= 0:
            self._ring()

    def _ring(self) -> None:
        bells, self._budget.bells = self._budget.bells, []
        for bell in bells:
            bell.put(None)


_budget = Budget()


def budget() -> Budget:
    """Return this process's budget."""
    return _budget


def _forget_budget() -> None:
    global _budget  # noqa: PLW0603
    _budget = Budget()  # what the parent holds is the parent's, and so is the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_budget)
