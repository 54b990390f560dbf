"""A store whose bodies go over several loops, where TLS takes more than one core.

Ciphers are the loop thread's work, and the one part of it that needs no GIL. So the bodies of large
requests, and nothing else, may be spread over loops on threads of their own, each with connections
of its own. The engine is none the wiser: it makes, retries and counts every request on its loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TypeVar

from s3dcp._client import S3Store
from s3dcp._config import S3ClientConfig
from s3dcp._keys import S3Uri
from s3dcp._portal import Portal, offload
from s3dcp._store import Checksum, Condition, Moved, ObjectInfo, Receipt, Scatter, Views

T = TypeVar("T")

# Of what is smaller, going over to another thread and back takes longer than the ciphers do.
_SPREAD_BYTES = 1 << 20


@dataclass(slots=True)
class _Lane:
    """A loop, its connections, and how many requests it has."""

    portal: Portal
    store: S3Store
    requests: int = 0

    async def run(self, send: Callable[[], Awaitable[T]]) -> T:
        """Await `send()` on the loop, counted."""
        self.requests += 1
        try:
            return await self.portal.run(send)
        finally:
            self.requests -= 1


class SpreadStore(S3Store):
    """A `Store` that is used on one loop, and sends large bodies over others too.

    Args:
        region: As `S3Store`'s.
        config: As `S3Store`'s; says over how many loops.
        here: The portal of the loop that opens and uses it.
    """

    def __init__(self, region: str | None, config: S3ClientConfig, here: Portal) -> None:
        super().__init__(region, config)
        self._settings = (region, config)
        self._lanes = [_Lane(here, self)]

    async def open(self) -> None:
        """Open the store, and the other loops if requests are encrypted.

        Raises:
            PortalError: there is no thread to be had.
            S3ConfigError: a profile or a setting that does not exist or cannot work.
        """
        await super().open()
        if self.is_encrypted:
            for _ in range(self._settings[1].loops() - len(self._lanes)):
                lane = _Lane(Portal(), S3Store(*self._settings))
                lane.portal.at_close(lane.store.close)
                self._lanes.append(lane)

    async def close(self) -> None:
        """Close the connections, and end the other loops."""
        await super().close()
        for lane in self._lanes[1:]:
            await offload(lane.portal.close)

    async def get_range(
        self, uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> ObjectInfo:
        lane = self._lane(into.remaining)
        get = partial(S3Store.get_range, lane.store, uri, start, into, if_match=if_match)
        return await lane.run(get)

    async def put(
        self,
        uri: S3Uri,
        body: Views,
        *,
        checksum: Checksum | None = None,
        condition: Condition | None = None,
        moved: Moved | None = None,
    ) -> Receipt:
        # What becomes of a condition is for this store to know.
        lane = self._lanes[0] if condition else self._lane(_size(body))
        put = partial(S3Store.put, lane.store, uri, body)
        return await lane.run(partial(put, checksum=checksum, condition=condition, moved=moved))

    async def upload_part(
        self,
        uri: S3Uri,
        upload_id: str,
        number: int,
        body: Views,
        *,
        checksum: Checksum | None,
        moved: Moved | None = None,
    ) -> Receipt:
        lane = self._lane(_size(body))
        send = partial(S3Store.upload_part, lane.store, uri, upload_id, number, body)
        return await lane.run(partial(send, checksum=checksum, moved=moved))

    def _lane(self, size_bytes: int) -> _Lane:
        """Return the lane with the fewest requests, for a body that is worth it."""
        if size_bytes < _SPREAD_BYTES:
            return self._lanes[0]
        return min(self._lanes, key=attrgetter("requests"))


def _size(body: Views) -> int:
    return sum(view.nbytes for view in body)
