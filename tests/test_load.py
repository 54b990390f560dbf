"""Many saves and loads: at once, of many objects, of many items, and one after the other.

Nothing may be left of them: no task on the portal, no descriptor, no thread, no memory.

`make soak SOAK_SECONDS=600` runs the last test for that long, and the others in full size.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import (
    _StorageReaderTransforms,
    _StorageWriterTransforms,
)

from s3dcp import S3Client, S3ClientConfig, S3StorageReader
from s3dcp._keys import S3Uri
from s3dcp._loading import LoadedItems
from s3dcp._metadata import dump_metadata, load_metadata
from s3dcp._portal import portal
from s3dcp._saving import SavedItems
from s3dcp.testing import FakeS3, FakeS3Process
from tests._fakes import BUCKET, load, save
from tests._servers import use
from tests._states import KiB, MiB, StateDict, assert_same, fill, finite
from tests._stores import MemoryStore, channel_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

SOAKING = "SOAK_SECONDS" in os.environ
SOAK_S = float(os.environ.get("SOAK_SECONDS", "1"))

CONNECTIONS = 8
CONFIG = S3ClientConfig(max_connections=CONNECTIONS)
JOBS = 100


@pytest.fixture(scope="module")
def _server() -> Iterator[FakeS3Process]:
    # A process of its own, so that its descriptors and memory are not counted here.
    with FakeS3.process(bucket=BUCKET) as server:
        yield server


@pytest.fixture
def server(_server: FakeS3Process, monkeypatch: pytest.MonkeyPatch) -> FakeS3Process:
    use(_server, monkeypatch)
    # What is opened once, by whichever test comes first, is not counted: the loop's own, the pool.
    save(state_of(0), "warm", CONFIG)
    load(state_of(0), "warm", CONFIG)
    return _server


@dataclass(frozen=True)
class Census:
    """What this process has."""

    tasks: int
    threads: int
    descriptors: int

    @classmethod
    def take(cls) -> Census:
        async def tasks() -> int:
            return len(asyncio.all_tasks())

        gc.collect()
        return cls(
            tasks=portal().call(tasks),
            threads=threading.active_count(),
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
        )


@contextmanager
def nothing_left(connections: int = CONNECTIONS) -> Iterator[None]:
    """Assert that tasks and threads are as many as before, and descriptors but for the pool's."""
    before = Census.take()
    yield
    after = Census.take()
    assert (after.tasks, after.threads) == (before.tasks, before.threads)
    assert after.descriptors <= before.descriptors + connections


def state_of(number: int) -> StateDict:
    return {"weights": fill((64, 16), seed=number), "bias": fill((16,), seed=number), "n": number}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@dataclass(frozen=True)
class Footprint:
    """What is in use: resident memory says more of what malloc keeps, which comes and goes by MB.

    Attributes:
        blocks: Of Python's own allocator.
        malloc_bytes: Of malloc's, which has tensors, buffers and what C libraries take.
    """

    blocks: int
    malloc_bytes: int

    @classmethod
    def take(cls) -> Footprint:
        mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if mallinfo is None:
            pytest.skip("needs glibc")
        mallinfo.restype = _MallocInfo
        gc.collect()
        blocks, info = sys.getallocatedblocks(), mallinfo()
        return cls(blocks, info.uordblks + info.hblkhd)


# At once.


def test_100_saves_and_loads_at_once(server: FakeS3Process) -> None:
    def job(number: int) -> None:
        state = state_of(number)
        save(state, f"at-once/{number}", CONFIG)
        assert_same(load(state, f"at-once/{number}", CONFIG), state)

    with nothing_left(), ThreadPoolExecutor(JOBS) as threads:
        for done in [threads.submit(job, number) for number in range(JOBS)]:
            done.result()


def test_100_coroutines_at_once(server: FakeS3Process) -> None:
    async def job(client: S3Client, number: int) -> None:
        body = os.urandom(64 * KiB + number)
        key = f"coroutines/{number}"
        await client.put_object(BUCKET, key, body)
        assert await client.get_object(BUCKET, key) == body

    async def jobs() -> None:
        async with S3Client(None, CONFIG) as client, asyncio.TaskGroup() as group:
            for number in range(JOBS):
                group.create_task(job(client, number))

    with nothing_left():
        asyncio.run(jobs())


def test_jobs_that_are_given_up(server: FakeS3Process) -> None:
    async def jobs() -> None:
        client = S3Client(None, CONFIG)
        body = bytes(9 * MiB)
        tasks = [
            asyncio.create_task(client.put_object(BUCKET, f"given-up/{number}", body))
            for number in range(20)
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    with nothing_left():
        asyncio.run(jobs())


# Of many objects and items.


def test_many_objects(server: FakeS3Process) -> None:
    """One for each item, over HTTP; 10,000 of them when soaking, and below without it."""
    count = 10_000 if SOAKING else 150
    state: StateDict = {f"layer.{n}": torch.full((4,), float(n)) for n in range(count)}
    with nothing_left():
        save(state, "objects", CONFIG, single_file_per_rank=False)
        assert_same(load(state, "objects", CONFIG), state)


@pytest.mark.parametrize(
    ("items", "objects"),
    [(200_000, 1), (10_000, None)],
    ids=["of one object", "of as many objects"],
)
def test_many_items(items: int, objects: int | None, unlogged: None) -> None:
    """The plan and the engine alone: no time is spent on HTTP."""
    store = MemoryStore()
    weights = torch.arange(items, dtype=torch.float32).view(items, 1)
    state: StateDict = {f"layer.{n}": weights[n] for n in range(items)}
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    [plan], metadata = planner.create_global_plan([planner.create_local_plan()])
    groups = [plan.items] if objects else [[item] for item in plan.items]
    files = [(S3Uri("bucket", f"run/{n}"), str(n), group) for n, group in enumerate(groups)]
    with nothing_left():
        channel = channel_of(store)
        saved = SavedItems(portal(), channel, CONFIG, planner, _StorageWriterTransforms())
        metadata.storage_data = {each.index: each.storage_data for each in saved.write(files)}
        assert len(store.objects) == len(files)
        metadata = load_metadata(dump_metadata(metadata), source="run")

        into = torch.zeros_like(weights)
        targets: StateDict = {f"layer.{n}": into[n] for n in range(items)}
        loader = DefaultLoadPlanner()
        loader.set_up_planner(targets, metadata, is_coordinator=True)
        LoadedItems(
            portal(), channel, CONFIG, loader, _StorageReaderTransforms(), max_gap_bytes=MiB
        ).read(
            create_default_local_load_plan(targets, metadata).items,
            metadata,
            S3Uri("bucket", "run"),
        )
    assert torch.equal(into, weights)


# Of much memory.


@pytest.fixture
def frugal_malloc() -> None:
    """What is freed goes back to the system, and so is not counted: glibc would keep it."""
    m_mmap_threshold = -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(m_mmap_threshold, 512 * KiB):
        pytest.skip("needs glibc")


def test_a_save_and_a_load_stay_within_the_budget(
    server: FakeS3Process, frugal_malloc: None
) -> None:
    """Of tensors that have to be copied: six times the budget."""
    config = S3ClientConfig(
        max_connections=2, part_size=5 * MiB, memory_budget_bytes=16 * MiB, checksum=None
    )
    # Parts of one storage, with gaps: each is cloned to be saved.
    whole = finite((2, 24, 1024, 1024), torch.float16, 1)
    state: StateDict = {f"layer.{n}": whole[:, n] for n in range(24)}
    # Of another dtype and layout: each is decoded from a buffer.
    target = {name: torch.zeros(each.mT.shape).mT for name, each in state.items()}
    save({"warm": fill((9, 9))}, "warm", config)
    load({"warm": fill((9, 9))}, "warm", config)

    # Or two parts, where those are larger: a save holds one that is full, and one being filled.
    with peak_of(64 * MiB):
        save(state, "budget", config)
    with peak_of(64 * MiB):
        reader = S3StorageReader(None, f"s3://{BUCKET}/budget", config)
        dcp.load(target, storage_reader=reader, no_dist=True)
    for name, each in state.items():
        assert torch.equal(target[name], each.float())


@contextmanager
def peak_of(max_bytes: int) -> Iterator[None]:
    """Assert that the process needs at most so much memory more than before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes()
    yield
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    peak = int(line.split()[1]) * KiB - before
    assert peak <= max_bytes, f"{peak >> 20} MiB"


# One after the other.


def test_soak(server: FakeS3Process, unlogged: None) -> None:
    """Small saves and loads for `SOAK_SECONDS`: memory and descriptors stay what they are."""
    state = {**state_of(1), "large": fill((MiB,), torch.uint8, 2)}

    def rounds(seconds: float) -> int:
        count, end = 0, time.monotonic() + seconds
        while count < 20 or time.monotonic() < end:
            save(state, f"soak/{count % 3}", CONFIG)
            assert_same(load(state, f"soak/{count % 3}", CONFIG), state)
            count += 1
        return count

    # The first hundreds fill caches, of torch's among them.
    rounds(SOAK_S / 4)
    before, used = Census.take(), Footprint.take()
    count = rounds(SOAK_S)
    after, used_after = Census.take(), Footprint.take()
    assert (after.tasks, after.threads) == (before.tasks, before.threads)
    assert after.descriptors <= before.descriptors + CONNECTIONS
    # Not one state that was kept, nor one object of each round; in ten minutes, not 100 bytes.
    assert used_after.blocks - used.blocks < (count / 2 if SOAKING else 5_000), count
    assert used_after.malloc_bytes - used.malloc_bytes < (MiB if SOAKING else 8 * MiB), count
