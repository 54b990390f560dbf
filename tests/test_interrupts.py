"""Ctrl-C and SIGTERM, at every moment of a call, of a save and of a load."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from s3dcp import S3ClientConfig, S3StorageReader, S3StorageWriter, _calls, _uploads
from s3dcp._portal import portal
from s3dcp.testing import Exchange, FakeS3, Fault, Stall
from tests._fakes import BUCKET, uri_of
from tests._forked import Zygote, await_go, say
from tests._scripted import LEAN
from tests._states import MiB, assert_same, blank, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="this system has no such signals"),
]

PART = S3ClientConfig(part_size=5 * MiB, conditional_writes=True)
URI = uri_of("ck")
OLD = {"large": fill((2200, 1024), seed=1), "small": fill((3,), seed=2)}
NEW = {"large": fill((2200, 1024), seed=3), "small": fill((3,), seed=4)}


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_hot_loop_of_calls_is_interrupted_hundreds_of_times(loop: str) -> None:
    """No call hangs, none is left behind, and none writes after its interrupt was raised."""
    script = Path(__file__).with_name("_interrupted.py")
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAN + run, loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "300 interrupts\n")


@pytest.fixture
def server(fake: FakeS3) -> FakeS3:
    """A server that holds the old checkpoint."""
    save(OLD)
    return fake


def save(state: dict[str, Any]) -> None:
    dcp.save(state, storage_writer=S3StorageWriter(None, URI, PART), no_dist=True)


def load(state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, storage_reader=S3StorageReader(None, URI, PART), no_dist=True)
    return state


def names(error: BaseException) -> list[str]:
    """The types of an error and of what DCP carries inside of it."""
    inside = error.failures.values() if isinstance(error, dcp.CheckpointException) else ()
    return [type(error).__name__, *(type(failure).__name__ for failure, _ in inside)]


def leave_by(number: int, frame: object) -> None:
    raise SystemExit(3)


async def tasks() -> int:
    return len(asyncio.all_tasks())


def report(error: BaseException) -> None:
    """Tell the test what was raised, and go on when it says so."""
    say(json.dumps([names(error), portal().call(tasks)]))
    await_go()


def save_interrupted() -> None:
    """Save until interrupted, and then again. An upload's id comes in time, on any machine."""
    _uploads._ID_GRACE_S = _calls.GRACE_S
    _save_interrupted()


def save_interrupted_for_an_hour() -> None:
    """The same, if the interrupt waits for all that it may wait for."""
    _calls.GRACE_S = 3600
    _save_interrupted()


def _save_interrupted() -> None:
    signal.signal(signal.SIGTERM, leave_by)
    try:
        save(NEW)
    except BaseException as exc:  # noqa: BLE001 - it may be any of them
        report(exc)
    save(NEW)


def load_interrupted() -> None:
    """Load until interrupted; look whether the targets are left alone; load again."""
    signal.signal(signal.SIGTERM, leave_by)
    state = {name: torch.full_like(tensor, -1.0) for name, tensor in OLD.items()}
    try:
        load(state)
    except BaseException as exc:  # noqa: BLE001
        seen = {name: tensor.clone() for name, tensor in state.items()}
        report(exc)
        load(blank(OLD))
        assert_same(state, seen)
    assert_same(load(state), OLD)


@dataclass(frozen=True)
class Held(Fault):
    """Holds a request before it takes effect, which it never does."""

    async def play(self, exchange: Exchange) -> None:
        await exchange.stall()
        exchange.end(reset=True)


SIGNALS = {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "SystemExit"}

# The request that is on its way when the signal comes.
SAVING: dict[str, tuple[Fault, dict[str, Any]]] = {
    "planning": (Held(), {"operation": "GetObject"}),
    "first part": (Held(), {"operation": "UploadPart"}),
    "last part": (Stall(head=False), {"operation": "UploadPart", "skip": 1}),
    "completing": (Stall(head=False), {"operation": "CompleteMultipartUpload"}),
    "committing": (Held(), {"operation": "PutObject", "key": "*/.metadata"}),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [*((moment, signal.SIGINT) for moment in SAVING), ("last part", signal.SIGTERM)],
)
def test_a_save_is_interrupted(
    server: FakeS3, zygote: Zygote, moment: str, number: signal.Signals
) -> None:
    """At once, although the server would hold the request for ever; and nothing is left of it."""
    before = server.keys(BUCKET)
    fault, request = SAVING[moment]
    rule = server.inject(fault, **request)
    child = zygote.start(save_interrupted)
    rule.wait()
    child.signal(number)

    raised, running = json.loads(child.read_line())
    assert raised == ["CheckpointException", SIGNALS[number]]
    assert running == 1  # the one that counted
    assert server.uploads(BUCKET) == {}
    left = set(server.keys(BUCKET)) ^ set(before)
    # A commit that was sent may have been carried out: what it names is not deleted.
    assert len(left) == (1 if moment == "committing" else 0)
    assert_same(load(blank(OLD)), OLD)

    rule.release()
    child.go()
    assert child.end() == (0, "")
    assert_same(load(blank(NEW)), NEW)
    server.check()


@dataclass(frozen=True)
class Slow(Fault):
    """Takes effect when it is released, and answers."""

    async def play(self, exchange: Exchange) -> None:
        await exchange.stall()
        await super().play(exchange)


def test_an_upload_without_an_id_is_not_waited_for(server: FakeS3, zygote: Zygote) -> None:
    """It cannot be aborted yet: it is when it has one, while the process goes on."""
    rule = server.inject(Slow(), operation="CreateMultipartUpload")
    child = zygote.start(save_interrupted_for_an_hour)
    rule.wait()
    child.signal(signal.SIGINT)

    raised, _ = json.loads(child.read_line())
    assert raised == ["CheckpointException", "KeyboardInterrupt"]
    assert_same(load(blank(OLD)), OLD)

    aborting = server.inject(Fault(), operation="AbortMultipartUpload")
    rule.release()
    aborting.wait()
    child.go()
    assert child.end() == (0, "")
    assert server.uploads(BUCKET) == {}
    assert_same(load(blank(NEW)), NEW)
    server.check()


def save_new() -> None:
    save(NEW)


def test_a_save_is_ended_by_sigterm(server: FakeS3, zygote: Zygote) -> None:
    """By the default action, which leaves no time for anything."""
    fault, request = SAVING["committing"]
    rule = server.inject(fault, **request)
    child = zygote.start(save_new)
    rule.wait()
    child.signal(signal.SIGTERM)
    assert child.end() == (-signal.SIGTERM, "")
    assert_same(load(blank(OLD)), OLD)
    server.check()


LOADING: dict[str, tuple[Fault, dict[str, Any]]] = {
    "metadata": (Stall(), {"operation": "GetObject", "key": "*/.metadata"}),
    "data": (Stall(body_bytes=MiB), {"operation": "GetObject", "key": "*.distcp"}),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [*((moment, signal.SIGINT) for moment in LOADING), ("data", signal.SIGTERM)],
)
def test_a_load_is_interrupted(
    server: FakeS3, zygote: Zygote, moment: str, number: signal.Signals
) -> None:
    """And what the server sends afterwards goes nowhere."""
    fault, request = LOADING[moment]
    rule = server.inject(fault, **request)
    child = zygote.start(load_interrupted)
    rule.wait()
    child.signal(number)

    raised, running = json.loads(child.read_line())
    assert raised == ["CheckpointException", SIGNALS[number]]
    assert running == 1

    rule.release()
    child.go()
    assert child.end() == (0, "")
    server.check()
