"""What `asave`, `aload` and `S3Client` do to the loop of their caller, and what a cancel does.

How long other threads keep a loop from running is told by the process's CPU time: what the machine
gives to other processes meanwhile is not theirs.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

import pytest
import torch

import s3dcp
from s3dcp import S3Client
from s3dcp._loop_thread import new_event_loop
from s3dcp._portal import portal
from s3dcp.testing import FakeS3, FakeS3Process, Stall
from tests._fakes import BUCKET, uri_of
from tests._servers import use
from tests._states import MiB, fill

_MOST_LATE_S = 0.020
_TICK_S = 0.001
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


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """By how many seconds the loop was late, once for each of its turns."""
    late_s: list[float] = []

    async def tick() -> None:
        while True:
            due_s, cpu_s = time.perf_counter() + _TICK_S, time.process_time()
            await asyncio.sleep(_TICK_S)
            delay_s = time.perf_counter() - due_s
            late_s.append(min(delay_s, time.process_time() - cpu_s))

    ticking = asyncio.create_task(tick())
    try:
        yield late_s
        await asyncio.sleep(_TICK_S)
    finally:
        ticking.cancel()


SHAPES = {
    "large": {f"layer.{n}": torch.zeros(8 * MiB // 4) for n in range(8)},
    "thousands": {f"layer.{n}": torch.full((16,), float(n)) for n in range(2000)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_callers_loop_goes_on(apart: FakeS3Process, run: Run, shape: str) -> None:
    state = {"model": SHAPES[shape]}

    async def worst_of(work: Awaitable[Any]) -> float:
        async with watched() as late_s:
            await work
        assert len(late_s) > 1
        return max(late_s)

    async def main() -> None:
        await s3dcp.asave(state, URI)  # and what is done once only
        saves = [await worst_of(s3dcp.asave(state, URI)) for _ in range(5)]
        loads = [await worst_of(s3dcp.aload(state, URI)) for _ in range(5)]
        assert median(saves) < _MOST_LATE_S, saves
        assert median(loads) < _MOST_LATE_S, loads

    run(main())


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
    assert not portal()._calls
    rule.release()
