"""The floor: threads that hand tensors' memory to the kernel, and no client at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

from benchmarks._states import State, memory

_CONNECTIONS = 8
_HEAD_BYTES = 4096

Job = tuple[str, memoryview]


def put(state: State, prefix: str) -> None:
    """Put every tensor as an object `{prefix}/{number}`."""
    _spread(_put_one, _jobs(state, prefix))


def get(state: State, prefix: str) -> None:
    """Get what `put` has put into the tensors."""
    _spread(_get_one, _jobs(state, prefix))


def _jobs(state: State, prefix: str) -> list[Job]:
    return [(f"{prefix}/{number}", memory(each)) for number, each in enumerate(state.values())]


def _spread(work: Callable[[socket.socket, str, memoryview], None], jobs: Iterable[Job]) -> None:
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    waiting: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def run() -> None:
        with socket.create_connection((address.hostname or "", address.port or 80)) as connection:
            while True:
                try:
                    path, view = waiting.get_nowait()
                except Empty:
                    return
                work(connection, path, view)

    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        for each in [threads.submit(run) for _ in range(_CONNECTIONS)]:
            each.result()


def _put_one(connection: socket.socket, path: str, view: memoryview) -> None:
    head = f"PUT {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(view)}\r\n\r\n"
    connection.sendall(head.encode())
    connection.sendall(view)
    _answer(connection)


def _get_one(connection: socket.socket, path: str, view: memoryview) -> None:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    first = _answer(connection)
    at = len(first)
    view[:at] = first
    while at < len(view):
        count = connection.recv_into(view[at:])
        if not count:
            raise ConnectionError(f"{path} ended after {at} of {len(view)} bytes")
        at += count


def _answer(connection: socket.socket) -> bytes:
    """Read an answer's head, and return what came of its body meanwhile."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (chunk := connection.recv(_HEAD_BYTES)):
            raise ConnectionError("the server closed the connection")
        received += chunk
    head, _, rest = received.partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1] != b"200":
        raise ConnectionError(f"the server refused: {received[:500]!r}")
    return rest
