"""The server on its event loop: connections, one exchange after the other on each."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import get_ident
from typing import TypeVar
from weakref import WeakSet

from s3dcp.testing._answers import Response
from s3dcp.testing._exchange import Exchange
from s3dcp.testing._http import Connection, GoneError, Head, MalformedRequestError
from s3dcp.testing._records import Journal, Record, Violation
from s3dcp.testing._requests import Router
from s3dcp.testing._rules import Rule
from s3dcp.testing._s3 import S3
from s3dcp.testing._signatures import Verifier

T = TypeVar("T")

_log = logging.getLogger("s3dcp.testing")
_BACKLOG = 1024
_PACED_WINDOW_BYTES = 2 << 20
_SETTLING_TURNS = 8  # of the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Where the server listens, and how it is reached.

    Attributes:
        latency_s: From a request's last byte to its answer's first.
        bytes_per_s: Of each connection, each way.
    """

    host: str
    port: int
    ssl_context: ssl.SSLContext | None
    latency_s: float
    bytes_per_s: float | None


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """Serves S3 on the loop that `run` runs on; other threads use `call` to look into it."""

    s3: S3
    verifier: Verifier
    anonymous: bool
    link: Link
    journal: Journal = field(default_factory=Journal)
    rules: list[Rule] = field(default_factory=list)
    _router: Router = field(default_factory=Router)
    _connections: WeakSet[Connection] = field(default_factory=WeakSet)
    _loop: asyncio.AbstractEventLoop | None = None
    _thread_id: int | None = None
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, listening: Future[int]) -> None:
        """Serve until `stop`; `listening` is told the port, or why there is none."""
        self._loop, self._thread_id = asyncio.get_running_loop(), get_ident()
        try:
            server = await self._loop.create_server(
                self._accept, sock=_bound(self.link), ssl=self.link.ssl_context, backlog=_BACKLOG
            )
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            listening.set_exception(error)
            return
        listening.set_result(server.sockets[0].getsockname()[1])
        await self._stopping.wait()
        await self._settle()  # asyncio's own server loses those that it is closed over
        server.close()
        await self._settle()
        for connection in list(self._connections):
            await connection.abort()

    @staticmethod
    async def _settle() -> None:
        """Let what was accepted become a connection."""
        for _ in range(_SETTLING_TURNS):
            await asyncio.sleep(0)

    def stop(self) -> None:
        """End `run`, from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stopping.set)

    def call(self, function: Callable[[], T]) -> T:
        """Return what a function returns on the loop, where nothing else happens meanwhile.

        On the loop itself too: the functions of a rule may look at what is stored, and change it.
        """
        assert self._loop is not None
        if get_ident() == self._thread_id:
            return function()

        async def called() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result()

    def _accept(self) -> Connection:
        connection = Connection(self._serve, self.link.bytes_per_s)
        self._connections.add(connection)
        return connection

    async def _serve(self, connection: Connection) -> None:
        number = self.journal.connections
        self.journal.connections += 1
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await self._serve_all(connection, number)
        except Exception as error:  # noqa: BLE001 - and raised by `check`
            _log.exception("a request failed within the server")
            self.journal.failures.append(error)
            connection.reset()
        finally:
            connection.close()

    async def _serve_all(self, connection: Connection, number: int) -> None:
        if self._refused(connection, number):
            return
        try:
            while (head := await connection.read_head()) is not None:
                await self._exchange(connection, head, number)
                if connection.transport.is_closing():
                    return
        except MalformedRequestError as error:
            record = self._latest_of(number)
            self.journal.violations.append(Violation(record, "BadRequest", str(error)))
            await connection.write([Response(400, {"Connection": "close"}).head()])
            await connection.linger()

    async def _exchange(self, connection: Connection, head: Head, number: int) -> None:
        request = self._router.route(head)
        record = self.journal.open(request, number)
        rule = self._rule_for(record)
        exchange = Exchange(
            connection=connection,
            head=head,
            request=request,
            record=record,
            s3=self.s3,
            verifier=self.verifier,
            anonymous=self.anonymous,
            journal=self.journal,
            rule=rule,
            latency_s=self.link.latency_s,
        )
        try:
            await exchange.play()
        except GoneError:
            _log.debug("the client left during request %d", record.index)
            raise

    def _refused(self, connection: Connection, number: int) -> bool:
        """Play the faults of new connections, all of which are that there is none."""
        record = _no_request("Connect", number)
        if (rule := self._rule_for(record)) is None:
            return False
        connection.reset()
        rule.note(record)
        return True

    def _rule_for(self, record: Record) -> Rule | None:
        rule = next((rule for rule in self.rules if rule.takes(record)), None)
        if rule is not None:
            record.fault = rule.fault
        return rule

    def _latest_of(self, number: int) -> Record:
        for record in reversed(self.journal.records):
            if record.connection == number:
                return record
        return _no_request("Malformed", number)


def _bound(link: Link) -> socket.socket:
    bound = socket.socket()
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if link.bytes_per_s:
            # A small window that is closed and opened all the time is slower than the link.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_WINDOW_BYTES)
        bound.bind((link.host, link.port))
    except BaseException:
        bound.close()
        raise
    return bound


def _no_request(operation: str, connection: int) -> Record:
    return Record(
        index=-1,
        connection=connection,
        operation=operation,
        method="",
        bucket="",
        key="",
        query={},
        headers={},
    )
