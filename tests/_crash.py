"""Saves in processes that are killed with SIGKILL at one of their requests.

What kills depends on the server. FakeS3 does it itself, when the request's head is there, when half
of its body is, or when it has taken effect; the bytes that the dead process has sent beyond that
are lost. rclone cannot be told to, so there the process ends itself: before it sends the request,
having sent half of the body, or once the answer is there.

Processes are forked from the fork server, which has made a save before, and report
each request over a pipe just before they send it.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from itertools import count
from multiprocessing.connection import wait
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, Protocol
from unittest import mock
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from aiobotocore.session import AioSession

from s3dcp import S3ClientConfig, S3StorageWriter, _botocore, _publish
from s3dcp.testing import Record
from tests._forked import fork_server
from tests._states import KiB, MiB, StateDict, fill

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

#: When a request is struck. The middle is that of its body.
Moment = Literal["before", "middle", "after"]

_TIMEOUT_S = 60.0
_PART_BYTES = 5 * MiB
_LARGE_WORDS = (8 * MiB + 64 * KiB) // 8  # of 64 bits: two parts; 8 MiB would be a single PUT
_numbers = count()


@dataclass(frozen=True, slots=True)
class Kill:
    """Which request of a process is its last.

    Args:
        moment: When in that request.
        number: Which one, from 0; in the middle, of those that have a body.
    """

    moment: Moment
    number: int


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as its process reported it."""

    operation: str
    key: str
    body_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A save.

    Args:
        uri: Where to.
        seed: What the state is made of.
        large: Whether one tensor takes a multipart upload.
        ranks: How many processes save together: one or two.
        connections: Of each process. With one, requests come one after the other.
    """

    uri: str
    seed: int
    large: bool = False
    ranks: int = 1
    connections: int = 1

    def state(self, rank: int | None = None) -> StateDict:
        """Return what a rank saves, or all of it."""
        first, last = _state(self.seed, self.large)
        if rank is None or self.ranks == 1:
            return first | last
        return last if rank else first

    def save(self, rank: int = 0) -> None:
        """Save a rank's part, in the process group if there is one."""
        settings = S3ClientConfig(
            max_connections=self.connections,
            part_size=_PART_BYTES,
            memory_budget_bytes=2 * _PART_BYTES,  # which keeps parts small
        )
        objects = 1 if self.large or self.ranks > 1 else 2
        writer = S3StorageWriter(None, self.uri, settings, thread_count=objects)
        dcp.save(self.state(rank), storage_writer=writer, no_dist=self.ranks == 1)


@lru_cache(maxsize=4)
def _state(seed: int, large: bool) -> tuple[StateDict, StateDict]:
    """Return what the first of two ranks saves, and the second."""
    first: StateDict = {"a": fill((40, 16), seed=seed), "step": seed}
    last: StateDict = {"b": fill((300,), torch.bfloat16, seed)}
    if large:
        last["large"] = torch.arange(_LARGE_WORDS) * (2 * seed + 1)
    return first, last


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process's part of a save ended.

    Attributes:
        killed: By SIGKILL.
        error: What it raised.
        sent: The requests that it sent, or was about to send.
    """

    killed: bool
    error: str | None
    sent: list[Sent]


class Target(Protocol):
    """A server, how a save to it is killed, and what is in its buckets."""

    def environ(self) -> dict[str, str]:
        """What a process needs in its environment to find the server."""

    def killing(self, process: Process, kill: Kill) -> Kill | None:
        """Arrange for a process to be killed; return what it has to see to itself."""

    def keys(self, bucket: str) -> set[str]:
        """Return the keys of all objects."""

    def read(self, bucket: str, key: str) -> bytes:
        """Return an object's bytes."""

    def uploads(self, bucket: str) -> list[str]:
        """Return the keys of the multipart uploads under way."""


@dataclass(slots=True, eq=False)
class Process:
    """One rank of a save."""

    job: Job
    rank: int = 0
    name: str = field(default_factory=lambda: f"crash-{next(_numbers)}")
    _process: ForkServerProcess | None = None
    _reports: Connection[Any, Any] | None = None
    _started: Event = field(default_factory=Event)

    def start(self, target: Target, kill: Kill | None, rendezvous: str | None = None) -> None:
        """Begin to save."""
        own = target.killing(self, kill) if kill else None
        context = fork_server()
        self._reports, theirs = context.Pipe(duplex=False)
        # The user agent names it, so that a server can tell whose requests it gets.
        environ = os.environ | target.environ() | {"AWS_SDK_UA_APP_ID": self.name}
        self._process = context.Process(
            target=_save, args=(self.job, self.rank, own, dict(environ), theirs, rendezvous)
        )
        self._process.start()
        theirs.close()
        self._started.set()

    def sent(self, record: Record) -> bool:
        """Return whether a request that a server got is of this process."""
        return f"app/{self.name}" in record.headers.get("user-agent", "").split()

    def kill(self) -> None:
        """End it, and wait until it is gone; from any thread."""
        assert self._started.wait(_TIMEOUT_S)
        assert self._process is not None
        assert self._process.pid is not None
        # Another thread may wait for the end, and close what it has waited with.
        sentinel = os.dup(self._process.sentinel)
        try:
            os.kill(self._process.pid, signal.SIGKILL)
            assert wait([sentinel], _TIMEOUT_S)
        finally:
            os.close(sentinel)

    def outcome(self) -> Outcome:
        """Wait for its end."""
        assert self._process is not None
        assert self._reports is not None
        if not wait([self._process.sentinel], _TIMEOUT_S):
            self.kill()
            raise AssertionError(f"{self.name} did not end")
        self._process.join()
        sent: list[Sent] = []
        error: str | None = None
        with suppress(EOFError), self._reports:
            while True:
                said = self._reports.recv()
                if isinstance(said, Sent):
                    sent.append(said)
                else:
                    error = said
        status = self._process.exitcode
        self._process.close()
        assert status in {0, -signal.SIGKILL}, f"{self.name} ended with {status}"
        return Outcome(status != 0, error, sent)


def run(target: Target, job: Job, kill: Kill | None = None, victim: int = 0) -> list[Outcome]:
    """Save in new processes, of which one may be killed, and return how each rank's part ended."""
    ranks = [Process(job, rank) for rank in range(job.ranks)]
    with TemporaryDirectory(prefix="s3dcp-crash-") as folder:
        for rank in ranks:
            mine = kill if rank.rank == victim else None
            rank.start(target, mine, f"file://{folder}/rendezvous" if job.ranks > 1 else None)
        return [rank.outcome() for rank in ranks]


# What the process does.


def _save(
    job: Job,
    rank: int,
    kill: Kill | None,
    environ: dict[str, str],
    reports: Connection[Any, Any],
    rendezvous: str | None,
) -> None:
    os.environ.clear()
    os.environ.update(environ)
    warnings.simplefilter("ignore")
    death = _Death(kill, reports)

    def session(**kwargs: Any) -> Any:
        made = AioSession(**kwargs)
        made.register("before-send.s3", death.before)
        made.register("after-call.s3", death.after)
        return made

    error = None
    try:
        if rendezvous is not None:
            dist.init_process_group(
                "gloo",
                init_method=rendezvous,
                rank=rank,
                world_size=job.ranks,
                timeout=timedelta(seconds=_TIMEOUT_S / 2),
            )
        with (
            mock.patch.object(_botocore, "AioSession", session),
            # A machine that is slow makes no request more.
            mock.patch.object(_publish, "_RECENT_S", math.inf),
        ):
            job.save(rank)
    except BaseException as exc:  # noqa: BLE001 - CheckpointException is one
        error = repr(exc)
    reports.send(error)


class _Death:
    """Reports what is about to be sent, and ends the process where it is told to."""

    def __init__(self, kill: Kill | None, reports: Connection[Any, Any]) -> None:
        self._kill = kill
        self._left = kill.number if kill else 0
        self._last = False
        self._reports = reports

    def before(self, request: Any, event_name: str, **_: object) -> None:
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        body_bytes = int(headers.get("content-length", "0"))
        key = unquote(urlsplit(request.url).path).split("/", 2)[2]
        self._reports.send(Sent(event_name.rpartition(".")[2], key, body_bytes))
        if self._kill is None or (self._kill.moment == "middle" and not body_bytes):
            return
        self._last = not self._left
        self._left -= 1
        if self._last and self._kill.moment == "middle":
            _send_half(request, headers)
        if self._last and self._kill.moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, **_: object) -> None:
        if self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def _send_half(request: Any, headers: dict[str, str]) -> None:
    """Send a request up to the middle of its body, and wait until the server gives it up."""
    url = urlsplit(request.url)
    assert url.hostname is not None
    body = request.body if isinstance(request.body, bytes) else b"".join(request.body._views)
    target = f"{url.path}?{url.query}" if url.query else url.path
    lines = [f"{request.method} {target} HTTP/1.1"]
    lines += [f"{name}: {text}" for name, text in ({"host": url.netloc} | headers).items()]
    with socket.create_connection((url.hostname, url.port or 80), _TIMEOUT_S) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body[: len(body) // 2])
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
