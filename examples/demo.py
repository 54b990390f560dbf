"""Kill a training run on 4 ranks and resume it on 2, against an embedded S3: `make demo`.

Trains with `train_fsdp2.py`, kills every process of the run some steps after a checkpoint,
resumes from the newest one, and fails unless

- the parameters and the optimizer state that 2 ranks loaded are, bit for bit, those that
  4 ranks saved (SHA-256 over the gathered state),
- the loss goes on where it stopped, at every step that both runs trained,
- the bucket holds the objects that the saves reported, each rank's under a prefix of its own.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from s3dcp import S3ClientConfig, S3FileSystem
from s3dcp.testing import LocalS3

BUCKET = "s3dcp-demo"
URI = f"s3://{BUCKET}/gpt"
SAVE_EVERY = 5
KILL_AT = 13  # between two saves, and some steps after one: both runs train steps 11 to 13
LAST_STEP = 20
RUN_LIMIT_S = 120.0
# Sums of 4 ranks and of 2 round differently; a wrong batch or state is off by far more.
LOSS_TOLERANCE = 1e-3

Event = dict[str, Any]


class DemoError(Exception):
    """Something that the demo promises did not hold."""


class TrainingRun:
    """One torchrun process; iterating waits for the events that its rank 0 prints.

    Nothing of it outlives the `with` block, and it ends after `RUN_LIMIT_S` at the latest.
    """

    def __init__(self, ranks: int, *arguments: str, environ: dict[str, str]) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = Path(__file__).with_name("train_fsdp2.py")
        self.events: list[Event] = []
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            [*torchrun, f"--nproc-per-node={ranks}", str(script), "--uri", URI, *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,
        )
        self._output = cast("IO[str]", self._process.stdout)
        self._watchdog = threading.Timer(RUN_LIMIT_S, self.kill)
        self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watchdog.cancel()
        self.kill()
        self._output.close()
        self._stderr.close()

    def __iter__(self) -> Iterator[Event]:
        for line in self._output:
            if line.startswith("{"):
                self.events.append(json.loads(line))
                yield self.events[-1]

    def of(self, kind: str) -> dict[int, Event]:
        """Return the events of one kind so far, by step."""
        return {event["step"]: event for event in self.events if event["event"] == kind}

    def finish(self) -> None:
        """Wait for the end of the run.

        Raises:
            DemoError: it failed or took too long.
        """
        for _ in self:
            pass
        if status := self._process.wait(timeout=RUN_LIMIT_S):
            self._stderr.seek(0)  # the first of its errors is the cause, the rest is fallout
            raise DemoError(
                f"torchrun, given {RUN_LIMIT_S:.0f} s, ended with status {status}:\n"
                f"{self._stderr.read(8000)}"
            )

    def kill(self) -> None:
        """Send SIGKILL to torchrun and to all ranks, if they still run."""
        if self._process.poll() is not None:
            return
        pids = [pid for event in self.events if event["event"] == "start" for pid in event["pids"]]
        if not pids:  # each rank has a session of its own, and only torchrun knows them yet
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10.0)
        for pid in (self._process.pid, *pids):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.wait(timeout=10.0)


def check(holds: bool, promise: str) -> None:
    """Print a promise that holds.

    Raises:
        DemoError: it does not.
    """
    if not holds:
        raise DemoError(f"this does not hold: {promise}")
    print(f"  ok: {promise}", flush=True)


def train_and_kill(environ: dict[str, str]) -> TrainingRun:
    """Train on 4 ranks until `KILL_AT`, then kill them all; return what they reported."""
    print(f"4 ranks: a checkpoint every {SAVE_EVERY} steps")
    arguments = ("--steps", str(LAST_STEP), "--save-every", str(SAVE_EVERY))
    with TrainingRun(4, *arguments, environ=environ) as run:
        for event in run:
            if event["event"] == "step" and event["step"] == KILL_AT:
                run.kill()  # the loop goes on: the pipe ends when its last writer is gone
        if KILL_AT not in run.of("step"):
            run.finish()
    last = max(run.of("step"))
    print(f"  killed after step {last}, loss {run.of('step')[last]['loss']:.4f}")
    return run


def resume_and_compare(killed: TrainingRun, environ: dict[str, str]) -> TrainingRun:
    """Resume on 2 ranks, train to the end, compare with the run that was killed."""
    print("2 ranks: resume")
    arguments = ("--steps", str(LAST_STEP), "--save-every", str(SAVE_EVERY), "--resume")
    with TrainingRun(2, *arguments, environ=environ) as run:
        run.finish()
    saved, resumed = killed.of("save"), run.of("resume")
    newest = max(saved)
    check(list(resumed) == [newest], f"the newest complete checkpoint, step {newest}, was loaded")
    sha256 = saved[newest]["sha256"]
    check(
        resumed[newest]["sha256"] == sha256,
        f"parameters and optimizer state are bit-identical (sha256 {sha256[:16]}...)",
    )
    before, after = ({s: e["loss"] for s, e in r.of("step").items()} for r in (killed, run))
    shared = sorted(before.keys() & after.keys())
    apart = max((abs(before[step] - after[step]) for step in shared), default=math.inf)
    check(
        min(after, default=None) == newest + 1 and apart <= LOSS_TOLERANCE,
        f"the loss goes on: steps {shared} of both runs differ by {apart:.1e} at most",
    )
    final = max(after)
    check(final == LAST_STEP, f"training ends at step {final}, loss {after[final]:.4f}")
    return run


def objects_by_prefix(fs: S3FileSystem, uri: str) -> dict[str, int]:
    """Return how many data objects a checkpoint has under each of its key prefixes."""
    folders = [entry.rstrip("/") for entry in fs.ls(uri) if not entry.endswith("/.metadata")]
    return {folder.rpartition("/")[2]: len(fs.ls(folder)) for folder in folders}


def demo() -> None:
    """Run the whole story.

    Raises:
        DemoError: some part of it did not come true.
    """
    began = time.monotonic()
    with LocalS3() as server, tempfile.TemporaryDirectory(prefix="s3dcp-demo-") as scratch:
        server.create_bucket(BUCKET)
        # None of the user's own AWS settings, and no proxy: all is on this machine.
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(server.environ())
        os.environ.update(AWS_REGION=server.region, no_proxy="*")
        os.environ.update(OMP_NUM_THREADS="1", TMPDIR=scratch)  # torchrun leaves folders behind
        print(f"embedded S3 at {server.endpoint_url}, checkpoints under {URI}")
        killed = train_and_kill(dict(os.environ))
        resumed = resume_and_compare(killed, dict(os.environ))

        fs = S3FileSystem(server.region, s3client_config=S3ClientConfig(force_path_style=True))
        print("\nstep  ranks        bytes  seconds   GiB/s  objects  key prefixes")
        for ranks, run in ((4, killed), (2, resumed)):
            for step, event in run.of("save").items():
                found = objects_by_prefix(fs, f"{URI}/step-{step}")
                print(
                    f"{step:4}  {ranks:5}  {event['bytes']:11,}  {event['seconds']:7.3f}"
                    f"  {event['gib_per_s']:6.3f}  {event['objects']:7}  {' '.join(sorted(found))}"
                )
                if len(found) != ranks or sum(found.values()) + 1 != event["objects"]:
                    raise DemoError(f"step {step}: the bucket holds {found} besides .metadata")
    print(f"\nall of it held, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        demo()
    except DemoError as error:
        sys.exit(f"the demo failed: {error}")
