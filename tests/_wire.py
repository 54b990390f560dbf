"""HTTP by hand, to see exactly what a server sends and to send what no client would."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_TIMEOUT_S = 60.0


def request(method: str, target: str, body: bytes | None = b"", **headers: str) -> bytes:
    """A request's bytes; without Content-Length if `body` is None.

    Headers are keyword arguments: `_` stands for `-`.
    """
    named = {"Host": "127.0.0.1"}
    if body is not None and (body or method in {"PUT", "POST"}):
        named["Content-Length"] = str(len(body))
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {named[name]}" for name in named)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; headers by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """What S3's XML calls the error, if it is one."""
        found = re.search(rb"<Code>(\w+)</Code>", self.body)
        return found[1].decode() if found else ""


class Wire:
    """One connection."""

    def __init__(self, endpoint_url: str) -> None:
        url = urlsplit(endpoint_url)
        assert url.hostname is not None
        self._socket = socket.create_connection((url.hostname, url.port or 80), _TIMEOUT_S)
        self._data = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def fill(self, chunk: bytes, timeout_s: float) -> int:
        """Send until the peer takes no more for so long; returns how much it took."""
        self._socket.settimeout(timeout_s)
        taken = 0
        try:
            while True:
                taken += self._socket.send(chunk)
        except TimeoutError:
            return taken
        finally:
            self._socket.settimeout(_TIMEOUT_S)

    def finish(self) -> None:
        """Close this side only."""
        self._socket.shutdown(socket.SHUT_WR)

    def line(self) -> bytes:
        while b"\r\n" not in self._data:
            self._more()
        line, _, self._data = self._data.partition(b"\r\n")
        return line

    def take(self, size: int) -> bytes:
        while len(self._data) < size:
            self._more()
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def answer(self, *, of_head: bool = False) -> Answer:
        """The next answer, whose body is as long as its head says."""
        _, status, _ = self.line().split(b" ", 2)
        headers = {}
        while line := self.line().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        size = 0 if of_head else int(headers.get("content-length", "0"))
        return Answer(int(status), headers, self.take(size))

    def pending(self) -> bytes:
        """What has come already, without waiting."""
        self._socket.setblocking(False)
        try:
            self._data += self._socket.recv(1 << 16)
        except BlockingIOError:
            pass
        finally:
            self._socket.settimeout(_TIMEOUT_S)
        return self._data

    def rest(self) -> tuple[bytes, str]:
        """All that comes until the connection ends, and how it does: "closed" or "reset"."""
        try:
            while chunk := self._socket.recv(1 << 16):
                self._data += chunk
        except ConnectionResetError:
            ended = "reset"
        else:
            ended = "closed"
        data, self._data = self._data, b""
        return data, ended

    def _more(self) -> None:
        chunk = self._socket.recv(1 << 20)
        if not chunk:
            raise EOFError(f"the connection ended after {self._data!r}")
        self._data += chunk
