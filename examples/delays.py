"""How late an event loop is with what is due."""

import asyncio
import time

TICK_S = 0.002


class Delays:
    """The worst delays of a loop since they were last asked for.

    A loop is late where something on it computes or waits, where another thread holds the GIL, and
    where the machine runs other processes. Those are told from the rest by this process's CPU time.
    """

    def __init__(self) -> None:
        self._worst_s = self._own_s = 0.0

    async def watch(self) -> None:
        """Measure the running loop's delays, for ever."""
        while True:
            due_s, cpu_s = time.perf_counter() + TICK_S, time.process_time()
            await asyncio.sleep(TICK_S)
            delay_s = time.perf_counter() - due_s
            self._worst_s = max(self._worst_s, delay_s)
            self._own_s = max(self._own_s, min(delay_s, time.process_time() - cpu_s))

    def take(self) -> dict[str, float]:
        """Return the worst delay, and the worst in which this process was running; then forget."""
        taken = {"delay_ms": 1e3 * self._worst_s, "own_delay_ms": 1e3 * self._own_s}
        self._worst_s = self._own_s = 0.0
        return taken
