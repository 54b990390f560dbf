"""Ranges of objects coming down, straight to where they are wanted.

A body that breaks off is resumed from the bytes already held, with the object's ETag pinned, so
that no two answers are ever mixed.
"""

from __future__ import annotations

from functools import partial

from s3dcp._checksums import INLINE_CHECKSUM_BYTES, crcs_of
from s3dcp._errors import CheckpointChangedError, PreconditionFailedError, S3Exception
from s3dcp._flow import Channel, wait_all
from s3dcp._keys import S3Uri
from s3dcp._portal import offload
from s3dcp._ranges import cut
from s3dcp._store import Moved, ObjectInfo, Scatter, Views, same_etag


class Downloads:
    """Reads of objects that must not change meanwhile. Used on the portal's loop.

    Args:
        channel: The client's.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._etags: dict[S3Uri, str] = {}

    async def head(self, uri: S3Uri) -> ObjectInfo:
        """Return what the store says of an object, whose reads are pinned to it from then on."""
        head = partial(self._channel.store.head, uri)
        info = await self._channel.request("HeadObject", uri, head)
        self.pin(uri, info.etag)
        return info

    async def fetch(
        self,
        uri: S3Uri,
        start: int,
        into: Views,
        checked: Views = (),
        moved: Moved | None = None,
    ) -> list[int]:
        """Fill `into` with the object's bytes from `start` on.

        Args:
            uri: The object.
            start: Offset of the first byte.
            into: Where the bytes go, in order. Held until this returns or raises.
            checked: The pieces of that memory whose CRCs are wanted.
            moved: Is told how many bytes have arrived.

        Returns:
            The item CRC of each view of `checked`.

        Raises:
            CheckpointChangedError: the object is not the one that was read before.
            S3Exception: as the store.
        """
        scatter = Scatter(into, moved)
        size_bytes = scatter.size_bytes

        async def attempt() -> None:
            nonlocal scatter
            if not scatter.remaining:
                # All bytes came, and then more: none of them can be trusted.
                scatter = Scatter(into, moved)
            try:
                info = await self._channel.store.get_range(
                    uri, start + scatter.received, scatter, if_match=self._etags.get(uri)
                )
            except S3Exception:
                # What came is a part of that object, and the rest must be, too.
                if scatter.received:
                    self.pin(uri, scatter.etag)
                raise
            self.pin(uri, info.etag)

        if size_bytes:
            try:
                await self._channel.request("GetObject", uri, attempt, size_bytes=size_bytes)
            except PreconditionFailedError as exc:
                raise _changed(uri) from exc
        if sum(view.nbytes for view in checked) < INLINE_CHECKSUM_BYTES:
            return crcs_of(checked)
        return await offload(crcs_of, checked)

    async def fetch_parallel(
        self, uri: S3Uri, start: int, into: memoryview, range_bytes: int
    ) -> None:
        """Fill `into` with the object's bytes from `start` on, several ranges at once."""
        await wait_all(
            [
                partial(self.fetch, uri, start + a, [into[a:b]])
                for a, b in cut(0, into.nbytes, range_bytes)
            ]
        )

    def pin(self, uri: S3Uri, etag: str | None) -> None:
        """Have all reads of an object be of the one with this ETag.

        Raises:
            CheckpointChangedError: another one was read before.
        """
        if etag is not None and not same_etag(self._etags.setdefault(uri, etag), etag):
            raise _changed(uri)


_discarded = memoryview(bytearray(256 << 10))


def discard(size_bytes: int) -> list[memoryview]:
    """Return where bytes may go that nobody wants: memory that all requests share."""
    whole, rest = divmod(size_bytes, _discarded.nbytes)
    return [_discarded] * whole + ([_discarded[:rest]] if rest else [])


def _changed(uri: S3Uri) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{uri} was replaced while it was being read: load the checkpoint again",
        bucket=uri.bucket,
        key=uri.key,
    )
