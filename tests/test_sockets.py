"""Bodies over a lent socket: whole, in order, and the socket given back."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from s3dcp._sockets import _burst, lent_socket, send

_BIG = 24 << 20  # more than the kernel's buffers hold
_PROMPTLY_S = 60.0

Scenario = Callable[[asyncio.Transport, socket.socket], Awaitable[None]]


@pytest.fixture(params=[uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Run a scenario with a transport, and the socket at its other end."""

    def run(scenario: Scenario) -> None:
        async def connected() -> None:
            loop = asyncio.get_running_loop()
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
            try:
                async with asyncio.timeout(_PROMPTLY_S):
                    await scenario(transport, theirs)
            finally:
                transport.abort()
                theirs.close()
                await asyncio.sleep(0)

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(connected())

    return run


async def _receive(theirs: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
    return bytes(received)


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/dev/fd").iterdir()}


def _nothing(_count: int) -> None:
    pass


def test_all_views_arrive_in_order(run: Callable[[Scenario], None]) -> None:
    body = os.urandom(_BIG)
    edges = [0, 10, 11, 5_000_000, 5_000_001, *range(6_000_000, 6_000_300), _BIG]
    views = [memoryview(body)[a:b] for a, b in pairwise(edges)]
    moves: list[int] = []

    async def scenario(transport: asyncio.Transport, theirs: socket.socket) -> None:
        before = descriptors()
        lent = lent_socket(transport)
        assert lent is not None
        sending = send(views, lent, transport, moves.append)
        _, received = await asyncio.gather(sending, _receive(theirs, _BIG))
        assert received == body
        lent.close()
        assert descriptors() == before
        # The transport has its socket back.
        transport.write(b"after")
        assert await _receive(theirs, 5) == b"after"

    run(scenario)
    assert len(moves) > 1
    assert sum(moves) == _BIG


def test_a_peer_that_is_gone_is_an_error(run: Callable[[Scenario], None]) -> None:
    async def scenario(transport: asyncio.Transport, theirs: socket.socket) -> None:
        lent = lent_socket(transport)
        assert lent is not None
        sending = asyncio.create_task(
            send([memoryview(bytes(_BIG))], lent, transport, lambda _: theirs.close())
        )
        with pytest.raises(OSError, match=r"Broken pipe|reset|closed"):
            await sending
        lent.close()

    run(scenario)


def test_a_transport_that_closes_ends_it(run: Callable[[Scenario], None]) -> None:
    async def scenario(transport: asyncio.Transport, theirs: socket.socket) -> None:
        lent = lent_socket(transport)
        assert lent is not None
        transport.abort()
        with pytest.raises(ConnectionResetError):
            await send([memoryview(b"body")], lent, transport, _nothing)
        lent.close()

    run(scenario)


def test_a_cancelled_send_lets_go_of_the_memory(run: Callable[[Scenario], None]) -> None:
    body = bytearray(_BIG)

    async def scenario(transport: asyncio.Transport, theirs: socket.socket) -> None:
        lent = lent_socket(transport)
        assert lent is not None
        moved = asyncio.Event()
        view = memoryview(body)
        sending = asyncio.create_task(send([view], lent, transport, lambda _: moved.set()))
        await moved.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        lent.close()
        del sending
        view.release()

    run(scenario)
    body.clear()  # which raises while there is a view


def test_what_has_no_socket_lends_none() -> None:
    assert lent_socket(asyncio.Transport()) is None
    secured = asyncio.Transport(extra={"ssl_object": object(), "socket": object()})
    assert lent_socket(secured) is None


@given(st.lists(st.integers(1, 400_000), max_size=100))
def test_a_burst_is_bounded(sizes: list[int]) -> None:
    views = [memoryview(bytes(size)) for size in sizes]
    burst = _burst(views)
    assert sum(view.nbytes for view in burst) == min(sum(sizes[:64]), 512 << 10)
    assert len(burst) <= 64
