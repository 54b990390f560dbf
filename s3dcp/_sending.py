"""The bytes of a copy from a disk to a bucket, and how one that was cut off goes on.

An object that needs several parts is a multipart upload, which outlives the process that began it.
The next run of the same copy (its claim at the target says that it is the same) finds it, compares
each of its parts with the file, and sends the others. Whose upload it is cannot be asked. So:

- One is gone on with only if each of its parts is shown by its checksum, or else by an MD5 in its
  ETag, to be the file's own bytes. Of several, the one with the most bytes.
- The others are left alone: another program, or another run that is alive, may be writing to them.
  `abort_uploads` removes them by their age.
- Should two runs go on with the same one, both send the same bytes, and a completion names the
  parts that it means. One completes it; the other is told that it is gone, and ends.
- A run that fails leaves its uploads, as it leaves whole objects, but for those without a part, and
  those whose parts are of no use since the file is damaged or was changed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from s3dcp._checksums import combine, crcs_of, is_known
from s3dcp._copies import Checks, part_bytes_of
from s3dcp._errors import (
    CheckpointChangedError,
    CommitConflictError,
    IntegrityError,
    ObjectNotFoundError,
    S3ServiceError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._keys import S3Uri
from s3dcp._movers import READ_BYTES, Cargo, Queue, Room
from s3dcp._places import Bucket, Folder
from s3dcp._portal import offload
from s3dcp._ranges import cut, upload_part_bytes
from s3dcp._s3client import list_uploads
from s3dcp._store import ObjectInfo, Part, PartList, UploadInfo
from s3dcp._uploads import Upload, checksums_of

_log = logging.getLogger("s3dcp.copies")

_BAD_REQUEST = 400


async def upload(source: Folder, target: Bucket, cargo: Cargo, room: Room) -> int:
    """Copy from a disk to a bucket; return how many bytes were there already.

    Raises:
        CheckpointChangedError: a file was changed or removed meanwhile.
        CommitConflictError: somebody else ended an upload.
        IntegrityError: an item is not what was saved.
        OSError: a file cannot be read.
        S3Exception: as the store.
    """
    files = [_Outgoing(source, target, info, cargo.checks(info), room) for info in cargo.files]
    if not files:
        return 0
    size = max(file.part_bytes for file in files)
    resumed_bytes = 0

    async def work(queue: Queue[_Piece]) -> None:
        buffer = memoryview(bytearray(size))
        while piece := await queue.take():
            view = buffer[: piece.end - piece.start]
            await source.fetch(piece.file.info, piece.start, view)
            await piece.file.send(piece.number, piece.start, view)
            cargo.advance(view.nbytes)

    async def pieces() -> AsyncGenerator[_Piece]:
        nonlocal resumed_bytes
        left = _Left(target.channel, cargo.resume)
        for file in files:
            if file.count > 1:
                held_bytes = await file.go_on(await left.of(file.upload.uri), size)
                resumed_bytes += held_bytes
                cargo.advance(held_bytes)
            for piece in file.missing():
                yield piece

    try:
        async with aclosing(pieces()) as generator:
            queue = Queue(generator)
            await wait_all([partial(work, queue)] * room.buffers(size))
    except BaseException as exc:
        await _leave([file.upload for file in files if file.is_open], target, exc)
        raise
    cargo.vouched.update(file.info.key for file in files if file.upload.vouched)
    return resumed_bytes


async def _leave(uploads: Sequence[Upload], target: Bucket, cause: BaseException) -> None:
    """Abort what nobody can go on with."""
    useless = isinstance(cause, IntegrityError | CheckpointChangedError)
    kept = [] if useless else [upload for upload in uploads if upload.has_parts]
    await wait_all([upload.abort for upload in uploads if upload not in kept])
    if kept:
        _log.warning(
            "unfinished uploads below %s are kept (%d): the same copy goes on with them, and "
            "`s3dcp abort-uploads` removes them",
            target,
            len(kept),
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [start, end) of a file: a part of its upload."""

    file: _Outgoing
    number: int
    start: int
    end: int


class _Outgoing:
    """A file on its way up.

    Attributes:
        info: Which it is.
        part_bytes: The size of its parts.
        is_open: Whether there may be a multipart upload of it.
    """

    def __init__(
        self, source: Folder, target: Bucket, info: ObjectInfo, checks: Checks, room: Room
    ) -> None:
        self.info = info
        self.upload = Upload(target.channel, target.uri(info.key))
        self.part_bytes = min(
            upload_part_bytes(
                info.size_bytes, room.part_bytes, room.connections, room.buffer_bytes
            ),
            max(info.size_bytes, 1),
        )
        self.is_open = False
        self._channel = target.channel
        self._source = source
        self._checks = checks
        self._held: frozenset[int] = frozenset()
        self._sent = 0

    @property
    def count(self) -> int:
        """How many parts it has."""
        return max(1, -(-self.info.size_bytes // self.part_bytes))

    def missing(self) -> Iterator[_Piece]:
        """Return the parts that are to be sent."""
        ranges = [*cut(0, self.info.size_bytes, self.part_bytes)] or [(0, 0)]
        for number, (start, end) in enumerate(ranges, 1):
            if number not in self._held:
                yield _Piece(self, number, start, end)

    async def go_on(self, unfinished: Iterable[tuple[str, PartList]], most_bytes: int) -> int:
        """Go on with the first upload that is one of this file; return how many bytes it has.

        Args:
            unfinished: The ids of uploads, and what they hold.
            most_bytes: What its parts must not be larger than.
        """
        for upload_id, found in unfinished:
            algorithm = found.algorithm
            part_bytes = part_bytes_of(found, self.info.size_bytes, self.part_bytes, most_bytes)
            if part_bytes is None or not (algorithm is None or is_known(algorithm)):
                continue
            if await self._holds(found.parts, part_bytes):
                self.part_bytes = part_bytes
                self._held = frozenset(part.number for part in found.parts)
                self.is_open = True
                self.upload.go_on(upload_id, found.parts, algorithm)
                await self._complete()
                return found.size_bytes
            self._checks.forget()
        return 0

    async def _holds(self, parts: Iterable[Part], part_bytes: int) -> bool:
        """Return whether these parts are this file's own."""
        for part in parts:  # one at a time, so that an interrupt does not wait for all
            if not await offload(self._is_own, part, (part.number - 1) * part_bytes):
                return False
        return True

    def _is_own(self, part: Part, start: int) -> bool:
        algorithm = part.checksum.algorithm if part.checksum else None
        buffer = memoryview(bytearray(min(READ_BYTES, part.size_bytes)))
        md5 = hashlib.md5(usedforsecurity=False)
        pieces = []
        for a, b in cut(start, start + part.size_bytes, READ_BYTES):
            view = buffer[: b - a]
            self._source.fill(self.info, a, view)
            views, segments = self._cut(a, view)
            crcs, checksum = checksums_of(views, algorithm)
            self._checks.add(segments, crcs if segments else ())
            if part.checksum is None:
                md5.update(view)
            elif checksum is not None:
                pieces.append((checksum.value, view.nbytes))
        if part.checksum is None:
            return part.etag == f'"{md5.hexdigest()}"'
        return combine(pieces, part.checksum.algorithm) == part.checksum.value

    def _cut(self, start: int, view: memoryview) -> tuple[list[memoryview], list[tuple[int, int]]]:
        segments = self._checks.segments(start, start + view.nbytes)
        return [view[a - start : b - start] for a, b in segments] or [view], segments

    async def send(self, number: int, start: int, view: memoryview) -> None:
        """Send a part; with the last one that is left, publish the object."""
        views, segments = self._cut(start, view)
        if self.count == 1:
            self._checks.add(segments, await offload(crcs_of, views) if segments else ())
            self._verify()  # before it is there: it would be taken for whole by another run
            await self.upload.put(views)
            return
        self.is_open = True
        try:
            crcs = await self.upload.send(number, views)
        except ObjectNotFoundError as exc:
            raise self._gone() from exc
        self._checks.add(segments, crcs if segments else ())
        self._sent += 1
        await self._complete()

    async def _complete(self) -> None:
        """Publish the object if all parts are there."""
        if len(self._held) + self._sent < self.count:
            return
        self._verify()
        try:
            await self.upload.complete(self.count)
        except ObjectNotFoundError as exc:
            raise self._gone() from exc
        except S3ServiceError as exc:
            if exc.status == _BAD_REQUEST:
                await self.upload.abort()  # its parts are of no use, to another run neither
                self.is_open = False
            raise
        self.is_open = False

    def _gone(self) -> CommitConflictError:
        return CommitConflictError(
            f"Somebody else has ended the upload of {self.upload.uri}: another process that copies "
            "to the same place, or a rule for unfinished uploads. Copy again, one at a time"
        )

    def _verify(self) -> None:
        wrong = self._checks.wrong(self.info.size_bytes)
        if wrong is not None:
            raise IntegrityError(
                f"{wrong.name}: bytes [{wrong.start}, {wrong.end}) of "
                f"{self._source.file(self.info.key)} differ from those that were saved "
                "(CRC64NVME): copy an older checkpoint"
            )


class _Left:
    """The uploads that earlier runs have left.

    Args:
        channel: The client's.
        looks: Whether there may be any.
    """

    def __init__(self, channel: Channel, looks: bool) -> None:
        self._channel = channel
        self._looks = looks

    async def of(self, uri: S3Uri) -> list[tuple[str, PartList]]:
        """Return those of an object, that with the most bytes first, then the newest.

        None from then on if the store does not tell of them, which needs permissions of its own.
        """
        if not self._looks:
            return []
        try:
            uploads = await list_uploads(self._channel, uri)
            found = [
                (each, parts)
                for each in uploads
                if each.key == uri.key and (parts := await self._parts(uri, each))
            ]
        except S3ServiceError as exc:
            _log.warning("objects that were on their way up start over: %s", exc)
            self._looks = False
            return []
        found.sort(key=lambda pair: (pair[1].size_bytes, str(pair[0].initiated)), reverse=True)
        return [(each.upload_id, parts) for each, parts in found]

    async def _parts(self, uri: S3Uri, info: UploadInfo) -> PartList | None:
        send = partial(self._channel.store.list_parts, uri, info.upload_id)
        try:
            return await self._channel.request("ListParts", uri, send)
        except ObjectNotFoundError:  # it has ended meanwhile
            return None
