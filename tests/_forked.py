"""Processes of their own at the price of a fork.

A script that imports torch and the S3 stack takes seconds to start. The zygote has imported them,
has no portal and no thread, and forks for each test a child that runs one module-level function.
The child is a process like any other: it takes signals, and ends as the interpreter ends. Where
that is not what a test is about, multiprocessing's fork server does, which has made a save, too.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

_LIMIT_S = 100.0
_GO = signal.SIGUSR1
# Of torch, and of Python 3.12 for a fork beside threads, which some children are about.
_EXPECTED = ["torch.distributed is :UserWarning", "This process :DeprecationWarning"]
_WARNINGS = ["-W", "error", *(part for text in _EXPECTED for part in ("-W", f"ignore:{text}"))]
_PRELOADED = [
    *("pytest", "numpy", "uvloop", "s3dcp._client", "s3dcp.testing", "tests._states"),
    "tests._commands",
]


def fork_server() -> ForkServerContext:
    """Return what starts multiprocessing's processes; `tests._zygote` is what they begin with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests._zygote"])
    return context


class Child:
    """A process that the zygote has forked.

    Attributes:
        pid: Of the process.
    """

    def __init__(self, zygote: Zygote, pid: int, output: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._output = output
        self._read = b""

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def go(self) -> None:
        """Let `await_go` return there."""
        self.signal(_GO)

    def read_line(self) -> str:
        """Return the next line that it writes."""
        while b"\n" not in self._read:
            assert self._receive(), f"ended after writing {self._read.decode()}"
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def end(self) -> tuple[int, str]:
        """Wait for its end, and that of all that it forked; return the exit code and the rest."""
        while self._receive():
            pass
        os.close(self._output)
        return self._zygote.exit_code(self.pid), self._read.decode()

    def _receive(self) -> bool:
        deadline_s = time.monotonic() + _LIMIT_S
        if not select.select([self._output], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"hung after writing {self._read.decode()}")
        data = os.read(self._output, 1 << 16)
        self._read += data
        return bool(data)


class Zygote:
    """The process that forks; a context manager."""

    def __enter__(self) -> Self:
        self._running: set[int] = set()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *_WARNINGS, "-m", "tests._forked", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[1],
                # OpenMP's threads do not survive a fork, and hang who counts on them.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self._socket.close()
        self._process.wait(_LIMIT_S)

    def start(self, function: Callable[..., object], *args: Any, **environ: str) -> Child:
        """Run a function, whose module is imported there, in a new process.

        Args:
            function: Its name is what is sent.
            args: For it.
            environ: Added to the environment of this process.
        """
        reading, writing = os.pipe()
        message = pickle.dumps(
            (function.__module__, function.__qualname__, args, {**os.environ, **environ})
        )
        socket.send_fds(self._socket, [message], [writing])
        os.close(writing)
        pid = int(self._socket.recv(64))
        self._running.add(pid)
        return Child(self, pid, reading)

    def exit_code(self, pid: int) -> int:
        """Return what a process that has closed its output ends with."""
        self._running.discard(pid)
        self._socket.send(pickle.dumps(pid))
        return int(self._socket.recv(64))


def say(line: str) -> None:
    """Write a line, in a child."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def await_go() -> None:
    """Wait, in a child, until the test lets it go on."""
    signal.sigwait([_GO])


def _serve(asked: socket.socket) -> None:
    """Fork children until the other end of the socket closes; return in each of them."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 1)
        if not message:
            return
        command = pickle.loads(message)
        if isinstance(command, int):
            status = os.waitpid(command, 0)[1]
            asked.send(b"%d" % os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if not pid:
            asked.close()
            for standard in (1, 2):
                os.dup2(descriptors[0], standard)
            os.close(descriptors[0])
            _run(*command)
            return
        os.close(descriptors[0])
        asked.send(b"%d" % pid)


def _run(module: str, name: str, args: tuple[Any, ...], environ: dict[str, str]) -> None:
    faulthandler.dump_traceback_later(_LIMIT_S - 5, exit=True)
    os.environ.clear()
    os.environ.update(environ, OMP_NUM_THREADS="1")
    getattr(import_module(module), name)(*args)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [_GO])  # of every thread to come
    for preloaded in _PRELOADED:
        import_module(preloaded)
    botocore = import_module("s3dcp._botocore")
    botocore._preload(botocore._loader(None))  # its models
    with closing(socket.socket(fileno=int(sys.argv[1]))) as theirs:
        _serve(theirs)
