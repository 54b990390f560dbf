"""How long other threads wait: a ticker in the main thread, and a heartbeat on the loop thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

_TICK_S = 0.001


def ticks(done: Callable[[], bool]) -> list[float]:
    """Sleep for 1 ms again and again until `done`, and return by how many seconds each was late."""
    late_s = []
    last_s = time.perf_counter()
    while True:
        time.sleep(_TICK_S)
        now_s = time.perf_counter()
        late_s.append(now_s - last_s - _TICK_S)
        last_s = now_s
        if done():
            return late_s


def around(work: Callable[[], object]) -> tuple[float, float]:
    """Return the longest block of s3dcp's loop thread while `work` runs.

    Returns:
        Seconds that a callback waited at most, waiting for a core and for the GIL included; and
        the most of that thread's own CPU seconds between two.
    """
    from s3dcp._portal import portal

    stop = threading.Event()
    beating = portal().submit(_beat, stop)
    try:
        work()
    finally:
        stop.set()
        longest_s = beating.result()
    return longest_s


async def _beat(stop: threading.Event) -> tuple[float, float]:
    longest_s = longest_cpu_s = 0.0
    last_s, last_cpu_s = time.perf_counter(), time.thread_time()
    while not stop.is_set():
        await asyncio.sleep(_TICK_S)
        now_s, now_cpu_s = time.perf_counter(), time.thread_time()
        longest_s = max(longest_s, now_s - last_s - _TICK_S)
        longest_cpu_s = max(longest_cpu_s, now_cpu_s - last_cpu_s)
        last_s, last_cpu_s = now_s, now_cpu_s
    return longest_s, longest_cpu_s
