"""A store in memory that fails as it is told, for what no server can be made to do on cue."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence

from s3dcp._config import ChecksumName
from s3dcp._errors import ObjectNotFoundError, PreconditionFailedError
from s3dcp._flow import Channel, RetryPolicy, Slots
from s3dcp._keys import S3Uri
from s3dcp._store import (
    Checksum,
    Condition,
    Moved,
    ObjectInfo,
    Part,
    PartList,
    Receipt,
    Scatter,
    UploadInfo,
    Views,
)

Fault = Callable[[str, S3Uri], None]


async def no_sleep(delay_s: float) -> None:
    """Wait for nothing."""


def channel_of(store: MemoryStore, *, slots: int = 4, max_attempts: int = 4) -> Channel:
    """Return a channel whose retries do not wait."""
    return Channel(
        store=store,
        slots=Slots(slots),
        retry=RetryPolicy(max_attempts=max_attempts, jitter=lambda: 0.0, sleep=no_sleep),
        checksum="CRC64NVME",
    )


def _no_fault(_name: str, _uri: S3Uri) -> None:
    pass


class MemoryStore:
    """S3's requests over a dict.

    Attributes:
        objects: Bytes and ETag by URI.
        uploads: Parts by upload id.
        requests: The name and the key of every request.
        before: Called before a request takes effect; what it raises, the request raises.
        after: The same, once it has taken effect: a lost response.
    """

    def __init__(self, *, honours_conditions: bool = True) -> None:
        self.objects: dict[S3Uri, tuple[bytes, str]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.honours_conditions = honours_conditions
        self.conditional_writes: bool | None = True
        self.before: Fault = _no_fault
        self.after: Fault = _no_fault
        self._numbers = itertools.count(1)

    def write(self, uri: S3Uri, body: bytes) -> str:
        """Put an object there, as another writer would."""
        etag = f'"{next(self._numbers)}"'
        self.objects[uri] = body, etag
        return etag

    def _begin(self, name: str, uri: S3Uri) -> None:
        self.requests.append((name, uri.key))
        self.before(name, uri)

    def _found(self, uri: S3Uri) -> tuple[bytes, str]:
        if uri not in self.objects:
            raise ObjectNotFoundError(f"no {uri}", status=404)
        return self.objects[uri]

    async def get(self, uri: S3Uri) -> tuple[bytes | bytearray, ObjectInfo]:
        self._begin("get", uri)
        body, etag = self._found(uri)
        return body, ObjectInfo(key=uri.key, size_bytes=len(body), etag=etag)

    async def get_range(
        self, uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> ObjectInfo:
        self._begin("get_range", uri)
        body, etag = self._found(uri)
        if if_match not in (None, etag):
            raise PreconditionFailedError("changed", status=412)
        into.write(body[start : start + into.remaining])
        return ObjectInfo(key=uri.key, size_bytes=len(body), etag=etag)

    async def head(self, uri: S3Uri, *, with_crc: bool = False) -> ObjectInfo:
        self._begin("head", uri)
        body, etag = self._found(uri)
        return ObjectInfo(key=uri.key, size_bytes=len(body), etag=etag)

    async def list(self, uri: S3Uri, *, delimiter: str = "") -> AsyncIterator[ObjectInfo]:
        self._begin("list", uri)
        for found, (body, etag) in sorted(self.objects.items(), key=lambda pair: pair[0].key):
            if found.key.startswith(uri.key):
                yield ObjectInfo(key=found.key, size_bytes=len(body), etag=etag)

    async def put(
        self,
        uri: S3Uri,
        body: Views,
        *,
        checksum: Checksum | None = None,
        condition: Condition | None = None,
        moved: Moved | None = None,
    ) -> Receipt:
        self._begin("put", uri)
        if condition is not None and self.honours_conditions:
            now = self.objects.get(uri)
            holds = (
                now is None if condition.absent else now is not None and now[1] == condition.etag
            )
            if not holds:
                raise PreconditionFailedError("412", status=412)
        etag = self.write(uri, b"".join(body))
        self.after("put", uri)
        return Receipt(etag=etag, checksum_echoed=checksum is not None)

    async def create_upload(self, uri: S3Uri, *, checksum: ChecksumName | None) -> str:
        self._begin("create_upload", uri)
        upload_id = f"upload-{next(self._numbers)}"
        self.uploads[upload_id] = {}
        return upload_id

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
        self._begin("upload_part", uri)
        if upload_id not in self.uploads:
            raise ObjectNotFoundError("no such upload", code="NoSuchUpload", status=404)
        self.uploads[upload_id][number] = b"".join(body)
        self.after("upload_part", uri)
        return Receipt(etag=f'"part-{number}"', checksum_echoed=checksum is not None)

    async def complete_upload(
        self, uri: S3Uri, upload_id: str, parts: Sequence[Part], *, checksum: Checksum | None
    ) -> Receipt:
        self._begin("complete_upload", uri)
        if upload_id not in self.uploads:
            raise ObjectNotFoundError("no such upload", code="NoSuchUpload", status=404)
        sent = self.uploads.pop(upload_id)
        etag = self.write(uri, b"".join(sent[part.number] for part in parts))
        self.after("complete_upload", uri)
        return Receipt(etag=etag, checksum_echoed=checksum is not None)

    async def abort_upload(self, uri: S3Uri, upload_id: str) -> None:
        self._begin("abort_upload", uri)
        self.uploads.pop(upload_id, None)

    async def list_uploads(self, uri: S3Uri) -> AsyncIterator[UploadInfo]:
        self._begin("list_uploads", uri)
        for upload_id in sorted(self.uploads):
            yield UploadInfo(key=uri.key, upload_id=upload_id, initiated=None)

    async def list_parts(self, uri: S3Uri, upload_id: str) -> PartList:
        self._begin("list_parts", uri)
        parts = [
            Part(number=number, size_bytes=len(body), etag=f'"part-{number}"', checksum=None)
            for number, body in sorted(self.uploads[upload_id].items())
        ]
        return PartList(algorithm=None, composite=False, parts=tuple(parts))

    async def delete(self, uri: S3Uri, *, if_match: str | None = None) -> None:
        self._begin("delete", uri)
        if if_match is not None and self._found(uri)[1] != if_match:
            raise PreconditionFailedError("412", status=412)
        self.objects.pop(uri, None)

    async def copy(self, source: S3Uri, target: S3Uri, *, if_match: str | None) -> None:
        self._begin("copy", source)
        body, etag = self._found(source)
        if if_match not in (None, etag):
            raise PreconditionFailedError("412", status=412)
        self.write(target, body)

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
        raise NotImplementedError("no copy here is that large")
