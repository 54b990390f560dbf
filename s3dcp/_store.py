"""The words that the engine and a store share, and what the engine needs a store to do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from s3dcp._config import ChecksumName
from s3dcp._keys import S3Uri

#: Bytes in order, without being joined. Nobody may write to them while a request holds them.
Views = Sequence[memoryview]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a store says of an object without sending it.

    Attributes:
        crc: Its CRC64NVME, if that was asked for, and the store has it.
    """

    key: str
    size_bytes: int
    etag: str | None
    last_modified: datetime | None = None
    crc: int | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """`size_bytes`, under the name that the reference library's readers know."""
        return self.size_bytes


def matchable(etag: str | None) -> str | None:
    """Return an ETag as conditions may name it: a weak one never matches (RFC 9110), so None."""
    return None if etag is None or etag.startswith("W/") else etag


def same_etag(one: str, other: str) -> bool:
    """Tell whether answers are of one object. A cache may weaken the ETag of some of them."""
    return one.removeprefix("W/") == other.removeprefix("W/")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadInfo:
    """A multipart upload that has neither been completed nor aborted."""

    key: str
    upload_id: str
    initiated: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A precondition of a PUT: the key must be absent, or hold the object with this ETag."""

    absent: bool = False
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum of a body, sent along so that the store can refuse a damaged one."""

    algorithm: ChecksumName
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A store's answer to a PUT. A checksum counts as supported when it was echoed."""

    etag: str | None
    checksum_echoed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """An uploaded part, as the completion of its upload names it."""

    number: int
    size_bytes: int
    etag: str | None
    checksum: Checksum | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartList:
    """What a multipart upload holds that is not complete.

    Attributes:
        algorithm: S3's name of the checksum that it was created for; None where it has none.
        composite: Whether the object's checksum is made of its parts', rather than of its bytes.
        parts: By number.
    """

    algorithm: str | None
    composite: bool
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the parts."""
        return sum(part.size_bytes for part in self.parts)


class Moved:
    """How many bytes of one body have gone over the wire, for whoever looks, on any thread.

    Attributes:
        size_bytes: Those of the attempt that is under way, and what it goes on from.
    """

    __slots__ = ("size_bytes",)

    def __init__(self) -> None:
        self.size_bytes = 0


class Scatter:
    """Where the bytes of one response go, in order, and how many have arrived.

    A failed request leaves `received` at what is already in place, so that the next attempt asks
    only for the rest.

    Args:
        views: The places.
        moved: Is told how many have arrived.

    Attributes:
        etag: Of the object that they are bytes of, as soon as the store has said so.
    """

    __slots__ = ("_index", "_moved", "_offset", "_views", "etag", "received", "size_bytes")

    def __init__(self, views: Views, moved: Moved | None = None) -> None:
        self._moved = moved or Moved()
        self._moved.size_bytes = 0
        self._views = [view for view in views if view.nbytes]
        self._index = 0
        self._offset = 0
        self.etag: str | None = None
        self.received = 0
        self.size_bytes = sum(view.nbytes for view in self._views)

    @property
    def remaining(self) -> int:
        """Bytes that have not arrived yet."""
        return self.size_bytes - self.received

    def free(self) -> memoryview:
        """Return the place for the next bytes; only valid while `remaining`."""
        view = self._views[self._index]
        return view[self._offset :] if self._offset else view

    def advance(self, count: int) -> None:
        """Take note that `count` bytes were written to the last `free()`."""
        self.received += count
        self._moved.size_bytes = self.received
        self._offset += count
        if self._offset == self._views[self._index].nbytes:
            # Dropped at once: a view keeps its tensor alive.
            self._views[self._index] = memoryview(b"")
            self._index += 1
            self._offset = 0

    def write(self, data: bytes | memoryview) -> None:
        """Copy `data`, at most `remaining` bytes, to where it belongs."""
        data = memoryview(data)
        while data.nbytes:
            place = self.free()
            count = min(place.nbytes, data.nbytes)
            place[:count] = data[:count]
            self.advance(count)
            data = data[count:]


class Store(Protocol):
    """S3's requests as the engine sees them: one attempt each, errors already typed.

    Attributes:
        conditional_writes: Whether conditions on PUT are honoured, by configuration, by being AWS,
            or by having refused one with 412; None while that is not known.
    """

    conditional_writes: bool | None

    async def get(self, uri: S3Uri) -> tuple[bytes | bytearray, ObjectInfo]:
        """Return a whole, small object."""

    async def get_range(
        self, uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> ObjectInfo:
        """Receive `into.remaining` bytes of the object, from `start`."""

    async def head(self, uri: S3Uri, *, with_crc: bool = False) -> ObjectInfo:
        """Return what is known of the object; for its CRC, one may need to be let decrypt it."""

    def list(self, uri: S3Uri, *, delimiter: str = "") -> AsyncIterator[ObjectInfo]:
        """Iterate over the objects whose keys start with the URI's key.

        With a delimiter, common prefixes are listed too, with a size of 0 and no ETag.
        """

    async def put(
        self,
        uri: S3Uri,
        body: Views,
        *,
        checksum: Checksum | None = None,
        condition: Condition | None = None,
        moved: Moved | None = None,
    ) -> Receipt:
        """Write an object in one request; `moved` is told how far it is."""

    async def create_upload(self, uri: S3Uri, *, checksum: ChecksumName | None) -> str:
        """Start a multipart upload and return its id."""

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
        """Send a part; `moved` is told how far it is. Numbers start at 1."""

    async def complete_upload(
        self, uri: S3Uri, upload_id: str, parts: Sequence[Part], *, checksum: Checksum | None
    ) -> Receipt:
        """Publish the parts, in order, as one object."""

    async def abort_upload(self, uri: S3Uri, upload_id: str) -> None:
        """Drop an upload and its parts."""

    def list_uploads(self, uri: S3Uri) -> AsyncIterator[UploadInfo]:
        """Iterate over the unfinished uploads to keys that start with the URI's key."""

    async def list_parts(self, uri: S3Uri, upload_id: str) -> PartList:
        """Return what an unfinished upload holds."""

    async def delete(self, uri: S3Uri, *, if_match: str | None = None) -> None:
        """Delete an object; an absent one is no error.

        With `if_match`, and where conditions are honoured: only if it has this ETag.
        """

    async def copy(self, source: S3Uri, target: S3Uri, *, if_match: str | None) -> None:
        """Copy an object of 5 GiB at the most inside the store, if it has this ETag."""

    async def copy_part(
        self,
        source: S3Uri,
        start: int,
        end: int,
        target: S3Uri,
        upload_id: str,
        number: int,
        *,
        if_match: str | None,
    ) -> Part:
        """Make bytes [start, end) of an object a part of an upload, if it has this ETag."""
