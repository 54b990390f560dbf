"""One request and its answer, in steps that faults leave out or stop in the middle of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from s3dcp.testing._answers import Response, refusal
from s3dcp.testing._bodies import Body, Source, read_body
from s3dcp.testing._faults import Fault
from s3dcp.testing._http import Connection, Head
from s3dcp.testing._records import Journal, Record, Violation
from s3dcp.testing._requests import Request, S3Error
from s3dcp.testing._rules import Rule
from s3dcp.testing._s3 import S3
from s3dcp.testing._signatures import Signed, Verifier, verify_payload

_log = logging.getLogger("s3dcp.testing")


@dataclass(kw_only=True, eq=False)
class Exchange:
    """The steps of serving one request; each of `receive` and `perform` is taken once.

    Attributes:
        response: The answer, once there is one.
    """

    connection: Connection
    head: Head
    request: Request
    record: Record
    s3: S3
    verifier: Verifier
    anonymous: bool
    journal: Journal
    rule: Rule | None
    latency_s: float
    response: Response = field(init=False)
    _body: Body | None = field(default=None, init=False)
    _signed: Signed | None = field(default=None, init=False)
    _refusal: S3Error | None = field(default=None, init=False)
    _performed: bool = field(default=False, init=False)
    _last: bool = field(default=False, init=False)

    async def play(self) -> None:
        """Serve the request, as its rule says."""
        fault = self.rule.fault if self.rule else Fault()
        try:
            await fault.play(self)
        finally:
            if self.rule:
                self.rule.note(self.record)
        if not self.head.keep_alive:
            self.connection.close()

    @property
    def body_bytes(self) -> int:
        """How long the answer's body is."""
        return 0 if self.head.method == "HEAD" else self.response.body.size

    async def receive(self, through: Callable[[Source], Source] = lambda source: source) -> None:
        """Check the request's head, and read its body.

        Args:
            through: Stands between the connection and what reads.
        """
        if self._body is not None:
            return
        try:
            self._check_head()
        except S3Error as error:
            self._refusal = error
        if self.head.headers.get("expect", "").lower() == "100-continue":
            if self._refusal is not None:
                return
            await self.connection.write([b"HTTP/1.1 100 Continue\r\n\r\n"])
        self._body = await read_body(through(self.connection), self.head.headers, self._drops)
        self.journal.received(self.record, self._body.blob.size)

    def _check_head(self) -> None:
        headers, operation = self.head.headers, self.request.operation
        if "authorization" in headers or not self.anonymous:
            region = self.s3.region_of(self.request.bucket)
            self._signed = self.verifier.verify_head(self.request, region)
        self.s3.check(self.request)
        if operation not in {"PutObject", "UploadPart"}:
            return
        sized = "x-amz-decoded-content-length" in headers or "content-length" in headers
        if not sized and (self.s3.options.strict or "transfer-encoding" not in headers):
            raise S3Error(
                "MissingContentLength", "You must provide the Content-Length HTTP header."
            )

    def _drops(self, size_bytes: int) -> bool:
        # A fault may want to change the body.
        return self.rule is None and self.s3.drops(self.request, size_bytes)

    def perform(self) -> None:
        """Do what the request asks for, in one step."""
        if self._performed:
            return
        self._performed = True
        try:
            if self._refusal is not None:
                raise self._refusal
            assert self._body is not None
            if self._signed is not None:
                verify_payload(self._signed, self._body)
            self.response = self.s3.perform(self.request, self._body)
        except S3Error as error:
            self.refuse(error)
            if not error.ordinary and (self.rule is None or self.rule.fault.harmless):
                violation = Violation(self.record, error.code, error.message)
                self.journal.violations.append(violation)
                _log.warning("%s", violation)

    def refuse(self, error: S3Error) -> None:
        """Make an error the answer."""
        self.response = refusal(error, self.request)
        self.record.code = error.code

    async def send(self) -> None:
        """Send the whole answer."""
        await self.send_head()
        await self.send_body()
        if self._last:
            await self.connection.linger()

    async def send_head(self, stop: int | None = None) -> None:
        """Send the answer's head, or its first bytes."""
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        # Beyond a body that was not read nothing can be found.
        self._last = self._body is None and _has_body(self.head)
        answer = self.response
        answer.headers["x-amz-request-id"] = f"{self.record.index:016X}"
        if self._last or not self.head.keep_alive:
            answer.headers["Connection"] = "close"
        self.record.status = answer.status
        await self.connection.write([answer.head()[:stop]])

    async def send_body(self, start: int = 0, stop: int | None = None) -> None:
        """Send the answer's body from `start` to `stop`."""
        if self.head.method == "HEAD":
            return
        body = self.response.body
        if start or stop is not None:
            body = body.slice(start, body.size if stop is None else stop)
        # Counted first: the client may ask as soon as it has the last byte.
        self.journal.sent(self.record, body.size)
        try:
            await self.connection.write(body.views)
        except BaseException:
            self.journal.sent(self.record, -self.connection.unsent)
            raise

    async def send_extra(self, data: bytes) -> None:
        """Send bytes that no head announced."""
        await self.connection.write([data])

    async def flush(self) -> None:
        """Wait until the client's side has taken all that was sent."""
        await self.connection.flush()

    async def stall(self, *, reading: bool = True) -> None:
        """Wait until the rule is released.

        Args:
            reading: Whether the client's bytes are read meanwhile.
        """
        assert self.rule is not None
        if not reading:
            self.connection.hold_back()
        self.rule.note(self.record)
        await self.connection.until(self.rule.gate.event())

    def flip(self, offset: int) -> None:
        """Change a byte of the request's body."""
        assert self._body is not None
        self._body.blob.views[0][offset] ^= 1

    def end(self, *, reset: bool) -> None:
        """End the connection, by RST or by FIN."""
        if reset:
            self.connection.reset()
        else:
            self.connection.close()


def _has_body(head: Head) -> bool:
    return "transfer-encoding" in head.headers or head.headers.get("content-length", "0") != "0"
