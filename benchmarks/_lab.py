"""The driver's instruments: servers, clients at them, and measurements that take turns."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

from benchmarks import _certificates
from benchmarks._processes import WorkerError, WorkerProcess
from benchmarks._sizes import Sizes
from benchmarks._values import BACKENDS, BUCKET, DISCARDED, OURS, PLANNING, SLOWEST, Sample, Shape
from s3dcp.testing import FakeS3, FakeS3Process

_RAM = Path("/dev/shm")  # noqa: S108 - memory is the point

Samples = dict[str, list[Sample]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A FakeS3 in a process of its own, and what clients have to know of it."""

    process: FakeS3Process
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One backend in a worker, at one server, with one state dict; named as it was wanted."""

    name: str
    backend: str
    shape: Shape | None
    worker: WorkerProcess
    server: Server

    def save(self, name: str, *, keep: bool = False) -> Sample:
        """Save the state dict; unless it is kept, the server drops it on arrival."""
        return self.sample("save", shape=self._shape(), name=name, keep=keep)

    def load(self, name: str, *, tenth: bool = False, verify: bool = False) -> Sample:
        """Load a kept state dict, or every tenth tensor of it."""
        return self.sample("load", shape=self._shape(), name=name, tenth=tenth, verify=verify)

    def disturb(self, name: str) -> dict[str, Any]:
        """Save on a thread, and return how late a ticker in the main thread was."""
        return self.ask("disturb", shape=self._shape(), name=name)

    def block(self, name: str, *, loads: bool) -> dict[str, Any]:
        """Return how long s3dcp's loop thread was blocked at most."""
        return self.ask("block", shape=self._shape(), name=name, loads=loads)

    def sample(self, do: str, **arguments: Any) -> Sample:
        """Measure one save or load, with the server's counts."""
        before = self.server.process.stats()
        answer = self.ask(do, **arguments)
        after = self.server.process.stats()
        return Sample(
            **answer,
            received_bytes=after["bytes_out"] - before["bytes_out"],
            requests=after["requests"] - before["requests"],
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask the worker for something."""
        return self.worker.ask(do, backend=self.backend, **arguments)

    def _shape(self) -> list[int]:
        assert self.shape is not None
        return [self.shape.count, self.shape.nbytes]


def alike(backends: list[str], shape: Shape | None) -> dict[str, tuple[str, Shape | None]]:
    """Return what to want of `Lab.clients`: these backends, with one state dict."""
    return {backend: (backend, shape) for backend in backends}


class Lab:
    """Starts what a run needs, and ends it.

    Args:
        sizes: How much is run.
        folder: For certificates.
        shared: Whether all backends share one worker, which takes a tenth of the time to start
            and measures nothing that is worth printing.
        say: Told of the progress.
    """

    def __init__(
        self, sizes: Sizes, folder: Path, *, shared: bool, say: Callable[[str], None]
    ) -> None:
        self.sizes = sizes
        self.say = say
        self.notes: list[str] = []
        self._certificates = _certificates.make(folder)
        self._worker = WorkerProcess() if shared else None
        self._ram_disk = mkdtemp(prefix="s3dcp-bench-", dir=_RAM if _RAM.is_dir() else folder)

    def close(self) -> None:
        """End what is shared."""
        if self._worker is not None:
            self._worker.stop()
        shutil.rmtree(self._ram_disk, ignore_errors=True)

    def take_notes(self) -> list[str]:
        """Return what could not be run since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def repeats(self, backend: str) -> int:
        """Return how often a backend is measured."""
        sizes = self.sizes
        return min(sizes.repeat, sizes.repeat_slowest) if backend == SLOWEST else sizes.repeat

    def slowest_once(self, backend: str) -> int:
        """Return the same for rows in which s3fs takes minutes."""
        return 1 if backend == SLOWEST else self.sizes.repeat

    @contextmanager
    def server(self, *, tls: bool = False, slow: bool = False) -> Iterator[Server]:
        """Start a server. What it holds goes with it.

        Args:
            tls: Whether it speaks TLS.
            slow: Whether it is at the far end of the slow link.
        """
        certificates = self._certificates if tls else None
        options: dict[str, Any] = certificates.server_options() if certificates else {}
        if slow:
            options |= {
                "latency_s": self.sizes.latency_s,
                "bytes_per_s": self.sizes.bytes_per_s,
            }
        trust = certificates.client_environ() if certificates else {}
        with FakeS3.process(anonymous=True, discard=f"{DISCARDED}/", **options) as process:
            process.create_bucket(BUCKET)
            environ = {**process.environ(), **trust, "BENCH_RAM_DISK": self._ram_disk}
            yield Server(process=process, environ=environ)
        for left in Path(self._ram_disk).iterdir():
            shutil.rmtree(left)

    @contextmanager
    def clients(
        self,
        server: Server,
        wanted: Mapping[str, tuple[str, Shape | None]],
        *,
        device: str = "cpu",
    ) -> Iterator[dict[str, Client]]:
        """Start workers and have all prepare at once; peers that fail are left out.

        Args:
            server: Where they save to and load from.
            wanted: By any name, a backend and the state dict that its worker is to make.
            device: Where the tensors are.
        """
        with ExitStack() as stack:
            clients = {}
            for name, (backend, shape) in wanted.items():
                worker = self._worker or WorkerProcess()
                if worker is not self._worker:
                    stack.callback(worker.stop)
                clients[name] = Client(
                    name=name, backend=backend, shape=shape, worker=worker, server=server
                )
                environ, quick = dict(server.environ), self._worker is not None
                worker.send("enter", environ=environ, device=device, quick=quick)
                made = [shape.count, shape.nbytes] if shape else None
                worker.send("prepare", backend=backend, shape=made)
            for name, client in list(clients.items()):
                client.worker.receive()
                with self._spared(clients, name):
                    client.worker.receive()
            yield clients

    def in_turns(
        self,
        clients: dict[str, Client],
        measure: Callable[[Client, int], T],
        repeats: Callable[[str], int] | None = None,
    ) -> dict[str, list[T]]:
        """Measure every client again and again, in turns, so that all see the same machine.

        Args:
            clients: Peers that fail are removed, with a note.
            measure: Called with a client and the repetition's number.
            repeats: How often each backend; as `Lab.repeats` by default.
        """
        repeats = repeats or self.repeats
        samples: dict[str, list[T]] = {}
        most = max((repeats(client.backend) for client in clients.values()), default=0)
        for number in range(most):
            # So that none is always the one after the slowest.
            names = list(clients)
            start = number % max(len(names), 1)
            for name in names[start:] + names[:start]:
                client = clients[name]
                if number < repeats(client.backend):
                    with self._spared(clients, name):
                        samples.setdefault(name, []).append(measure(client, number))
        return {name: samples[name] for name in clients}

    def keep(self, clients: dict[str, Client]) -> None:
        """Have every client save a state dict under its own name, to be loaded."""
        for name, client in list(clients.items()):
            with self._spared(clients, name):
                client.save(name, keep=True)

    def save_and_load(
        self, clients: dict[str, Client], repeats: Callable[[str], int] | None = None
    ) -> tuple[Samples, Samples]:
        """Measure saves and loads in turns; each backend's first load is verified."""

        def save(client: Client, number: int) -> Sample:
            return client.save(f"{client.name}-{number}")

        def load(client: Client, number: int) -> Sample:
            return client.load(client.name, verify=number == 0 and client.backend != PLANNING)

        saves = self.in_turns(clients, save, repeats)
        self.keep(clients)
        return saves, self.in_turns(clients, load, repeats)

    @contextmanager
    def _spared(self, clients: dict[str, Client], name: str) -> Iterator[None]:
        """Go on without a peer that fails: only s3dcp has to work for there to be a result."""
        try:
            yield
        except WorkerError as exc:
            backend = clients[name].backend
            if backend == OURS:
                raise
            del clients[name]
            reason = str(exc).strip().splitlines()[-1]
            self.say(f"  {backend} failed:\n{exc}")
            self.notes.append(f"{BACKENDS[backend]} is left out, it failed: {reason}")
