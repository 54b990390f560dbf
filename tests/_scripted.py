"""An HTTP server whose answers a test scripts: for faults, and to see what is really sent.

It runs on a thread of its own. A handler turns each request into the bytes of an answer; `forward`
hands it to a real server, so that only the fault itself is scripted:

    real = forward(server.endpoint_url)
    with Scripted(lambda r: error(403, "AccessDenied") if r.method == "PUT" else real(r)) as store:
        ...
    assert len(store.sent("PUT")) == 1
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Self
from urllib.parse import unquote, urlsplit

#: The first lines of a script that needs some modules of s3dcp, and not torch, which the package
#: itself imports in seconds.
LEAN = f"""
import sys, types
sys.modules["s3dcp"] = types.ModuleType("s3dcp")
sys.modules["s3dcp"].__path__ = [{str(Path(__file__).parents[1] / "s3dcp")!r}]
"""

#: As an answer: close the connection without one.
HANG_UP = b""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was received.

    Attributes:
        target: As sent: percent-encoded, with its query; absolute where a proxy was asked.
        headers: By lower-case name.
        connection: Which connection it came by, counted from 0.
        tunnel: The address that the connection was tunnelled to (CONNECT), if any.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    tunnel: str

    @property
    def path(self) -> str:
        """The target's path, decoded."""
        path = self.target.partition("?")[0]
        # For a path alone, urlsplit would take the first part of //a/b for a host.
        return unquote(urlsplit(path).path if path.startswith("http") else path)

    @property
    def query(self) -> str:
        """The target's query, as sent."""
        return self.target.partition("?")[2]


Handler = Callable[[Request], bytes | Awaitable[bytes]]
Serve = Callable[[Handler], AbstractContextManager["Scripted"]]


def answer(status: int = 200, body: bytes = b"", **headers: object) -> bytes:
    """Return an answer. In the headers' names `_` stands for `-`."""
    lines = [f"HTTP/1.1 {status} Scripted", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(status: int, code: str, more: str = "", **headers: object) -> bytes:
    """Return S3's answer for an error; `more` are further elements of its XML."""
    xml = f"<Error><Code>{code}</Code><Message>scripted</Message>{more}</Error>"
    return answer(status, xml.encode(), Content_Type="application/xml", **headers)


def forward(upstream_url: str) -> Handler:
    """Let a real server answer. `Host` stays as it was signed."""
    upstream = urlsplit(upstream_url)

    async def handle(request: Request) -> bytes:
        reader, writer = await asyncio.open_connection(upstream.hostname, upstream.port)
        try:
            headers = {**request.headers, "connection": "close"}
            lines = [f"{request.method} {request.target} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + request.body)
            return await reader.read()
        finally:
            writer.transport.abort()

    return handle


async def hang(request: Request) -> bytes:
    """Never answer."""
    return await asyncio.Future()


class Scripted:
    """The server: a context manager.

    Args:
        handler: Makes the answers.
        tunnel_tls: Accept CONNECT, and be the https server at its end.
    """

    def __init__(self, handler: Handler, *, tunnel_tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.handler = handler
        self._tunnel_tls = tunnel_tls
        self._connections: list[asyncio.Task[None]] = []
        self._listening: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = Thread(target=lambda: asyncio.run(self._serve()), name="scripted-server")

    def __enter__(self) -> Self:
        self._thread.start()
        port, self._loop, self._stop = self._listening.result(60)
        self.endpoint_url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    @contextmanager
    def answering(self, handler: Handler) -> Iterator[Self]:
        """Answer by another handler, and forget the requests so far.

        For tests that share a server, and so a client: to make one costs more than most tests.
        """
        self.handler = handler
        self.requests = []
        yield self

    def sent(self, method: str) -> list[Request]:
        """The requests with this method so far."""
        return [request for request in self.requests if request.method == method]

    async def _serve(self) -> None:
        stop = asyncio.Event()
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self._listening.set_result((port, asyncio.get_running_loop(), stop))
        await stop.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.append(task)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._converse(reader, writer, len(self._connections) - 1)
        writer.transport.abort()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> None:
        tunnel = ""
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            method, target, _ = head[0].split(" ")
            pairs = (line.partition(":") for line in head[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            request = Request(method, target, headers, body, connection, tunnel)
            self.requests.append(request)
            if method == "CONNECT" and self._tunnel_tls is not None:
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                await writer.start_tls(self._tunnel_tls)
                tunnel = target
                continue
            made = self.handler(request)
            sent = made if isinstance(made, bytes) else await made
            if method == "HEAD":
                sent = b"".join(sent.partition(b"\r\n\r\n")[:2])
            writer.write(sent)
            await writer.drain()
            if sent == HANG_UP or b"\r\nconnection: close\r\n" in sent[:4096].lower():
                writer.close()
                return
