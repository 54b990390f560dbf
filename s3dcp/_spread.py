"""A store whose bodies go over several loops, where TLS takes more than one core.

Ciphers are the loop thread's work, and the one part of it that needs no GIL. So the bodies of large
requests, and nothing else, may be spread over loops on threads of their own, each with connections
of its own, and credentials that it finds by itself. The engine is none the wiser: it makes, retries
and counts every request on its loop.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from s3dcp._client import S3Store
from s3dcp._config import S3ClientConfig
from s3dcp._errors import PortalError
from s3dcp._keys import S3Uri
from s3dcp._portal import Portal, offload
from s3dcp._store import Checksum, Condition, Moved, ObjectInfo, Receipt, Scatter, Views

T = TypeVar("T")

_log = logging.getLogger("s3dcp.client")

# Of what is smaller, going over to another thread and back takes longer than the ciphers do.
_SPREAD_BYTES = 1 << 20


@dataclass(slots=True)
class _Lane:
    """A loop with connections of its own, and how many requests it has; the caller's by default."""

    other: tuple[Portal, S3Store] | None = None
    requests: int = 0


class SpreadStore(S3Store):
    """A `Store` that is used on one loop, and sends large bodies over others too.

    Args:
        region: As `S3Store`'s.
        config: As `S3Store`'s; says over how many loops.
    """

    def __init__(self, region: str | None, config: S3ClientConfig) -> None:
        super().__init__(region, config)
        self._settings = (region, config)
        self._lanes = [_Lane()]

    async def open(self) -> None:
        """Open the store, and the other loops if requests are encrypted, as far as they start.

        Raises:
            S3ConfigError: a profile or a setting that does not exist or cannot work.
        """
        await super().open()
        if self.is_encrypted:
            try:
                for _ in range(self._settings[1].loops() - len(self._lanes)):
                    portal, store = Portal(), S3Store(*self._settings)
                    portal.at_close(store.close)
                    self._lanes.append(_Lane((portal, store)))
            except PortalError as exc:
                _log.warning("TLS is left to %d loops: %s", len(self._lanes), exc)

    async def close(self) -> None:
        """Close the connections, and end the other loops."""
        try:
            await super().close()
        finally:
            for lane in self._lanes:
                if lane.other is not None:
                    await offload(lane.other[0].close)

    async def get_range(
        self, uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> ObjectInfo:
        def get(store: S3Store) -> Awaitable[ObjectInfo]:
            return S3Store.get_range(store, uri, start, into, if_match=if_match)

        return await self._spread(into.remaining, get)

    async def put(
        self,
        uri: S3Uri,
        body: Views,
        *,
        checksum: Checksum | None = None,
        condition: Condition | None = None,
        moved: Moved | None = None,
    ) -> Receipt:
        def put(store: S3Store) -> Awaitable[Receipt]:
            return S3Store.put(
                store, uri, body, checksum=checksum, condition=condition, moved=moved
            )

        # What becomes of a condition is for this store to know.
        return await self._spread(_size(body) if condition is None else 0, put)

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
        def send(store: S3Store) -> Awaitable[Receipt]:
            return S3Store.upload_part(
                store, uri, upload_id, number, body, checksum=checksum, moved=moved
            )

        return await self._spread(_size(body), send)

    async def _spread(self, size_bytes: int, send: Callable[[S3Store], Awaitable[T]]) -> T:
        """Send a body where there are the fewest requests, if it is worth going there."""
        lanes = self._lanes if size_bytes >= _SPREAD_BYTES else self._lanes[:1]
        lane = min(lanes, key=attrgetter("requests"))
        lane.requests += 1
        try:
            if lane.other is None:
                return await send(self)
            portal, store = lane.other
            return await portal.run(send, store)
        finally:
            lane.requests -= 1


def _size(body: Views) -> int:
    return sum(view.nbytes for view in body)
