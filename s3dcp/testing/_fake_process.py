"""FakeS3 in a process of its own, which ends with the one that started it."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from types import TracebackType
from typing import Any, Self

from s3dcp.testing._process import LocalServerError

# `python -m s3dcp.testing` is this, but imports s3dcp first and with it torch: seconds and
# hundreds of megabytes for what needs neither.
_PROGRAM = """
import runpy, sys, types
package = types.ModuleType("s3dcp")
package.__path__ = [sys.argv.pop(1)]
sys.modules["s3dcp"] = package
runpy.run_module("s3dcp.testing", run_name="__main__", alter_sys=True)
"""
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 3.0


class FakeS3Process:
    """A `FakeS3` in a process of its own, as a context manager; it has no rules and no records.

    Args:
        options: Those of `FakeS3.process`.

    Raises:
        LocalServerError: By `start`: the process did not come up.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self._said: dict[str, Any] = {}
        self._owner_pid = os.getpid()
        self._talking = Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        """Where the server listens."""
        return str(self._told("endpoint_url"))

    @property
    def access_key(self) -> str:
        """The only one that the server accepts."""
        return str(self._told("access_key"))

    @property
    def secret_key(self) -> str:
        """The key to sign with."""
        return str(self._told("secret_key"))

    @property
    def region(self) -> str:
        """The region to sign for."""
        return str(self._told("region"))

    @property
    def pid(self) -> int:
        """The server's process."""
        return int(self._told("pid"))

    def start(self) -> None:
        """Start the process and return when it listens."""
        if self._process is not None:
            raise LocalServerError("FakeS3 is running already")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _PROGRAM,
                str(Path(__file__).parent.parent),
                *_arguments(self._options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the parent: what it does on the way out may need the server.
            start_new_session=sys.platform != "win32",
        )
        atexit.register(self.stop)
        timer = Timer(_START_TIMEOUT_S, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._said = self._hear()
        except BaseException:
            self.stop()
            raise
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process and wait for it; nothing if it is not running."""
        # A fork of the owner runs its exit handlers too: the server is not the fork's to end.
        if self._process is None or os.getpid() != self._owner_pid:
            return
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        # A line, not only the end of the pipe: a fork of this process may hold it open.
        with suppress(BrokenPipeError), process:
            try:
                process.communicate("stop\n", timeout=_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def environ(self) -> dict[str, str]:
        """What a child process needs in its environment to find this server and sign for it."""
        environ: dict[str, str] = self._told("environ")
        return dict(environ)

    def create_bucket(self, name: str) -> None:
        """Make a bucket; nothing if it exists.

        Raises:
            LocalServerError: S3 does not allow the name.
        """
        if refused := self._ask(f"create_bucket {name}").get("error"):
            raise LocalServerError(str(refused))

    def stats(self) -> dict[str, int]:
        """Count requests, each operation, connections, and bodies' bytes in and out."""
        return self._ask("stats")

    def violations(self) -> list[str]:
        """What clients did that no client should."""
        found: list[str] = self._ask("violations")["violations"]
        return found

    def _told(self, name: str) -> Any:
        if self._process is None:
            raise LocalServerError("FakeS3 is not running: use `with FakeS3.process() as server`")
        return self._said[name]

    def _ask(self, line: str) -> dict[str, Any]:
        with self._talking:
            self._told("pid")
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise LocalServerError("FakeS3 has ended") from None
            return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LocalServerError(f"FakeS3 ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def _arguments(options: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif value is not None:
            arguments += [flag, str(value)]
    return arguments
