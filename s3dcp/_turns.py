"""Turns of requests on their loop.

botocore takes 1 ms of the loop's thread to make a request: one for each round of the loop, so that
what arrives meanwhile is not kept waiting by all the others. Bodies wait for the requests that were
there before them: else the first ones, which the kernel takes megabytes of at once, would hold up
the others' beginnings, and with those their ends.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Who is next. Used on one loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._asked = self._served = 0
        self._bodies: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def make(self) -> None:
        """Wait for a turn to make a request."""
        self._asked += 1
        try:
            async with self._lock:
                await asyncio.sleep(0)
        finally:
            self._served += 1
            while self._bodies and self._bodies[0][0] <= self._served:
                body = self._bodies.popleft()[1]
                if not body.done():
                    body.set_result(None)

    async def send(self) -> None:
        """Wait until as many requests have been made as now wait, or have been, to be made."""
        if self._served < self._asked:
            body = asyncio.get_running_loop().create_future()
            self._bodies.append((self._asked, body))
            await body
