"""Waiting for another thread: what comes, what does not come in time, and interrupts."""

from __future__ import annotations

import queue
import signal
import threading

import pytest

from s3dcp._waiting import wait_for


def test_what_comes_is_returned() -> None:
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Timer(0.0, source.put, [1]).start()
    assert wait_for(source) == 1


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 0.01, 0.3])
def test_what_does_not_come(timeout_s: float) -> None:
    source: queue.SimpleQueue[int] = queue.SimpleQueue()
    with pytest.raises(queue.Empty):
        wait_for(source, timeout_s)
    source.put(2)
    assert wait_for(source, timeout_s) == 2


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals go to processes here")
def test_an_interrupt_that_does_not_end_the_wait_by_itself() -> None:
    """As one does not that strikes right before the wait: here another thread is struck."""

    def strike() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - either line may be struck
        threading.Thread(target=strike).start()
        wait_for(queue.SimpleQueue())
