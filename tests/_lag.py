"""How late an event loop is, as its caller's other tasks find it.

How long other threads keep a loop from running is told by the process's CPU time: what the machine
gives to other processes meanwhile is not theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_TICK_S = 0.001


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """By how many seconds the loop was late, once for each of its turns."""
    late_s: list[float] = []

    async def tick() -> None:
        while True:
            due_s, cpu_s = time.perf_counter() + _TICK_S, time.process_time()
            await asyncio.sleep(_TICK_S)
            delay_s = time.perf_counter() - due_s
            late_s.append(min(delay_s, time.process_time() - cpu_s))

    ticking = asyncio.create_task(tick())
    try:
        yield late_s
        await asyncio.sleep(_TICK_S)
    finally:
        ticking.cancel()
