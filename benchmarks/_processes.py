"""Workers as the driver sees them: processes that are asked for measurements in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

_ROOT = Path(__file__).parents[1]
_ANSWER_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 10.0


class WorkerError(Exception):
    """A worker could not do what it was asked for, or did not answer."""


class WorkerProcess:
    """One worker. What is sent is answered in order, so that several can prepare at once."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._worker"],
            cwd=_ROOT,
            env=_clean_environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, do: str, **arguments: Any) -> None:
        """Ask for something.

        Raises:
            WorkerError: the worker has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise WorkerError(f"the worker has ended before {do}") from exc

    def receive(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            WorkerError: the worker answers with an error, or not in time: then it is killed.
        """
        assert self._process.stdout is not None
        timer = Timer(_ANSWER_TIMEOUT_S, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"no answer; the worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask for something and return the answer.

        Raises:
            WorkerError: as `send` and `receive`.
        """
        self.send(do, **arguments)
        return self.receive()

    def stop(self) -> None:
        """End the worker and wait for it."""
        with suppress(BrokenPipeError), self._process as process:
            try:
                process.communicate(timeout=_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _clean_environ() -> dict[str, str]:
    """Return the environment without what would send a client elsewhere than to our server."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AWS_") and not name.upper().endswith("_PROXY")
    }
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return environ | nowhere
