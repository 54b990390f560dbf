"""The bytes of a copy: from a bucket to a disk, or within a store; `_sending` has the other way.

A few buffers of a part each are all the memory that it takes. Files are read and written by worker
threads, through buffers and not through a mapping: there, a page that has to be read from the disk
first would hold up the loop, and one that is gone for good, since somebody cuts the file short,
would end the process with a SIGBUS.

On a disk the parts of a file are written in order. So the length of one that was cut off says how
far it had come, and the copy goes on from there.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from s3dcp._checksums import combine, crcs_of, damaged
from s3dcp._config import MiB
from s3dcp._copies import Checks, Item, changed
from s3dcp._disk import fill, naming, own, partial_of
from s3dcp._downloads import Downloads
from s3dcp._errors import ObjectNotFoundError, PreconditionFailedError
from s3dcp._flow import wait_all
from s3dcp._keys import S3Uri
from s3dcp._places import Bucket, Folder, Place
from s3dcp._portal import offload
from s3dcp._ranges import cut, span_bytes
from s3dcp._store import ObjectInfo
from s3dcp._uploads import copy

T = TypeVar("T")

#: How much of a file is read at once where nothing is sent.
READ_BYTES = 8 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Cargo:
    """What is to be moved.

    Attributes:
        files: Those that are missing at the target.
        items: Whose CRCs are compared, by file.
        sums: The CRC64NVME of whole files, as their store has it, of those that are compared.
        vouched: Gets the files of which a store's checksum was compared with what was copied.
        resume: Whether files that are there in part are parts of these.
        advance: Told how many bytes more are at the target.
    """

    files: Sequence[ObjectInfo]
    items: Mapping[str, Sequence[Item]]
    sums: Mapping[str, int]
    vouched: set[str]
    resume: bool
    advance: Callable[[int], None]

    def checks(self, info: ObjectInfo) -> Checks:
        """Return what compares the CRCs of a file's items, and of all of it."""
        crc = self.sums.get(info.key)
        whole = Item(name=info.key, start=0, end=info.size_bytes, crc=crc)
        return Checks([*self.items.get(info.key, ()), whole])


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What may be used for it.

    Attributes:
        memory_bytes: For buffers. One is used in any case.
        part_bytes: The least size of a request.
        connections: How many requests there may be at once.
    """

    memory_bytes: int
    part_bytes: int
    connections: int

    @property
    def buffer_bytes(self) -> int:
        """The size with which every connection has a buffer."""
        return max(self.part_bytes, self.memory_bytes // self.connections)

    def buffers(self, size_bytes: int) -> int:
        """Return how many of a size there may be."""
        return max(1, min(self.memory_bytes // size_bytes, self.connections))


async def download(source: Bucket, target: Folder, cargo: Cargo, room: Room) -> int:
    """Copy from a bucket to a disk; return how many bytes were there already.

    Raises:
        CheckpointChangedError: an object was replaced or deleted meanwhile.
        IntegrityError: an item is not what was saved.
        OSError: the disk refused a file.
        S3Exception: as the store.
    """
    total_bytes = sum(info.size_bytes for info in cargo.files)
    size = min(span_bytes(total_bytes, room.part_bytes, room.connections), room.buffer_bytes)
    downloads = Downloads(source.channel)
    opened: set[_Incoming] = set()
    resumed_bytes = 0

    async def work(queue: Queue[_Part]) -> None:
        buffer = memoryview(bytearray(size))
        while part := await queue.take():
            view = buffer[: part.end - part.start]
            segments = part.file.checks.segments(part.start, part.end)
            checked = [view[a - part.start : b - part.start] for a, b in segments]
            try:
                crcs = await downloads.fetch(part.file.uri, part.start, [view], checked)
            except ObjectNotFoundError as exc:
                raise changed(part.file.uri) from exc
            part.file.checks.add(segments, crcs)
            await part.previous.wait()
            await to_its_end(part.file.write, view)
            part.written.set()
            cargo.advance(view.nbytes)
            if part.end == part.file.size_bytes:
                await to_its_end(part.file.finish)
                opened.discard(part.file)

    async def parts() -> AsyncGenerator[_Part]:
        nonlocal resumed_bytes
        for info in cargo.files:
            uri = source.uri(info.key)
            downloads.pin(uri, info.etag)
            file = _Incoming(target, info, uri, cargo.checks(info))
            opened.add(file)
            start = await to_its_end(file.begin, cargo.resume)
            resumed_bytes += start
            cargo.advance(start)
            if start == info.size_bytes:
                await to_its_end(file.finish)
                opened.discard(file)
            written = asyncio.Event()
            written.set()
            for a, b in cut(start, info.size_bytes, size):
                previous, written = written, asyncio.Event()
                yield _Part(file, a, b, previous, written)

    try:
        async with aclosing(parts()) as generator:
            queue = Queue(generator)
            await wait_all([partial(work, queue)] * room.buffers(size))
    finally:
        for file in opened:
            file.close()
    cargo.vouched.update(info.key for info in cargo.files if info.key in cargo.sums)
    return resumed_bytes


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes [start, end) of a file that is written in order."""

    file: _Incoming
    start: int
    end: int
    previous: asyncio.Event
    written: asyncio.Event


class Queue(Generic[T]):
    """Parts, for many to take from."""

    def __init__(self, parts: AsyncGenerator[T]) -> None:
        self._parts = parts
        self._taking = asyncio.Lock()

    async def take(self) -> T | None:
        """Return the next one; None at the end."""
        async with self._taking:
            return await anext(self._parts, None)


class _Incoming:
    """A file that is being written. But for its `checks`, used by one worker thread at a time."""

    def __init__(self, target: Folder, info: ObjectInfo, uri: S3Uri, checks: Checks) -> None:
        self.uri = uri
        self.size_bytes = info.size_bytes
        self.checks = checks
        self._target = target
        self._name = info.key
        self._partial = partial_of(target.file(info.key))
        self._opened = ExitStack()

    def begin(self, resume: bool) -> int:
        """Open it; return how many bytes are there: none, unless it goes on where it ended."""
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened.enter_context(io.FileIO(str(self._partial), "a+", opener=own))
        size_bytes = os.fstat(self._file.fileno()).st_size
        if resume and size_bytes <= self.size_bytes and self._is_sound(size_bytes):
            return size_bytes
        self._file.truncate(0)
        self.checks.forget()
        return 0

    def _is_sound(self, size_bytes: int) -> bool:
        buffer = memoryview(bytearray(min(READ_BYTES, size_bytes)))
        for start, end in cut(0, size_bytes, READ_BYTES):
            segments = self.checks.segments(start, end)
            if segments:
                fill(self._file, start, buffer[: end - start])
                views = [buffer[a - start : b - start] for a, b in segments]
                self.checks.add(segments, crcs_of(views))
        return self.checks.wrong(size_bytes) is None

    def write(self, view: memoryview) -> None:
        """Append bytes."""
        with naming(self._partial):
            while view.nbytes:
                view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Give it its name, if it is what was saved; else remove it."""
        wrong = self.checks.wrong(self.size_bytes)
        if wrong is not None:
            self.close()
            self._partial.unlink()
            raise damaged(wrong.name, self.uri, wrong.start, wrong.end)
        self._target.publish(self._file, self._name)

    def close(self) -> None:
        """Leave it as it is, if it was opened."""
        self._opened.close()


async def to_its_end(function: Callable[..., T], *args: object) -> T:
    """Run a function on a worker thread. If this is cancelled, its file is closed only then."""
    running = asyncio.ensure_future(offload(function, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        running.exception()  # which nobody else asks for
        raise


async def copy_within(source: Bucket, target: Bucket, cargo: Cargo) -> None:
    """Copy inside the store, and compare what it says of both objects: no bytes pass by.

    Raises:
        CheckpointChangedError: an object was replaced or deleted meanwhile.
        IntegrityError: the store's copy is not what it was made of.
        S3Exception: as the store.
    """

    async def one(info: ObjectInfo) -> None:
        uri = source.uri(info.key)
        try:
            await copy(target.channel, uri, target.uri(info.key), if_match=info.etag)
        except (ObjectNotFoundError, PreconditionFailedError) as exc:
            raise changed(uri) from exc
        if info.key in cargo.sums:
            crc = (await target.head(info.key)).crc
            if crc is not None:
                if crc != cargo.sums[info.key]:
                    await target.remove([info.key])  # another run would take it for whole
                    raise damaged(info.key, target.uri(info.key), 0, info.size_bytes)
                cargo.vouched.add(info.key)
        cargo.advance(info.size_bytes)

    await wait_all([partial(one, info) for info in cargo.files])


async def same_files(
    source: Place,
    target: Place,
    pairs: Iterable[tuple[ObjectInfo, ObjectInfo]],
    room: Room,
    progress: Callable[[int, int], None],
) -> set[str]:
    """Return the names of the files that are the same at two places, by their size and CRC64NVME.

    Args:
        source: The one place.
        target: The other one.
        pairs: What is there and here under the same names.
        room: What may be used.
        progress: Told how many bytes more were read, and of how many in all.

    Raises:
        CheckpointChangedError: one was replaced or deleted meanwhile.
        OSError, S3Exception: as the places.
    """
    alike = [pair for pair in pairs if pair[0].size_bytes == pair[1].size_bytes]
    files = [each for pair in alike for each in zip((source, target), pair, strict=True)]
    known = await wait_all([partial(place.crc, info) for place, info in files])
    unknown = [number for number, crc in enumerate(known) if crc is None]
    total = sum(files[number][1].size_bytes for number in unknown)
    sums: list[list[tuple[int, int, int]]] = [  # offset, CRC, size
        [] if crc is None else [(0, crc, info.size_bytes)]
        for (_, info), crc in zip(files, known, strict=True)
    ]

    async def work(queue: Queue[tuple[int, int, int]]) -> None:
        buffer = memoryview(bytearray(READ_BYTES))
        while piece := await queue.take():
            number, start, end = piece
            place, info = files[number]
            view = buffer[: end - start]
            await place.fetch(info, start, view)
            [crc] = await offload(crcs_of, [view])
            sums[number].append((start, crc, view.nbytes))
            progress(view.nbytes, total)

    async def pieces() -> AsyncGenerator[tuple[int, int, int]]:
        for number in unknown:
            for start, end in cut(0, files[number][1].size_bytes, READ_BYTES):
                yield number, start, end

    if total:
        async with aclosing(pieces()) as generator:
            queue = Queue(generator)
            await wait_all([partial(work, queue)] * room.buffers(READ_BYTES))
    crcs = [combine((crc, size) for _, crc, size in sorted(found)) for found in sums]
    both = zip(alike, crcs[::2], crcs[1::2], strict=True)
    return {info.key for (info, _), mine, theirs in both if mine == theirs}
