"""Answers: the bytes of stored objects, XML, and the head that goes before them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from http import HTTPStatus
from urllib.parse import quote
from xml.sax.saxutils import escape

from s3dcp.testing._requests import Request, S3Error

_XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
_NO_BODY = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}
# Characters that XML 1.0 has no way to say; S3 sends XML 1.0 with them all the same.
_CONTROLS = {chr(code): f"&#x{code:x};" for code in (*range(9), 11, 12, 13, *range(14, 32))}
# Never written to, so no memory is behind it.
_ZEROS = memoryview(mmap.mmap(-1, 16 << 20))


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes in memory, in pieces that are never joined or changed."""

    views: tuple[memoryview, ...] = ()
    size: int = 0

    @classmethod
    def of(cls, *pieces: bytes | memoryview) -> Blob:
        """Return `pieces` as one, without copying them."""
        views = tuple(memoryview(piece) for piece in pieces if len(piece))
        return cls(views, sum(map(len, views)))

    @classmethod
    def zeros(cls, size: int) -> Blob:
        """Return what is read back of bytes that were dropped."""
        whole, rest = divmod(size, len(_ZEROS))
        return cls.of(*[_ZEROS] * whole, _ZEROS[:rest])

    def __bytes__(self) -> bytes:
        return b"".join(self.views)

    def __add__(self, other: Blob) -> Blob:
        return Blob(self.views + other.views, self.size + other.size)

    def slice(self, start: int, stop: int) -> Blob:
        """Return the bytes from `start` to `stop`; what lies beyond the end is left out."""
        found, at = [], 0
        for view in self.views:
            first, last = max(start - at, 0), min(stop - at, len(view))
            if first < last:
                found.append(view[first:last])
            at += len(view)
        return Blob.of(*found)

    def flipped(self, offset: int, mask: int = 1) -> Blob:
        """Return a copy in which the byte at `offset` is another."""
        wrong = bytes(byte ^ mask for byte in bytes(self.slice(offset, offset + 1)))
        return self.slice(0, offset) + Blob.of(wrong) + self.slice(offset + 1, self.size)


@dataclass(slots=True)
class Response:
    """An answer that is yet to be sent.

    Attributes:
        length: What Content-Length says; the body's size by default.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Blob = field(default_factory=Blob)
    length: int | None = None

    def head(self) -> bytes:
        """Return the status line and headers."""
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.status not in _NO_BODY:
            length = self.body.size if self.length is None else self.length
            lines.append(f"Content-Length: {length}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def tag(name: str, *content: str | int) -> str:
    """Return an element around text that is escaped here."""
    return raw_tag(name, *(escape(str(each), _CONTROLS) for each in content))


def raw_tag(name: str, *content: str) -> str:
    """Return an element around other elements."""
    return f"<{name}>{''.join(content)}</{name}>"


def xml(root: str, *content: str, status: int = 200, xmlns: str | None = _XMLNS) -> Response:
    """Return an answer that is an XML document."""
    opening = f'<{root} xmlns="{xmlns}">' if xmlns else f"<{root}>"
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{opening}{"".join(content)}</{root}>'
    body = Blob.of(text.encode())
    return Response(status, {"Content-Type": "application/xml"}, body)


def refusal(error: S3Error, request: Request) -> Response:
    """Return an error's answer: XML where the request may have a body."""
    if error.status in _NO_BODY or request.method == "HEAD":
        return Response(error.status, dict(error.headers))
    answer = xml(
        "Error",
        tag("Code", error.code),
        tag("Message", error.message),
        *(tag(name, value) for name, value in error.fields.items()),
        tag("Resource", request.path),
        status=error.status,
        xmlns=None,
    )
    answer.headers.update(error.headers)
    return answer


def http_time(moment: datetime) -> str:
    """Return a time as headers carry it."""
    return format_datetime(moment, usegmt=True)


def xml_time(moment: datetime) -> str:
    """Return a time as S3's XML carries it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def encoded_key(key: str, encoding: str | None) -> str:
    """Return a key as a listing carries it."""
    return quote(key, safe="/") if encoding == "url" else key
