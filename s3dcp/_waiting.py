"""Waiting for another thread, such that an interrupt ends it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# An interrupt that strikes right before the wait does not end it: Python looks for signals when the
# wait is over. A garbage collection in between makes that moment a long one. So waits are short.
_STEP_S = 0.1


def wait_for(
    source: queue.SimpleQueue[T],
    timeout_s: float | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> T:
    """Return a queue's next element; while there is none, call `meanwhile` every 0.1 s.

    Raises:
        queue.Empty: there was none for so many seconds.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = _STEP_S if deadline_s is None else min(_STEP_S, deadline_s - time.monotonic())
        try:
            return source.get(timeout=max(left_s, 0.0))
        except queue.Empty:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise
            meanwhile()
