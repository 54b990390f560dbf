"""Faults: each is the script of one exchange, told in the steps that an `Exchange` offers.

The normal course is `Fault.play`: receive the request, perform it, send the answer. The others
leave steps out, stop in the middle of one, or change what passes between them. A step that was
taken already is not taken again, so one fault may hand over to another.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from s3dcp.testing._requests import S3Error

if TYPE_CHECKING:
    from s3dcp.testing._bodies import Source
    from s3dcp.testing._exchange import Exchange
    from s3dcp.testing._records import Record

#: How far a request gets: its head was read, its body was read too, or it took effect.
Moment = Literal["head", "body", "effect"]


@dataclass(frozen=True)
class Fault:
    """The normal course: no fault at all. Subclasses script others."""

    #: Whether what the client does wrong meanwhile is its own fault.
    harmless: ClassVar[bool] = False

    async def play(self, exchange: Exchange) -> None:
        """Serve one request."""
        await exchange.receive()
        exchange.perform()
        await exchange.send()


async def _reach(exchange: Exchange, moment: Moment) -> None:
    if moment != "head":
        await exchange.receive()
    if moment == "effect":
        exchange.perform()


@dataclass(frozen=True)
class Call(Fault):
    """Calls functions, on the server's thread: nothing else is served until they return.

    Each may return a fault to go on with. A client that `before` kills may have sent all of its
    request already: return `Drop(at="head")` to have it never arrive. One that raises fails the
    request, and the server's `check`.

    Args:
        before: Called with the record once the request's head is there.
        after: Called once the request took effect, before it is answered.
    """

    before: Callable[[Record], Fault | None] | None = None
    after: Callable[[Record], Fault | None] | None = None
    harmless: ClassVar[bool] = True

    async def play(self, exchange: Exchange) -> None:
        if self.before and (fault := self.before(exchange.record)):
            await fault.play(exchange)
            return
        await exchange.receive()
        exchange.perform()
        fault = self.after(exchange.record) if self.after else None
        await (fault or Fault()).play(exchange)


@dataclass(frozen=True)
class Refuse(Fault):
    """Answers with an error.

    Args:
        code: S3's name for the error: "SlowDown".
        status: Of the HTTP answer; the code's own by default. With 200 the error comes in the body
            of a success, as S3 sends it when a copy or a completion fails late.
        at: "head": the body is not read, and the connection closed if there is one.
            "effect": the request takes effect all the same.
        retry_after_s: For the Retry-After header.
        region: Where the bucket is, for redirects.
    """

    code: str
    status: int | None = None
    at: Moment = "body"
    message: str = "scripted"
    retry_after_s: int | None = None
    region: str | None = None

    async def play(self, exchange: Exchange) -> None:
        await _reach(exchange, self.at)
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.region is not None:
            headers["x-amz-bucket-region"] = self.region
        error = S3Error(self.code, self.message, status=self.status, headers=headers)
        if self.region is not None:
            bucket = exchange.request.bucket
            host = f"{bucket}.s3.{self.region}.amazonaws.com"
            error.fields |= {"Endpoint": host, "Bucket": bucket, "Region": self.region}
        exchange.refuse(error)
        await exchange.send()


@dataclass(frozen=True)
class Drop(Fault):
    """Closes the connection without an answer; with `at="effect"` a response is lost.

    For the operation "Connect", before anything was read.

    Args:
        at: How far the request gets first.
        reset: By RST; by FIN otherwise.
    """

    at: Moment = "body"
    reset: bool = True

    async def play(self, exchange: Exchange) -> None:
        await _reach(exchange, self.at)
        exchange.end(reset=self.reset)


@dataclass(frozen=True)
class Cut(Fault):
    """Sends part of the answer, and ends the connection.

    Args:
        body_bytes: How much of the body is sent.
        head_bytes: How much of the head is sent instead, and then none of the body.
        reset: By RST, once the client has had time to read; by FIN otherwise.
    """

    body_bytes: int = 0
    head_bytes: int | None = None
    reset: bool = False

    async def play(self, exchange: Exchange) -> None:
        await _reach(exchange, "effect")
        await exchange.send_head(self.head_bytes)
        if self.head_bytes is None:
            await exchange.send_body(stop=self.body_bytes)
        if self.reset:
            await exchange.flush()
        exchange.end(reset=self.reset)


@dataclass(frozen=True)
class Extend(Fault):
    """Sends more body than the head says."""

    extra_bytes: int = 1

    async def play(self, exchange: Exchange) -> None:
        await super().play(exchange)
        await exchange.send_extra(bytes(self.extra_bytes))


@dataclass(frozen=True)
class Stall(Fault):
    """Sends part of the answer, and the rest once the rule is released.

    Args:
        body_bytes: How much of the body comes first.
        head: Whether the head comes first at all.
    """

    body_bytes: int = 0
    head: bool = True

    async def play(self, exchange: Exchange) -> None:
        await _reach(exchange, "effect")
        if self.head:
            await exchange.send_head()
            await exchange.send_body(stop=self.body_bytes)
        await exchange.stall()
        if not self.head:
            await exchange.send_head()
        await exchange.send_body(start=self.body_bytes if self.head else 0)


@dataclass(frozen=True)
class Drip(Fault):
    """Sends the body in small steps with pauses between them."""

    step_bytes: int = 1
    pause_s: float = 0.01

    async def play(self, exchange: Exchange) -> None:
        await _reach(exchange, "effect")
        await exchange.send_head()
        for start in range(0, exchange.body_bytes, self.step_bytes):
            await exchange.send_body(start, start + self.step_bytes)
            await asyncio.sleep(self.pause_s)


@dataclass(frozen=True)
class IgnoreRange(Fault):
    """Answers 200 and the whole object where a range was asked for."""

    async def play(self, exchange: Exchange) -> None:
        headers = {k: v for k, v in exchange.request.headers.items() if k != "range"}
        await exchange.receive()
        exchange.request = replace(exchange.request, headers=headers)
        await super().play(exchange)


@dataclass(frozen=True)
class WrongRange(Fault):
    """Says in Content-Range that the bytes are from another place."""

    shift_bytes: int = 1

    async def play(self, exchange: Exchange) -> None:
        await _reach(exchange, "effect")
        headers = exchange.response.headers
        shifted = re.sub(
            r"\d+(?=[-/])",
            lambda found: str(int(found[0]) + self.shift_bytes),
            headers.get("Content-Range", ""),
            count=2,
        )
        headers["Content-Range"] = shifted
        await exchange.send()


@dataclass(frozen=True)
class FlipByte(Fault):
    """Changes one byte of the answer's body, or, on its way in, of the request's."""

    offset: int = 0
    upload: bool = False

    async def play(self, exchange: Exchange) -> None:
        await exchange.receive()
        if self.upload:
            exchange.flip(self.offset)
        exchange.perform()
        if not self.upload:
            exchange.response.body = exchange.response.body.flipped(self.offset)
        await exchange.send()


@dataclass(frozen=True)
class StopReading(Fault):
    """Stops reading the request's body after some bytes, until the rule is released."""

    after_bytes: int = 0

    async def play(self, exchange: Exchange) -> None:
        await exchange.receive(lambda source: _Halting(source, exchange, self.after_bytes))
        await super().play(exchange)


class _Halting:
    """A source that stalls once."""

    def __init__(self, inner: Source, exchange: Exchange, after_bytes: int) -> None:
        self._inner = inner
        self._exchange = exchange
        self._left: int | None = after_bytes

    async def read_line(self) -> bytes:
        return await self._inner.read_line()

    async def read_into(self, view: memoryview) -> None:
        if self._left is not None and self._left <= len(view):
            await self._inner.read_into(view[: self._left])
            view, self._left = view[self._left :], None
            await self._exchange.stall(reading=False)
        elif self._left is not None:
            self._left -= len(view)
        await self._inner.read_into(view)


def slow_down(retry_after_s: int | None = None) -> Refuse:
    """503, as S3 throttles."""
    return Refuse(
        "SlowDown", at="head", message="Reduce your request rate.", retry_after_s=retry_after_s
    )


def internal_error(at: Moment = "body") -> Refuse:
    """500."""
    return Refuse("InternalError", at=at, message="We encountered an internal error.")


def wrong_region(region: str) -> Refuse:
    """301, for a bucket that is elsewhere."""
    return Refuse("PermanentRedirect", at="head", region=region)


def lost_response() -> Drop:
    """The request takes effect, and the client never hears of it."""
    return Drop(at="effect")
