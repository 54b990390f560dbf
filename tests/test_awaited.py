"""What `asave`, `aload` and `S3Client` do to the loop of their caller, and what a cancel does."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import s3dcp
import s3dcp._giving_way
from s3dcp import S3Client
from s3dcp._loop_thread import new_event_loop
from s3dcp._portal import portal
from s3dcp.testing import FakeS3, FakeS3Process, Stall
from tests._fakes import BUCKET, uri_of
from tests._lag import watched
from tests._servers import use
from tests._states import MiB, fill

_MOST_LATE_S = 0.020
URI = uri_of("run/step-1")


@pytest.fixture(params=[asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine on a loop of its own, as `asyncio.run` does."""

    def on_a_loop(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main)

    return on_a_loop


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def server(fake: FakeS3) -> FakeS3:
    return fake


@pytest.fixture(scope="module")
def _apart() -> Iterator[FakeS3Process]:
    with FakeS3.process() as process:
        process.create_bucket(BUCKET)
        yield process


@pytest.fixture
def apart(_apart: FakeS3Process, monkeypatch: pytest.MonkeyPatch) -> FakeS3Process:
    """A server that takes none of this process's time."""
    use(_apart, monkeypatch)
    return _apart


SHAPES = {
    "large": {f"layer.{n}": torch.zeros(8 * MiB // 4) for n in range(8)},
    "thousands": {f"layer.{n}": torch.full((16,), float(n)) for n in range(2000)},
}


async def worst_of(work: Awaitable[Any]) -> float:
    async with watched() as late_s:
        await work
    assert len(late_s) > 1
    return max(late_s)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_callers_loop_goes_on(apart: FakeS3Process, run: Run, shape: str) -> None:
    state = {"model": SHAPES[shape]}

    async def main() -> None:
        await s3dcp.asave(state, URI)  # and what is done once only
        saves = [await worst_of(s3dcp.asave(state, URI)) for _ in range(5)]
        loads = [await worst_of(s3dcp.aload(state, URI)) for _ in range(5)]
        assert median(saves) < _MOST_LATE_S, saves
        assert median(loads) < _MOST_LATE_S, loads

    run(main())


KEYS = 1000


@pytest.mark.parametrize(
    ("work", "module", "least"),
    [
        pytest.param(s3dcp.asave, "_checkpoint", KEYS, id="each-is-logged"),
        pytest.param(s3dcp.asave, "_saving", KEYS, id="each-is-copied"),
        pytest.param(s3dcp.aload, "_loading", KEYS, id="each-is-checked"),
        pytest.param(s3dcp.asave, "_pickles", 2, id="frames-are-pickled"),
        pytest.param(s3dcp.aload, "_pickles", 2, id="frames-are-unpickled"),
        pytest.param(s3dcp.aload, "_metadata", 2 * KEYS, id="each-is-looked-at"),
        pytest.param(s3dcp.aload, "_collector", 3 * KEYS, id="objects-are-freed"),
    ],
)
def test_what_many_keys_need_gives_way(
    apart: FakeS3Process,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[..., Coroutine[Any, Any, Any]],
    module: str,
    least: int,
) -> None:
    """Else who waits for the GIL finds it taken again before it has woken up."""
    state = OrderedDict((f"layer.{n}", torch.tensor(n)) for n in range(KEYS))
    s3dcp.save(state, URI)
    threads: list[str] = []
    monkeypatch.setattr(
        f"s3dcp.{module}.give_way", lambda: threads.append(threading.current_thread().name)
    )

    asyncio.run(work(state, URI))

    assert threads.count("s3dcp-blocking") >= least


@pytest.mark.parametrize(
    ("work", "is_awaited"), [(s3dcp.asave, True), (s3dcp.aload, True), (s3dcp.save, False)]
)
def test_awaited_calls_alone_pause(
    apart: FakeS3Process,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[..., Any],
    is_awaited: bool,
) -> None:
    state = OrderedDict((f"layer.{n}", torch.tensor(n)) for n in range(KEYS))
    s3dcp.save(state, URI)
    pauses_s: list[float] = []
    hours = SimpleNamespace(monotonic=count().__next__, sleep=pauses_s.append)  # go by at each look
    monkeypatch.setattr(s3dcp._giving_way, "time", hours)

    if is_awaited:
        asyncio.run(work(state, URI))
        assert len(pauses_s) > KEYS
        assert min(pauses_s) > 0
    else:
        work(state, URI)
        assert not pauses_s


_FIRST_USES = """
import asyncio, json, os, sys, warnings
import torch
import s3dcp
from tests._lag import watched

warnings.simplefilter("ignore")  # of a fork beside torch's threads

async def main():
    async with watched() as late_s:
        if sys.argv[2] == "asave":
            await s3dcp.asave({"w": torch.ones(10)}, sys.argv[1])
        else:
            await s3dcp.S3Client().put_object(*sys.argv[1][5:].split("/", 1), b"")
        made = [[] for _ in range(2000)]  # whoever goes on has the collector look
    return max(late_s)

worst_s = []
for _ in range(3):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, str(asyncio.run(main())).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        worst_s.append(float(pipe.read()))
    os.waitpid(child, 0)
print(json.dumps(worst_s))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("use", ["asave", "S3Client"])
def test_the_first_use_of_a_process_lets_it_go_on(apart: FakeS3Process, use: str) -> None:
    """It imports the S3 stack, reads botocore's models and starts the threads."""
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_USES, URI, use],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    worst_s = json.loads(done.stdout)
    assert median(worst_s) < _MOST_LATE_S, worst_s


def test_no_objects_but_new_ones_are_collected_meanwhile(apart: FakeS3Process) -> None:
    """All are in 0.2 s, with torch's: what a loop must not wait for."""
    state = {"model": SHAPES["thousands"]}
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    async def main() -> None:
        for work in (s3dcp.asave, s3dcp.aload):
            doing = asyncio.create_task(work(state, URI))
            await asyncio.sleep(0)
            gc.callbacks.append(note)
            doing.add_done_callback(lambda _: gc.callbacks.remove(note))
            await doing

    usual = gc.get_threshold()
    asyncio.run(main())
    assert set(seen) <= {0, 1}
    assert len(seen) > 10
    assert seen.count(1) <= 2  # when it is let go
    assert gc.get_threshold() == usual


@pytest.mark.parametrize(
    ("work", "operation", "key"),
    [
        (s3dcp.asave, "GetObject", "*/.metadata"),
        (s3dcp.asave, "PutObject", "*.distcp"),
        (s3dcp.asave, "PutObject", "*/.metadata"),
        (s3dcp.asave, "DeleteObject", "*.distcp"),
        (s3dcp.aload, "GetObject", "*/.metadata"),
        (s3dcp.aload, "GetObject", "*.distcp"),
    ],
)
def test_a_cancel_ends_it_in_every_phase(
    server: FakeS3, run: Run, work: Callable[..., Awaitable[Any]], operation: str, key: str
) -> None:
    state = {"weights": fill((300, 300), seed=1)}
    s3dcp.save(state, URI)
    before = state["weights"].clone()
    rule = server.inject(Stall(head=False), operation=operation, key=key, times=None)

    async def main() -> None:
        working = asyncio.ensure_future(work(state, URI))
        await asyncio.to_thread(rule.wait)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert not portal()._calls

    run(main())
    rule.release()
    assert not server.uploads(BUCKET)
    server.rules.clear()
    s3dcp.load(state, URI)  # one checkpoint or the other, which are the same
    assert torch.equal(state["weights"].view(torch.uint8), before.view(torch.uint8))


def test_a_client_is_used_from_two_loops_at_once(server: FakeS3) -> None:
    """The one on asyncio's waits, and is cancelled; the one on uvloop's goes on."""
    client = S3Client()
    rule = server.inject(Stall(head=False), operation="GetObject", key="held", times=None)

    async def waits() -> None:
        async with client:
            await client.put_object(BUCKET, "held", b"1")
            getting = asyncio.create_task(client.get_object(BUCKET, "held"))
            await asyncio.to_thread(rule.wait)
            await asyncio.to_thread(other.result)
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            assert await client.get_object(BUCKET, "free") == b"22"

    async def goes_on() -> None:
        async with client:
            await asyncio.to_thread(rule.wait)
            await client.put_object(BUCKET, "free", b"22")
            assert await client.get_object(BUCKET, "free") == b"22"

    def on(
        factory: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, Any]
    ) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)

    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(on, new_event_loop, goes_on())
        threads.submit(on, asyncio.new_event_loop, waits()).result(60)
    portal().call(asyncio.sleep, 0)  # what woke the caller may not have forgotten the call yet
    assert not portal()._calls
    rule.release()
