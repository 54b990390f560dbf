"""Functions on N gloo ranks, in processes that live on.

Ranks are forked from the fork server, which has imported torch. And a RankPool keeps its processes
and their process group, and sends them one module-level function after another: scenarios at 1, 2
and 4 ranks cost what they do. A pool whose ranks may be out of step (one raised, or did not come
back) is thrown away, and the next call starts another.

On the wire: the parent sends `(function, args, environ, timeout_s)`, a rank answers
`(result, None)` or `(None, traceback)`, all as plain pickles (multiprocessing's own pickling would
share tensors' memory, which ends with the process that made them). The end of the pipe is the end
of the rank, so that none outlives its pool.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from tests._forked import fork_server

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

P = ParamSpec("P")
T = TypeVar("T")

_START_TIMEOUT_S = 200.0
_GRACE_S = 2.0
_LEAVE_TIMEOUT_S = 10.0


class RanksFailedError(AssertionError):
    """A function raised on a rank, or did not come back from it.

    Attributes:
        tracebacks: By rank, the text of what was raised, or of where every thread stood when
            the time was up. Ranks that returned are not in it.
    """

    def __init__(self, tracebacks: dict[int, str]) -> None:
        super().__init__(tracebacks)
        self.tracebacks = tracebacks

    def __str__(self) -> str:
        return "\n".join(
            f"--- rank {rank} ---\n{text.strip()}" for rank, text in sorted(self.tracebacks.items())
        )


def run_ranks(
    world_size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Run a function on ranks of its own, which end with it; as `RankPool.run` otherwise."""
    with RankPool(world_size) as pool:
        return pool.run(function, *args, **kwargs)


class RankPool:
    """Processes that are the ranks of one gloo group, started by the first call.

    Args:
        world_size: How many.
        timeout_s: How long one call may take.
    """

    def __init__(self, world_size: int, *, timeout_s: float = 200.0) -> None:
        self.world_size = world_size
        self._timeout_s = timeout_s
        self._ranks: list[_Rank] = []
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call a module-level function on every rank, in the environment of this process.

        Returns:
            What it returned, by rank.

        Raises:
            RanksFailedError: It raised on a rank, or did not return in time. The other ranks get
                a few seconds to finish, then all are ended.
        """
        if not self._ranks:
            self._start()
        return self._call(function, args, kwargs, self._timeout_s)

    def close(self) -> None:
        """End the ranks, by force if they are busy."""
        for rank in self._ranks:
            rank.connection.close()
        for rank in self._ranks:
            rank.process.join(_LEAVE_TIMEOUT_S)
        self._discard()

    def _start(self) -> None:
        self._folder = TemporaryDirectory(prefix="s3dcp-ranks-")
        context = fork_server()
        for number in range(self.world_size):
            ours, theirs = context.Pipe()
            dump = Path(self._folder.name) / f"stacks-{number}"
            process = context.Process(target=_serve, args=(theirs, dump), name=f"rank-{number}")
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, dump))
        rendezvous = f"file://{self._folder.name}/rendezvous"
        self._call(_join, (rendezvous, self.world_size), {}, _START_TIMEOUT_S)

    def _call(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float,
    ) -> list[T]:
        for number, rank in enumerate(self._ranks):
            environ = _rank_environ(number, self.world_size)
            rank.send((function, args, kwargs, environ, timeout_s))
        results, tracebacks = self._gather(timeout_s)
        if tracebacks:
            self._discard()
            raise RanksFailedError(tracebacks)
        return [results[number] for number in range(self.world_size)]

    def _gather(self, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        tracebacks: dict[int, str] = {}
        # A rank ends itself in time. One that cannot is waited for a little longer.
        deadline_s = time.monotonic() + timeout_s + _LEAVE_TIMEOUT_S
        pending = {rank.connection: number for number, rank in enumerate(self._ranks)}
        while pending:
            ready = wait(list(pending), max(0.0, deadline_s - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                number = pending.pop(connection)  # type: ignore[call-overload]
                result, failure = self._ranks[number].receive()
                if failure is None:
                    results[number] = result
                else:
                    tracebacks[number] = failure
                    deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
        for number in pending.values():
            tracebacks[number] = "neither returned nor failed"
        return results, tracebacks

    def _discard(self) -> None:
        for rank in self._ranks:
            rank.connection.close()
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.process.close()
        self._ranks.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass(frozen=True, slots=True)
class _Rank:
    process: ForkServerProcess
    connection: Connection[bytes, bytes]
    dump: Path

    def send(self, message: object) -> None:
        # A rank that is gone is told by `receive`.
        with suppress(OSError):
            self.connection.send_bytes(pickle.dumps(message))

    def receive(self) -> tuple[Any, str | None]:
        try:
            answer: tuple[Any, str | None] = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join(_LEAVE_TIMEOUT_S)
            return (
                None,
                self.stacks() or f"the process ended with exit code {self.process.exitcode}",
            )
        return answer

    def stacks(self) -> str:
        with suppress(FileNotFoundError):
            if text := self.dump.read_text():
                return f"did not return in time:\n{text}"
        return ""


def _rank_environ(rank: int, world_size: int) -> dict[str, str]:
    """This process's environment, and what torchrun sets."""
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
    }


def _serve(connection: Connection[bytes, bytes], dump: Path) -> None:
    """A rank: answer calls until the pipe ends."""
    with dump.open("w") as stacks, suppress(EOFError, BrokenPipeError):
        while True:
            message = connection.recv_bytes()
            try:
                function, args, kwargs, environ, timeout_s = pickle.loads(message)
                os.environ.clear()
                os.environ.update(environ)
                # By a thread that needs no GIL. The parent finds it when the pipe ends.
                faulthandler.dump_traceback_later(timeout_s, file=stacks, exit=True)
                answer = pickle.dumps((function(*args, **kwargs), None))
            except BaseException:  # noqa: BLE001 - CheckpointException is one, and all go back
                answer = pickle.dumps((None, traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(answer)
    _leave()


def _join(rendezvous: str, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # the ranks share few cores, and the default is all of them
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=timedelta(seconds=300),
    )


def _leave() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
