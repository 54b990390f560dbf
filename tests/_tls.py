"""TLS in front of a server that speaks plain HTTP.

The bytes pass through unchanged, `Host` included, so signatures made for the https endpoint hold.
"""

from __future__ import annotations

import asyncio
import ssl
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trustme

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsEndpoint:
    """An https endpoint whose certificate no system trusts.

    Attributes:
        endpoint_url: `https://localhost:PORT`.
        ca_bundle: The PEM file of the authority to trust.
    """

    endpoint_url: str
    ca_bundle: Path


@contextmanager
def serve_tls(upstream_url: str, folder: Path) -> Iterator[TlsEndpoint]:
    """Terminate TLS in front of `upstream_url`; the certificates go into `folder`."""
    authority = trustme.CA()
    ca_bundle = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_bundle))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)

    listening: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    thread = Thread(
        target=lambda: asyncio.run(_serve(upstream_url, context, listening)), name="tls-proxy"
    )
    thread.start()
    port, loop, stop = listening.result(timeout=60)
    try:
        yield TlsEndpoint(endpoint_url=f"https://localhost:{port}", ca_bundle=ca_bundle)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=60)
        assert not thread.is_alive()


async def _serve(
    upstream_url: str,
    context: ssl.SSLContext,
    listening: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]],
) -> None:
    upstream = urlsplit(upstream_url)
    connections: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        task.add_done_callback(connections.discard)
        await _relay(reader, writer, upstream.hostname, upstream.port)

    stop = asyncio.Event()
    try:
        server = await asyncio.start_server(accepted, "localhost", 0, ssl=context)
    except BaseException as error:
        listening.set_exception(error)
        raise
    listening.set_result((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop))
    await stop.wait()
    server.close()
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


async def _relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str | None, port: int | None
) -> None:
    # A peer that closes or resets in either direction ends both: HTTP needs no half-open ends.
    with suppress(OSError, asyncio.CancelledError):
        up_reader, up_writer = await asyncio.open_connection(host, port)
        try:
            pumps = [
                asyncio.create_task(_pump(reader, up_writer)),
                asyncio.create_task(_pump(up_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            up_writer.transport.abort()
    writer.close()
    with suppress(OSError, asyncio.CancelledError):
        await writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_READ_BYTES):
        writer.write(data)
        await writer.drain()
