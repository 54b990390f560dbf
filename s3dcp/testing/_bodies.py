"""Request bodies: how they are framed, and the memory they are read into."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from xml.etree import ElementTree

from s3dcp.testing._http import MalformedRequestError
from s3dcp.testing._requests import S3Error

_HUGE_BYTES = 2 << 20


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
        trailers: The headers after an aws-chunked body, by lower-case name.
        chunks: An aws-chunked body's chunks, the empty last one included.
    """

    view: memoryview
    trailers: Mapping[str, str] = field(default_factory=dict)
    chunks: tuple[SignedChunk, ...] = ()


def allocate(size_bytes: int) -> memoryview:
    """Return memory that the kernel can fill quickly.

    A `bytearray` is zeroed first, and a large one touches a new page every 4 KiB: over ten times
    what it costs to receive into huge pages.
    """
    if size_bytes < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size_bytes))
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


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


async def read_plain(source: Source, size_bytes: int, target: memoryview) -> Body:
    """Read a body of a declared length."""
    await source.read_into(target[:size_bytes])
    return Body(target[:size_bytes])


async def read_aws_chunks(source: Source, target: memoryview) -> Body:
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
        if at + size_bytes > len(target):
            raise MalformedRequestError("the chunks hold more than x-amz-decoded-content-length")
        await source.read_into(target[at : at + size_bytes])
        at += size_bytes
        if await source.read_line():
            raise MalformedRequestError("an aws-chunk is longer than it says")
    if at != len(target):
        raise MalformedRequestError("the chunks hold less than x-amz-decoded-content-length")
    trailers: dict[str, str] = {}
    while line := await source.read_line():
        name, _, value = line.decode("latin-1").partition(":")
        trailers[name.strip().lower()] = value.strip()
    return Body(target, trailers, tuple(chunks))


def _chunk_size(text: bytes) -> int:
    digits = text.strip()
    if not digits or len(digits) > 12 or digits.strip(b"0123456789abcdefABCDEF"):
        raise MalformedRequestError(f"{digits[:20]!r} is no chunk size")
    return int(digits, 16)


def parse_xml(body: Body) -> ElementTree.Element:
    """Return the document that a body is.

    Raises:
        S3Error: It is none.
    """
    try:
        # Those who send it are under test, and expat bounds what entities expand to.
        return ElementTree.fromstring(bytes(body.view))  # noqa: S314
    except ElementTree.ParseError as error:
        raise S3Error("MalformedXML", f"The XML you provided was not well-formed: {error}") from None
