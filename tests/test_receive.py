"""Bodies received into the caller's memory, and sent from it: on both loops, plain and TLS.

The peer is a server on the client's own loop, so that a test can take turns with it byte by byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
import pytest
import trustme
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from s3dcp import (
    S3ClientConfig,
    S3ConnectionError,
    S3Exception,
    S3ProtocolError,
    S3TimeoutError,
)
from s3dcp import _receive as module
from s3dcp._client import S3Store
from s3dcp._keys import S3Uri
from s3dcp._payload import ViewsPayload, split, steps
from s3dcp._receive import receive
from s3dcp._store import Scatter

_PROMPTLY_S = 50.0
_IDLE_S = 100.0
#: Enough that the protocol is swapped, and that aiohttp stops reading on its own account.
SIZE = 1_000_003

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def body_of(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


BODY = body_of(SIZE)


def head(size: int | None = SIZE, **headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK"]
    if size is not None:
        lines.append(f"Content-Length: {size}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


class Peer:
    """A server that answers each request by the next script, and counts its connections.

    Attributes:
        connections: By which connection each request came.
        lost: Set when the client has closed the latest connection.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.connections: list[int] = []
        self.lost = asyncio.Event()
        self.scripts: list[Script] = []
        self.url = ""
        self._conversations: list[asyncio.Task[Any] | None] = []

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self._conversations)
        # Loops hold tasks weakly, and nothing else holds one that reads no more.
        self._conversations.append(asyncio.current_task())
        self.lost.clear()
        try:
            # Ending by the cancellation would be reported, up to Python 3.11.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    self.connections.append(number)
                    await self.scripts.pop(0)(reader, writer)
        finally:
            self.lost.set()
            writer.transport.abort()

    async def get(self, *scripts: Script) -> aiohttp.ClientResponse:
        self.scripts += scripts
        return await self.session.get(self.url)

    async def serves_again(self, *, connection: int) -> None:
        """Another request is served whole, by the connection with this number."""
        memory = bytearray(SIZE)
        response = await self.get(sends(head(), BODY))
        await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
        assert same(memory, BODY)
        assert self.connections[-1] == connection

    async def is_lost(self) -> None:
        """The client has closed its connection, and soon."""
        async with asyncio.timeout(_PROMPTLY_S):
            await self.lost.wait()


def same(memory: bytearray, expected: bytes) -> bool:
    """Compare without pytest's help, which takes minutes over a megabyte."""
    return memory == expected


def sends(*pieces: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return script


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(_PROMPTLY_S):
        while not condition():  # noqa: ASYNC110 - no event tells of what aiohttp has done
            await asyncio.sleep(0)


@pytest.fixture(scope="session")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the server, and of the client that trusts it."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


class Rig:
    """Runs a scenario on one of the loops, over one of the transports."""

    def __init__(
        self,
        factory: Callable[[], asyncio.AbstractEventLoop],
        contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None,
    ) -> None:
        self._factory = factory
        self._server_tls = contexts[0] if contexts else None
        self._client_tls = contexts[1] if contexts else None

    def __call__(
        self, scenario: Callable[[Peer], Awaitable[None]], *, sock_read: float = _IDLE_S
    ) -> None:
        complaints: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=self._factory) as runner:
            loop = runner.get_loop()
            loop.set_exception_handler(lambda _, context: complaints.append(context))
            runner.run(self._run(scenario, sock_read))
        assert complaints == []

    async def _run(self, scenario: Callable[[Peer], Awaitable[None]], sock_read: float) -> None:
        # As aiobotocore makes them.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._client_tls or True),
            timeout=aiohttp.ClientTimeout(sock_read=sock_read),
            auto_decompress=False,
        )
        peer = Peer(session)
        server = await asyncio.start_server(peer.accepted, "localhost", 0, ssl=self._server_tls)
        port = server.sockets[0].getsockname()[1]
        peer.url = f"{'https' if self._server_tls else 'http'}://localhost:{port}/"
        try:
            await scenario(peer)
        finally:
            # What closing waits for, aiohttp's protocol has to have been told of.
            server.close()
            async with asyncio.timeout(_PROMPTLY_S):
                await session.close()
            for _ in range(3):  # connections may still be in the queue, and close a round later
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
                await asyncio.sleep(0)


@pytest.fixture(params=["asyncio", "uvloop", "asyncio-tls", "uvloop-tls"])
def run(request: pytest.FixtureRequest, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Rig:
    loop, _, tls = request.param.partition("-")
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    return Rig(factory, contexts if tls else None)


@pytest.fixture
def no_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the protocol is swapped."""

    async def swap(*args: object) -> None:
        raise AssertionError("swapped")

    monkeypatch.setattr(module, "_receive_raw", swap)


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that were left to receive at each swap."""
    made: list[int] = []
    original = module._receive_raw

    async def swap(response: aiohttp.ClientResponse, into: Scatter, idle_s: float) -> None:
        made.append(into.remaining)
        await original(response, into, idle_s)

    monkeypatch.setattr(module, "_receive_raw", swap)
    return made


class TestWhole:
    @pytest.mark.parametrize("size", [0, 1, 1000, 65536, 65537, 120_000])
    def test_in_one_packet_with_the_head(self, run: Rig, size: int) -> None:
        async def scenario(peer: Peer) -> None:
            memory = bytearray(size)
            response = await peer.get(sends(head(size) + body_of(size)))
            await until(lambda: response.content.total_bytes == size)
            await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
            assert same(memory, body_of(size))
            await peer.serves_again(connection=0)

        run(scenario)

    def test_in_odd_packets(self, run: Rig, swaps: list[int]) -> None:
        sizes = [1, 3, 997, 65537, 131071, 2]

        async def scenario(peer: Peer) -> None:
            memory = bytearray(SIZE)
            into = Scatter([memoryview(memory)])

            def reached(count: int) -> bool:
                return into.received == count

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head())
                sent = 0
                while sent < SIZE:
                    piece = BODY[sent : sent + sizes[sent % len(sizes)]]
                    writer.write(piece)
                    await writer.drain()
                    sent += len(piece)
                    # One at a time, so that none is joined with the next.
                    await until(partial(reached, sent))

            await receive(await peer.get(script), into, _IDLE_S)
            assert same(memory, BODY)
            assert swaps == [SIZE] or swaps == [SIZE - 1]
            await peer.serves_again(connection=0)

        run(scenario)

    def test_after_aiohttp_has_buffered_and_stopped_reading(
        self, run: Rig, swaps: list[int]
    ) -> None:
        """The body waits in four places: aiohttp's stream and parser, TLS, and the kernel."""
        body = body_of(16 << 20)

        async def scenario(peer: Peer) -> None:
            memory = bytearray(len(body))
            response = await peer.get(sends(head(len(body)), body))
            assert response.connection is not None
            protocol = response.connection.protocol
            assert protocol is not None
            await until(lambda: protocol._reading_paused)
            buffered = response.content.total_bytes
            assert buffered
            await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
            assert same(memory, body)
            assert len(swaps) == 1
            assert 0 < swaps[0] <= len(body) - buffered
            await peer.serves_again(connection=0)

        run(scenario)

    def test_scattered(self, run: Rig) -> None:
        sizes = [0, 1, 0, 300_000, 7, 0, 500_000, 1, 199_994, 0]
        assert sum(sizes) == SIZE

        async def scenario(peer: Peer) -> None:
            memories = [bytearray(size) for size in sizes]
            into = Scatter([memoryview(memory) for memory in memories])
            await receive(await peer.get(sends(head(), BODY)), into, _IDLE_S)
            assert same(bytearray().join(memories), BODY)
            assert [len(memory) for memory in memories] == sizes
            assert (into.received, into.remaining) == (SIZE, 0)

        run(scenario)

    def test_many_after_each_other_and_at_once(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            for _ in range(5):
                await peer.serves_again(connection=0)

            async def one() -> bytearray:
                memory = bytearray(SIZE)
                response = await peer.get(sends(head(), BODY))
                await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
                return memory

            assert all(
                same(memory, BODY) for memory in await asyncio.gather(*(one() for _ in range(8)))
            )

        run(scenario)

    def test_from_a_server_that_then_closes(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head(SIZE, Connection="close") + BODY)
                await writer.drain()
                writer.close()

            memory = bytearray(SIZE)
            await receive(await peer.get(script), Scatter([memoryview(memory)]), _IDLE_S)
            assert same(memory, BODY)
            await peer.serves_again(connection=1)

        run(scenario)

    def test_aiohttps_read_timer_is_disarmed(self, run: Rig) -> None:
        """It knows nothing of the bytes that pass it by; the idle timer is ours."""

        async def scenario(peer: Peer) -> None:
            memory = bytearray(SIZE)
            into = Scatter([memoryview(memory)])

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head() + BODY[:1000])
                await until(lambda: into.received == 1000)
                await asyncio.sleep(0.2)  # longer than aiohttp would wait
                writer.write(BODY[1000:])
                await writer.drain()

            response = await peer.get(script)
            assert response.connection is not None
            aiohttps = response.connection.protocol
            assert aiohttps is not None
            # Not before: until the head has come, it would be for the peer to be quick.
            aiohttps.read_timeout = 0.1
            aiohttps.start_timeout()
            await receive(response, into, _IDLE_S)
            assert same(memory, BODY)
            # Nor does it go off while the connection is idle in the pool.
            await asyncio.sleep(0.2)
            await peer.serves_again(connection=0)

        run(scenario)


class TestCopied:
    """What cannot be swapped for, or is too small to be worth it."""

    @pytest.mark.usefixtures("no_swap")
    def test_a_small_body(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            for _ in range(2):
                memory = bytearray(1000)
                response = await peer.get(sends(head(1000), body_of(1000)))
                await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
                assert same(memory, body_of(1000))
            assert peer.connections == [0, 0]

        run(scenario)

    @pytest.mark.usefixtures("no_swap")
    def test_a_chunked_body(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            chunks = [BODY[:7], BODY[7:500_000], BODY[500_000:], b""]
            coded = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
            memory = bytearray(SIZE)
            response = await peer.get(sends(head(None, Transfer_Encoding="chunked"), *coded))
            await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
            assert same(memory, BODY)

        run(scenario)

    @pytest.mark.usefixtures("no_swap")
    def test_an_encoded_body_is_what_was_sent(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            coded = gzip.compress(os.urandom(200_000))
            memory = bytearray(len(coded))
            response = await peer.get(sends(head(len(coded), Content_Encoding="gzip"), coded))
            await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
            assert same(memory, coded)

        run(scenario)

    @pytest.mark.usefixtures("no_swap")
    @pytest.mark.parametrize(("sent", "error"), [(999, S3ConnectionError), (1001, S3ProtocolError)])
    def test_a_chunked_body_of_another_length(
        self, run: Rig, sent: int, error: type[Exception]
    ) -> None:
        async def scenario(peer: Peer) -> None:
            coded = b"%x\r\n%b\r\n0\r\n\r\n" % (sent, body_of(sent))
            into = Scatter([memoryview(bytearray(1000))])
            response = await peer.get(sends(head(None, Transfer_Encoding="chunked"), coded))
            with pytest.raises(error):
                await receive(response, into, _IDLE_S)

        run(scenario)

    @pytest.mark.usefixtures("no_swap")
    def test_a_stall(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            into = Scatter([memoryview(bytearray(1000))])
            response = await peer.get(sends(head(1000), body_of(10)))
            with pytest.raises(S3TimeoutError, match="No byte came"):
                await receive(response, into, 0.5)
            await peer.is_lost()

        run(scenario, sock_read=0.5)


class TestCutShort:
    """However a body ends early, its connection is not used again."""

    @pytest.mark.parametrize("sent", [0, 1, 65536, 400_000, SIZE - 1])
    def test_by_the_end_of_the_stream(self, run: Rig, sent: int) -> None:
        async def scenario(peer: Peer) -> None:
            into = Scatter([memoryview(bytearray(SIZE))])

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head() + BODY[:sent])
                await writer.drain()
                await until(lambda: into.received == sent)
                writer.close()

            response = await peer.get(script)
            with pytest.raises(S3ConnectionError, match=f"{SIZE - sent} bytes|with {SIZE - sent}"):
                await receive(response, into, _IDLE_S)
            assert into.received == sent
            await peer.serves_again(connection=1)

        run(scenario)

    def test_by_a_reset(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            memory = bytearray(SIZE)
            into = Scatter([memoryview(memory)])

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head() + BODY[:400_000])
                await writer.drain()
                await until(lambda: into.received == 400_000)
                reset(writer)

            response = await peer.get(script)
            with pytest.raises(S3ConnectionError) as caught:
                await receive(response, into, _IDLE_S)
            assert not isinstance(caught.value, S3TimeoutError)
            assert caught.value.retryable
            assert same(memory, BODY[:400_000] + bytes(SIZE - 400_000))
            await peer.serves_again(connection=1)

        run(scenario)

    def test_before_anybody_received_it(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head() + BODY[:1000])
                await writer.drain()
                reset(writer)

            response = await peer.get(script)
            await until(response.content.exception)
            with pytest.raises(S3ConnectionError, match="bytes to come"):
                await receive(response, Scatter([memoryview(bytearray(SIZE))]), _IDLE_S)
            await peer.serves_again(connection=1)

        run(scenario)

    def test_by_a_stall(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            into = Scatter([memoryview(bytearray(SIZE))])
            response = await peer.get(sends(head() + BODY[:400_000]))
            with pytest.raises(S3TimeoutError, match=f"0.5 s, with {SIZE - 400_000} to come"):
                await receive(response, into, 0.5)
            assert into.received == 400_000
            await peer.is_lost()
            await peer.serves_again(connection=1)

        run(scenario)

    @pytest.mark.parametrize("received", [0, 400_000])
    def test_by_a_cancellation(self, run: Rig, received: int) -> None:
        """The caller has its memory to itself again."""

        async def scenario(peer: Peer) -> None:
            memory = bytearray(SIZE)
            into = Scatter([memoryview(memory)])
            cancelled = asyncio.Event()

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(head() + BODY[:received])
                await cancelled.wait()
                writer.write(BODY[received:])
                await writer.drain()

            response = await peer.get(script)
            task = asyncio.create_task(receive(response, into, _IDLE_S))
            await asyncio.sleep(0)
            await until(lambda: into.received == received)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            memory[:] = b"\xff" * SIZE
            cancelled.set()
            await peer.is_lost()
            assert same(memory, b"\xff" * SIZE)
            await peer.serves_again(connection=1)

        run(scenario)

    def test_and_closed_while_it_is_received(self, run: Rig) -> None:
        """By the client's own end: the receiver passes the loss on, or closing waits for ever."""

        async def scenario(peer: Peer) -> None:
            into = Scatter([memoryview(bytearray(SIZE))])
            response = await peer.get(sends(head() + BODY[:400_000]))
            task = asyncio.create_task(receive(response, into, _IDLE_S))
            await until(lambda: into.received == 400_000)
            async with asyncio.timeout(_PROMPTLY_S):
                await peer.session.close()
            with pytest.raises(S3ConnectionError):
                await task

        run(scenario)


class TestTooLong:
    @pytest.mark.parametrize("surplus", [1, 5000, 1_000_000])
    def test_the_connection_is_not_used_again(self, run: Rig, surplus: int) -> None:
        """An error if it shows in time; in any case nothing but the promised bytes arrives."""

        async def scenario(peer: Peer) -> None:
            guard = b"\xaa" * 4096
            memory = bytearray(SIZE) + guard
            into = Scatter([memoryview(memory)[:SIZE]])
            response = await peer.get(sends(head(), BODY + bytes(surplus)))
            with contextlib.suppress(S3ProtocolError):
                await receive(response, into, _IDLE_S)
            assert same(memory, BODY + guard)
            await peer.is_lost()
            await peer.serves_again(connection=1)

        run(scenario)

    def test_it_shows_on_uvloop(self, swaps: list[int]) -> None:
        """Which asks for another buffer at once: the spare one."""

        async def scenario(peer: Peer) -> None:
            into = Scatter([memoryview(bytearray(SIZE))])
            response = await peer.get(sends(head(), BODY + bytes(100_000)))
            with pytest.raises(S3ProtocolError, match="longer than its Content-Length"):
                await receive(response, into, _IDLE_S)
            assert swaps

        Rig(uvloop.new_event_loop, None)(scenario)

    def test_a_small_one(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            memory = bytearray(1000)
            with contextlib.suppress(S3ProtocolError, S3ConnectionError, aiohttp.ClientError):
                response = await peer.get(sends(head(1000) + body_of(1001)))
                await receive(response, Scatter([memoryview(memory)]), _IDLE_S)
                assert same(memory, body_of(1000))
            await peer.is_lost()
            await peer.serves_again(connection=1)

        run(scenario)

    @pytest.mark.parametrize("size", [1000, 200_000])
    def test_than_the_caller_expects(self, run: Rig, size: int) -> None:
        """The head is not what the caller was told: nothing is written beyond its memory."""

        async def scenario(peer: Peer) -> None:
            guard = b"\xaa" * 4096
            memory = bytearray(size) + guard
            into = Scatter([memoryview(memory)[:size]])
            response = await peer.get(sends(head(size + 1), body_of(size + 1)))
            with pytest.raises(S3ProtocolError, match="longer"):
                await receive(response, into, _IDLE_S)
            got = into.received
            assert same(memory, body_of(got) + bytes(size - got) + guard)

        run(scenario)


def test_progress_restarts_the_idle_timer() -> None:
    """A slow body is let be, however long it takes in all."""

    async def scenario() -> None:
        into = Scatter([memoryview(bytearray(10))])
        owner, transport = object(), object()
        receiver = module._Receiver(into, owner, transport, 60.0)  # type: ignore[arg-type]
        for _ in range(3):
            receiver.get_buffer(-1)[:1] = b"x"
            receiver.buffer_updated(1)
            receiver._check_progress()
            assert not receiver.done.done()
        receiver._check_progress()
        with pytest.raises(S3TimeoutError, match="60 s, with 7 to come"):
            await receiver.done
        receiver.stop()

    asyncio.run(scenario())


def reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection by RST."""
    descriptor = os.dup(writer.get_extra_info("socket").fileno())
    with socket.socket(fileno=descriptor) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


MIXED = [1, 70_000, 10, 20, 3_000_000, 5, 65_536, 65_535, 0, 300_000, 4]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([], id="nothing"),
        pytest.param([0, 0], id="empty views"),
        pytest.param([1], id="a byte"),
        pytest.param([200_000], id="one view"),
        pytest.param([60] * 8_000, id="many small views"),
        pytest.param([5_000_000, 100], id="a tensor and a trailer"),
        pytest.param(MIXED, id="mixed"),
    ],
)
class TestPayload:
    def test_what_arrives_is_the_views(self, run: Rig, sizes: list[int]) -> None:
        arrived: list[bytes] = []

        async def scenario(peer: Peer) -> None:
            views = views_of(sizes)

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                arrived.append(await reader.readexactly(sum(sizes)))
                writer.write(head(0))

            # Twice: the second is a retry, for which the body is rewound.
            payload = ViewsPayload(views, _IDLE_S)
            for _ in range(2):
                peer.scripts.append(script)
                async with peer.session.put(peer.url, data=payload) as response:
                    assert response.status == 200
                payload.seek(0)
            assert peer.connections == [0, 0]
            assert not payload.stalled

        run(scenario)
        assert [same(bytearray(body), body_of(sum(sizes))) for body in arrived] == [True, True]

    def test_the_steps(self, sizes: list[int]) -> None:
        first, rest = split([view for view in views_of(sizes) if view.nbytes])
        cut = list(steps(rest))
        assert same(bytearray(first) + b"".join(cut), body_of(sum(sizes)))
        assert len(first) <= 4096  # aiohttp copies it, next to the head
        assert all(0 < len(step) <= 1 << 20 for step in cut)

    def test_what_botocore_asks_of_a_body(self, sizes: list[int]) -> None:
        async def scenario() -> None:
            payload = ViewsPayload(views_of(sizes), _IDLE_S)
            assert len(payload) == payload.size == sum(sizes)
            assert payload.tell() == 0
            assert payload.seek(0, os.SEEK_END) == sum(sizes)
            assert payload.seek(0) == 0
            with pytest.raises(NotImplementedError):
                payload.read()
            with pytest.raises(TypeError, match="not text"):
                payload.decode()

        asyncio.run(scenario())


def views_of(sizes: list[int]) -> list[memoryview]:
    body = memoryview(body_of(sum(sizes)))
    views, start = [], 0
    for size in sizes:
        views.append(body[start : start + size])
        start += size
    return views


@given(st.lists(st.integers(0, 300_000), max_size=12))
def test_steps_lose_nothing(sizes: list[int]) -> None:
    first, rest = split([view for view in views_of(sizes) if view.nbytes])
    assert all(view.nbytes for view in rest)
    assert same(bytearray(first) + b"".join(rest), body_of(sum(sizes)))
    assert same(bytearray(first) + b"".join(steps(rest)), body_of(sum(sizes)))


class TestAPeerThatStopsReading:
    BIG = 64 << 20  # more than both kernel buffers hold

    def test_is_given_up(self, run: Rig) -> None:
        async def scenario(peer: Peer) -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await asyncio.Future()

            peer.scripts.append(script)
            payload = ViewsPayload([memoryview(bytes(self.BIG))], 0.2)
            async with asyncio.timeout(_PROMPTLY_S):
                with pytest.raises(TimeoutError):
                    await peer.session.put(peer.url, data=payload)
            assert payload.stalled
            await peer.serves_again(connection=len(peer.connections))

        run(scenario)

    @pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
    def test_is_a_typed_error(
        self, factory: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

        async def scenario(peer: Peer) -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await asyncio.Future()

            peer.scripts.append(script)
            config = S3ClientConfig(
                endpoint_url=peer.url, read_timeout_s=0.2, force_path_style=True
            )
            store = S3Store("us-east-1", config)
            async with asyncio.timeout(_PROMPTLY_S):
                with pytest.raises(S3TimeoutError, match=r"took no bytes for 0.2 s") as caught:
                    await store.put(S3Uri("bucket", "key"), [memoryview(bytes(self.BIG))])
            assert (caught.value.operation, caught.value.key) == ("PutObject", "key")
            async with asyncio.timeout(_PROMPTLY_S):
                await store.close()

        Rig(factory, None)(scenario)

    @pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
    def test_does_not_have_it_whatever_it_says(
        self, factory: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

        async def scenario(peer: Peer) -> None:
            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readexactly(1000)
                writer.write(head(0, ETag='"1"'))
                await writer.drain()
                await asyncio.Future()

            peer.scripts.append(script)
            store = S3Store(
                "us-east-1", S3ClientConfig(endpoint_url=peer.url, force_path_style=True)
            )
            async with asyncio.timeout(_PROMPTLY_S):
                with pytest.raises(
                    S3ProtocolError, match=r"200 when \d+ of \d+ bytes were not sent"
                ) as caught:
                    await store.put(S3Uri("bucket", "key"), [memoryview(bytes(self.BIG))])
            assert caught.value.retryable
            assert (caught.value.operation, caught.value.key) == ("PutObject", "key")
            await store.close()

        Rig(factory, None)(scenario)


def test_a_connection_that_the_kernel_gives_up_is_said_to_have_timed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By TCP, for want of acknowledgements: not by us, for want of progress."""

    async def send(*_: object) -> None:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr("s3dcp._payload.send", send)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    async def scenario(peer: Peer) -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.Future()

        peer.scripts.append(script)
        store = S3Store("us-east-1", S3ClientConfig(endpoint_url=peer.url, force_path_style=True))
        with pytest.raises(S3Exception, match="Connection timed out") as caught:
            await store.put(S3Uri("bucket", "key"), [memoryview(bytes(1 << 20))])
        assert caught.value.retryable
        await store.close()

    Rig(uvloop.new_event_loop, None)(scenario)
