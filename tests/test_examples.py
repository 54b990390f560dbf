"""The examples, run as a user runs them, against a real S3 server.

Every process of an example carries a mark in its environment, which its own children inherit. So
those that it leaves behind are found, whatever session they are in and whoever adopted them: that
fails the test, and they are killed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import secrets
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import s3dcp

if TYPE_CHECKING:
    from collections.abc import Iterator

_EXAMPLES = Path(__file__).parents[1] / "examples"
# The demo takes half a minute on two cores, and several times as long on busy ones.
_LIMIT_S = 400.0
_GRACE_S = 10.0

pytestmark = pytest.mark.timeout(2 * _LIMIT_S + 4 * _GRACE_S)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[_Runner]:
    """Runs programs to their end, and sees to it that nothing of them is left."""
    runner = _Runner(tmp_path)
    try:
        yield runner
        runner.wait_for_left()
        assert runner.left() == {}
    finally:
        runner.kill_left()


class _Runner:
    """Runs Python programs in a temporary folder, one thread to a process, no user's settings."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = f"S3DCP_EXAMPLE={secrets.token_hex(8)}"

    def __call__(self, *arguments: str) -> str:
        """Run the interpreter with these arguments and return what it printed."""
        with self.start(*arguments) as process:
            try:
                printed, _ = process.communicate(timeout=_LIMIT_S)
            except BaseException as error:  # an interrupt too: the `with` waits for the end
                self._stop(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                pytest.fail(f"{arguments} took over {_LIMIT_S:.0f} s:\n{self.logged()[-8000:]}")
        assert process.returncode == 0, f"{printed[-2000:]}\n{self.logged()[-8000:]}"
        return printed

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the interpreter with these arguments."""
        name, _, value = self._mark.partition("=")
        environ = os.environ | {
            name: value,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._folder),  # torchrun leaves folders behind
        }
        with (self._folder / "stderr").open("w") as stderr:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._folder,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def logged(self) -> str:
        """Return what the last program has written to its stderr so far."""
        return (self._folder / "stderr").read_text()

    def torchrun(self, ranks: int, *arguments: str) -> list[dict[str, Any]]:
        """Run a script on so many ranks and return the events that it printed as JSON lines."""
        printed = self(
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments
        )
        return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]

    def left(self) -> dict[int, str]:
        """Return the command lines of processes that still run, by id. Knows of Linux's only."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is not ours
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = b" ".join(words).decode(errors="replace")
        return found

    def wait_for_left(self) -> None:
        """Give processes that are about to end the time to do so."""
        for pid in self.left():
            with suppress(ProcessLookupError):
                ended = os.pidfd_open(pid)
                select.select([ended], [], [], _GRACE_S)
                os.close(ended)

    def kill_left(self) -> None:
        """End them all."""
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _stop(self, process: subprocess.Popen[str]) -> None:
        process.terminate()  # torchrun and the demo pass it on
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_GRACE_S)
        self.kill_left()


def test_each_is_short() -> None:
    for path in _EXAMPLES.glob("*.py"):
        if path.name != "demo.py":  # `make demo`, which is more than an example
            assert len(path.read_text("utf-8").splitlines()) < 120, path.name


def _of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


class TestTrainFsdp2:
    def test_saves_and_resumes_on_another_number_of_ranks(
        self, run: _Runner, boto: Any, bucket: str
    ) -> None:
        uri = f"s3://{bucket}/some run"
        script = (str(_EXAMPLES / "train_fsdp2.py"), "--uri", uri, "--save-every", "2")

        trained = run.torchrun(2, *script, "--steps", "3")
        resumed = run.torchrun(1, *script, "--steps", "4", "--resume")

        [save] = _of(trained, "save")
        assert save["step"] == 2
        assert save["bytes"] > 0
        losses = [event["loss"] for event in _of(trained, "step")]
        assert len(losses) == 3
        assert all(math.isfinite(loss) for loss in losses)
        listed = boto.list_objects_v2(Bucket=bucket, Prefix="some run/step-2/")["Contents"]
        names = sorted(entry["Key"].removeprefix("some run/step-2/") for entry in listed)
        assert len(names) == save["objects"]
        assert [re.sub(r"[0-9a-f]{16}", "TOKEN", name) for name in names] == [
            ".metadata",
            "0000000000/__0_0.TOKEN.distcp",
            "1000000000/__1_0.TOKEN.distcp",
        ]

        [resume] = _of(resumed, "resume")
        assert (resume["step"], resume["sha256"]) == (2, save["sha256"])
        assert [event["step"] for event in _of(resumed, "step")] == [3, 4]
        assert [event["step"] for event in _of(resumed, "save")] == [4]


class TestFinetune:
    def test_tunes_what_a_library_wrote_and_publishes_what_it_reads(
        self,
        run: _Runner,
        boto: Any,
        bucket: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.syspath_prepend(_EXAMPLES)
        model = importlib.import_module("gpt").GPT()
        base = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        body = safetensors.torch.save(base, {"format": "pt"})
        boto.put_object(Bucket=bucket, Key="base/model.safetensors", Body=body)

        places = ("--base", f"s3://{bucket}/base", "--uri", f"s3://{bucket}/tuned")
        printed = run(str(_EXAMPLES / "finetune.py"), *places, "--steps", "3")

        losses = [event["loss"] for event in map(json.loads, printed.splitlines()[:-1])]
        assert len(losses) == 3
        assert all(math.isfinite(loss) for loss in losses)
        index = boto.get_object(Bucket=bucket, Key="tuned/model.safetensors.index.json")
        weight_map = json.load(index["Body"])["weight_map"]
        tuned: dict[str, torch.Tensor] = {}
        for name in sorted(set(weight_map.values())):
            boto.download_file(bucket, f"tuned/{name}", str(tmp_path / name))
            tuned |= safetensors.torch.load_file(tmp_path / name)
        assert tuned.keys() == base.keys() == weight_map.keys()
        changed = {name for name in base if not torch.equal(base[name], tuned[name])}
        assert {name.split(".")[0] for name in changed} == {"blocks", "norm", "head"}
        assert not any(name.startswith("blocks.0.") for name in changed)


class TestPrune:
    def test_the_newest_and_every_other_step_stay(
        self, run: _Runner, boto: Any, bucket: str
    ) -> None:
        uri = f"s3://{bucket}/run"
        for step in (1, 2, 3, 4, 5):
            s3dcp.save({"step": step}, f"{uri}/step-{step}")
        # One that lost its data: not complete, and older than the newest.
        [broken] = boto.list_objects_v2(Bucket=bucket, Prefix="run/step-2/__")["Contents"]
        boto.delete_object(Bucket=bucket, Key=broken["Key"])
        script = (str(_EXAMPLES / "prune.py"), "--uri", uri, "--newest", "1", "--every", "3")
        before = {found.uri for found in s3dcp.list_checkpoints(uri)}

        told = [json.loads(line) for line in run(*script).splitlines()]
        after_dry_run = {found.uri for found in s3dcp.list_checkpoints(uri)}
        done = [json.loads(line) for line in run(*script, "--delete").splitlines()]

        assert before == after_dry_run == {f"{uri}/step-{step}" for step in (1, 2, 3, 4, 5)}
        for events in (told, done):
            assert {event["step"] for event in _of(events, "keep")} == {3, 5}
            assert {event["step"] for event in _of(events, "delete")} == {1, 2, 4}
            [left] = _of(events, "left behind")
            assert (left["objects"], left["uploads"]) == (0, 0)
        assert {event["done"] for event in _of(done, "delete")} == {True}
        found = s3dcp.list_checkpoints(uri)
        assert [each.uri for each in found] == [f"{uri}/step-3", f"{uri}/step-5"]
        assert all(each.complete for each in found)


class TestTrainDdp:
    def test_saves_in_the_background_and_resumes(
        self, run: _Runner, boto: Any, bucket: str
    ) -> None:
        uri = f"s3://{bucket}/run"
        script = (str(_EXAMPLES / "train_ddp.py"), "--uri", uri, "--save-every", "2")

        trained = run.torchrun(2, *script, "--steps", "5")
        resumed = run.torchrun(1, *script, "--steps", "5", "--resume")

        saves = _of(trained, "save")
        assert [save["uri"] for save in saves] == [f"{uri}/step-2", f"{uri}/step-4"]
        [resume] = _of(resumed, "resume")
        assert (resume["uri"], resume["step"]) == (f"{uri}/step-4", 4)
        assert resume["sha256"] == saves[-1]["sha256"]
        [last] = _of(resumed, "step")
        assert last["step"] == 5
        assert last["loss"] == pytest.approx(_of(trained, "step")[-1]["loss"], abs=1e-3)


class TestLoadFewerRanks:
    def test_what_four_ranks_saved_two_and_one_load(self, run: _Runner, bucket: str) -> None:
        script = (str(_EXAMPLES / "load_fewer_ranks.py"), "--uri", f"s3://{bucket}/ck")

        [saved] = run.torchrun(4, *script, "--save")
        [on_two] = run.torchrun(2, *script)
        on_one = json.loads(run(*script))

        assert saved == {"event": "save", "ranks": 4, "sha256": saved["sha256"]}
        assert on_two == {"event": "load", "ranks": 2, "sha256": saved["sha256"]}
        assert on_one == {"event": "load", "ranks": 1, "sha256": saved["sha256"]}


class TestDemo:
    def test_all_that_it_promises_holds(self, run: _Runner, tmp_path: Path) -> None:
        printed = run(str(_EXAMPLES / "demo.py"))

        assert "all of it held" in printed
        assert printed.count("  ok: ") >= 4
        assert [path.name for path in tmp_path.iterdir()] == ["stderr"]
        assert re.search(r"^ +20 +2 +[\d,]+ +[\d.]+ +[\d.]+ +3 ", printed, re.MULTILINE)
