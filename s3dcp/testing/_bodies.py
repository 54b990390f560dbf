"""Request bodies: how they are framed, and the memory they are read into."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol
from xml.etree import ElementTree as ET

from s3dcp.testing._answers import Blob
from s3dcp.testing._http import MalformedRequestError
from s3dcp.testing._requests import S3Error
from s3dcp.testing._sums import RunningCrc, Sum, crc_to_verify

_HUGE_BYTES = 2 << 20
# Of a machine's memory, what may lie idle; and of memory that is used again, what may be too much:
# small bodies must not take what larger ones will need.
_MAX_IDLE_SHARE = 1 / 8
_MAX_SPARE_SHARE = 1 / 4
# Small enough to stay in a core's cache between the kernel's copy and the checksum.
_PIECE_BYTES = 256 << 10


class Source(Protocol):
    """Where a body is read from."""

    async def read_line(self) -> bytes:
        """Return the next line, without its CRLF."""

    async def read_into(self, view: memoryview) -> None:
        """Fill `view`."""


@dataclass(frozen=True, slots=True)
class SignedChunk:
    """A chunk of an aws-chunked body: its size and what it says of its signature."""

    size_bytes: int
    signature: str


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body, taken out of its framing.

    Attributes:
        blob: Its bytes; zeros in their place where they were dropped as they came.
        crc: What was computed of those meanwhile.
        trailers: The headers after an aws-chunked body, by lower-case name.
        chunks: An aws-chunked body's chunks, the empty last one included.
    """

    blob: Blob
    crc: Sum | None = None
    trailers: Mapping[str, str] = field(default_factory=dict)
    chunks: tuple[SignedChunk, ...] = ()


class Memory:
    """Memory that the kernel can fill quickly.

    What is large is made of huge pages, as the first touch of each small one costs more than the
    bytes received into it; and is used again once no view into it is left.
    """

    def __init__(self) -> None:
        self._idle: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._max_idle_bytes = 0.0

    def take(self, size_bytes: int) -> memoryview:
        """Return memory of that size, with anything in it."""
        if size_bytes < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
            return memoryview(bytearray(size_bytes))
        whole = -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES
        memory = self._used_before(whole)
        if memory is None:
            installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self._max_idle_bytes = installed * _MAX_IDLE_SHARE
            memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        # All views, slices of slices too, hold on to this array, and nothing else does.
        lent = (ctypes.c_ubyte * size_bytes).from_buffer(memory)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return memoryview(lent).cast("B")

    def _used_before(self, size_bytes: int) -> mmap.mmap | None:
        for size in sorted(self._idle):
            if size_bytes <= size <= size_bytes * (1 + _MAX_SPARE_SHARE):
                with suppress(IndexError):
                    return self._idle[size].pop()
        return None

    def _give_back(self, memory: mmap.mmap) -> None:
        # Called on whichever thread lets go of the last view.
        idle_bytes = sum(size * len(idle) for size, idle in list(self._idle.items()))
        if idle_bytes + len(memory) <= self._max_idle_bytes:
            self._idle[len(memory)].append(memory)


_memory = Memory()


class Chunks:
    """What is inside `Transfer-Encoding: chunked`; a source itself, as aws-chunks may be in it."""

    def __init__(self, outer: Source) -> None:
        self._outer = outer
        self._left = 0
        self._begun = self._ended = False

    async def read_into(self, view: memoryview) -> None:
        """Fill `view` from as many chunks as it takes."""
        while len(view):
            if not self._left and not await self._next():
                raise MalformedRequestError(f"the chunked body ends {len(view)} bytes early")
            step = view[: self._left]
            await self._outer.read_into(step)
            self._left -= len(step)
            view = view[len(step) :]

    async def read_line(self) -> bytes:
        """Return a line that any number of chunks may share."""
        line, byte = bytearray(), bytearray(1)
        while not line.endswith(b"\r\n"):
            await self.read_into(memoryview(byte))
            line += byte
        return bytes(line[:-2])

    async def read_all(self) -> memoryview:
        """Return the whole body."""
        data = bytearray()
        while self._left or await self._next():
            chunk = memoryview(bytearray(self._left))
            await self.read_into(chunk)
            data += chunk
        return memoryview(data)

    async def finish(self) -> None:
        """Read the end, and nothing but the end."""
        if self._left or await self._next():
            raise MalformedRequestError("the chunked body goes on after its end")

    async def _next(self) -> bool:
        if self._ended:
            return False
        if self._begun and await self._outer.read_line():
            raise MalformedRequestError("a chunk is longer than it says")
        self._begun = True
        self._left = _chunk_size((await self._outer.read_line()).partition(b";")[0])
        if not self._left:
            self._ended = True
            while await self._outer.read_line():
                pass
        return not self._ended


class _Target(Protocol):
    """Where a body of a known size goes."""

    size_bytes: int

    async def take(self, source: Source, size_bytes: int) -> None:
        """Read the next bytes of the body."""

    def body(self) -> Body:
        """Return what was read."""


class _Held:
    """Memory as long as the body."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._whole = _memory.take(size_bytes)
        self._rest = self._whole

    async def take(self, source: Source, size_bytes: int) -> None:
        await source.read_into(self._rest[:size_bytes])
        self._rest = self._rest[size_bytes:]

    def body(self) -> Body:
        return Body(Blob.of(self._whole))


class _Dropped:
    """A piece of memory that is used over and over; only a CRC is made of the body."""

    def __init__(self, size_bytes: int, algorithm: str) -> None:
        self.size_bytes = size_bytes
        self._crc = RunningCrc(algorithm)
        self._piece = memoryview(bytearray(_PIECE_BYTES))

    async def take(self, source: Source, size_bytes: int) -> None:
        for start in range(0, size_bytes, _PIECE_BYTES):
            piece = self._piece[: size_bytes - start]
            await source.read_into(piece)
            self._crc.update(piece)

    def body(self) -> Body:
        return Body(Blob.zeros(self.size_bytes), self._crc.sum())


async def _read_aws_chunks(source: Source, target: _Target) -> Body:
    """Read an aws-chunked body that says it fills `target`, and its trailing headers."""
    chunks: list[SignedChunk] = []
    at = 0
    while True:
        size, _, extension = (await source.read_line()).partition(b";")
        size_bytes = _chunk_size(size)
        signature = extension.partition(b"chunk-signature=")[2].decode("latin-1")
        chunks.append(SignedChunk(size_bytes, signature))
        if not size_bytes:
            break
        if at + size_bytes > target.size_bytes:
            raise MalformedRequestError("the chunks hold more than x-amz-decoded-content-length")
        await target.take(source, size_bytes)
        at += size_bytes
        if await source.read_line():
            raise MalformedRequestError("an aws-chunk is longer than it says")
    if at != target.size_bytes:
        raise MalformedRequestError("the chunks hold less than x-amz-decoded-content-length")
    trailers: dict[str, str] = {}
    while line := await source.read_line():
        name, _, value = line.decode("latin-1").partition(":")
        trailers[name.strip().lower()] = value.strip()
    return replace(target.body(), trailers=trailers, chunks=tuple(chunks))


def _chunk_size(text: bytes) -> int:
    digits = text.strip()
    if not digits or len(digits) > 12 or digits.strip(b"0123456789abcdefABCDEF"):
        raise MalformedRequestError(f"{digits[:20]!r} is no chunk size")
    return int(digits, 16)


def parse_xml(body: Body) -> ET.Element:
    """Return the document that a body is.

    Raises:
        S3Error: It is none.
    """
    try:
        # Those who send it are under test, and expat bounds what entities expand to.
        return ET.fromstring(bytes(body.blob))  # noqa: S314
    except ET.ParseError as error:
        raise S3Error(
            "MalformedXML", f"The XML you provided was not well-formed: {error}"
        ) from None


class _Sized:
    """The bytes that Content-Length counts, of a body that has a framing of its own inside."""

    def __init__(self, outer: Source, size_bytes: int) -> None:
        self._outer = outer
        self._left = size_bytes

    async def read_into(self, view: memoryview) -> None:
        self._spend(len(view))
        await self._outer.read_into(view)

    async def read_line(self) -> bytes:
        line = await self._outer.read_line()
        self._spend(len(line) + 2)
        return line

    async def finish(self) -> None:
        if self._left:
            raise MalformedRequestError(f"the body ends {self._left} bytes before Content-Length")

    def _spend(self, nbytes: int) -> None:
        self._left -= nbytes
        if self._left < 0:
            raise MalformedRequestError("the body goes on after Content-Length")


async def read_body(
    source: Source, headers: Mapping[str, str], drop: Callable[[int], bool]
) -> Body:
    """Read a request's body, however it is framed.

    Args:
        source: Where it comes from.
        headers: The request's.
        drop: Told its size, whether it need not be held.

    Raises:
        MalformedRequestError: Its framing is not what the headers say.
    """

    def target(size_bytes: int) -> _Target:
        algorithm = crc_to_verify(headers)
        if algorithm is None or not drop(size_bytes):
            return _Held(size_bytes)
        return _Dropped(size_bytes, algorithm)

    size = _declared_size(headers, "content-length")
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    if not _is_aws_chunked(headers):
        if chunked:
            return Body(Blob.of(await Chunks(source).read_all()))
        whole = target(size)
        await whole.take(source, size)
        return whole.body()
    inner = Chunks(source) if chunked else _Sized(source, size)
    decoded = _declared_size(headers, "x-amz-decoded-content-length")
    body = await _read_aws_chunks(inner, target(decoded))
    await inner.finish()
    return body


def _is_aws_chunked(headers: Mapping[str, str]) -> bool:
    return (
        headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
        or "aws-chunked" in headers.get("content-encoding", "").lower()
    )


def _declared_size(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "0")
    if not text.isdecimal():
        raise MalformedRequestError(f"{text[:20]!r} is no {name}")
    return int(text)
