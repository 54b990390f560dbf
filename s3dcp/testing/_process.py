"""A server in a process of its own, which does not outlive the one that started it.

On POSIX the server runs under a shell that waits for a line or the end of its standard input,
and then terminates the server. The kernel closes that pipe when the parent dies, however it dies,
so one mechanism serves `stop` and a killed parent. The alternatives each have a hole: `atexit`
misses SIGKILL, and PR_SET_PDEATHSIG is Linux only, fires when the *thread* that started the
server ends, and needs a `preexec_fn`, which Python 3.12 warns about in a process with threads.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping, Sequence
    from types import TracebackType

# The pipe is moved to descriptor 3, as a shell gives background commands no standard input.
# The server must not hold it, and nothing may be left for init to reap.
_SUPERVISED = """
exec 3<&0 </dev/null
"$@" 3<&- & server=$!
{ read -r _ <&3; kill "$server"; } & watcher=$!
exec 3<&-
wait "$server"; status=$?
kill "$watcher" 2>/dev/null; wait "$watcher"
exit "$status"
"""
_TICK_S = 0.01
_STOP_TIMEOUT_S = 3.0  # a server may wait for its clients, which need not be honoured for long
_TAIL_CHARACTERS = 2000


class LocalServerError(RuntimeError):
    """A local server is not installed, did not start, or refused what was asked of it."""


class ServerProcess:
    """A child process that says on its output which port it chose.

    Not restartable. `stop` may be called at any time, and any number of times.

    Args:
        name: What error messages call the server.
        argv: The program and its arguments.
        listening: Found in what the program writes once it listens; group 1 is the port.
        env: The program's environment.
        start_timeout_s: How long the program may take to listen.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        listening: re.Pattern[str],
        env: Mapping[str, str],
        start_timeout_s: float,
    ) -> None:
        self._name = name
        self._listening = listening
        self._folder = TemporaryDirectory(prefix="s3dcp-server-")
        self._log = Path(self._folder.name) / "log"
        self._owner_pid = os.getpid()
        self._stopped = False
        atexit.register(self.stop)
        try:
            self._process = self._spawn([str(arg) for arg in argv], env)
        except BaseException:
            self._forget()
            raise
        try:
            self.port = self._await_port(start_timeout_s)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    def log_tail(self) -> str:
        """The end of what the server wrote; empty once it was stopped."""
        with suppress(FileNotFoundError):
            return self._log.read_text("utf-8", "replace")[-_TAIL_CHARACTERS:].strip()
        return ""

    def stop(self) -> None:
        """End the process and wait for it; remove its log."""
        # A fork of the owner runs its exit handlers too: the server is not the fork's to end.
        if self._stopped or os.getpid() != self._owner_pid:
            return
        if sys.platform == "win32":
            self._process.terminate()
        self._end()
        self._forget()

    def _spawn(self, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        supervised = sys.platform != "win32"
        with self._log.open("wb") as log:
            return subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISED, "sh", *argv] if supervised else argv,
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the parent: what it does on the way out may need the server.
                start_new_session=supervised,
            )

    def _await_port(self, timeout_s: float) -> int:
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = self._listening.search(self._log.read_text("utf-8", "replace"))
            if found:
                return int(found[1])
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_TICK_S)
                raise self._failure(f"ended with status {self._process.returncode}")
            if time.monotonic() > deadline_s:
                raise self._failure(f"did not listen within {timeout_s:g} s")

    def _failure(self, what: str) -> LocalServerError:
        return LocalServerError(f"{self._name} {what}; it wrote:\n{self.log_tail() or '(nothing)'}")

    def _end(self) -> None:
        # A line, not only the end of the pipe: a fork of this process may hold it open.
        try:
            self._process.communicate(b"\n", timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()

    def _kill(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
        else:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _forget(self) -> None:
        self._stopped = True
        atexit.unregister(self.stop)
        self._folder.cleanup()
