"""Where a save or a load may find itself: forks, spawns, running loops, threads, exits."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from s3dcp import (
    BinaryPrefixStrategy,
    CheckpointExistsError,
    PortalError,
    RoundRobinPrefixStrategy,
    S3ClientConfig,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
)
from s3dcp._portal import portal
from s3dcp.testing import FakeS3, Stall
from tests._fakes import BUCKET, uri_of
from tests._forked import Zygote, await_go, say
from tests._scripted import LEAN
from tests._states import MiB, StateDict, assert_same, blank, fill

if TYPE_CHECKING:
    from io import BytesIO

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True)
FORKS = 50
OLD, NEW, CHILD = uri_of("old"), uri_of("new"), uri_of("child")


def state_of(step: int) -> StateDict:
    return {"large": fill((2200, 1024), seed=step), "small": fill((3,), seed=step), "step": step}


def save(uri: str, step: int, **kwargs: Any) -> None:
    planner = kwargs.pop("planner", None)
    writer = S3StorageWriter(None, uri, CONFIG, **kwargs)
    dcp.save(state_of(step), storage_writer=writer, planner=planner, no_dist=True)


def check(uri: str, step: int) -> None:
    """Load a checkpoint, and compare it."""
    state = blank(state_of(step))
    dcp.load(state, storage_reader=S3StorageReader(None, uri, CONFIG), no_dist=True)
    assert_same(state, state_of(step))


def failure_of(call: Callable[[], object]) -> BaseException:
    """What DCP carries of the error that a call raises."""
    with pytest.raises(dcp.CheckpointException) as caught:
        call()
    [(error, _)] = caught.value.failures.values()
    return error


# Forks.


class ForkingPlanner(DefaultSavePlanner):
    """Forks in the middle of the save, when the first part is on its way."""

    def __init__(self, in_child: Callable[[], None]) -> None:
        super().__init__()
        self._in_child = in_child
        self.child = 0

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        """Fork before the last item."""
        if write_item.index.fqn == "small":
            self.child = os.fork()
            if not self.child:
                self._in_child()
        return super().resolve_data(write_item)


def use_and_end() -> None:
    check(OLD, 0)
    save(CHILD, 2)
    check(CHILD, 2)
    os._exit(7)  # as the children of multiprocessing end


def fork_in_a_save() -> None:
    planner = ForkingPlanner(use_and_end)
    save(NEW, 1, planner=planner)
    _, status = os.waitpid(planner.child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    save(OLD, 3)


def test_a_fork_in_the_middle_of_a_save(fake: FakeS3, zygote: Zygote) -> None:
    """Parent and child go on, each with a portal of its own, and do not wait for each other."""
    save(OLD, 0)
    child = zygote.start(fork_in_a_save)
    assert child.end() == (0, "")
    check(CHILD, 2)
    check(NEW, 1)
    check(OLD, 3)
    assert fake.uploads(BUCKET) == {}


def test_many_forks_beside_requests_end_as_processes_do(fake: FakeS3) -> None:
    """Not by a crash, for want of the parent's threads; and the parent's requests go on."""
    script = Path(__file__).with_name("_forking.py")
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    url = fake.endpoint_url.replace("127.0.0.1", "localhost")  # a name, to be looked up
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", LEAN + run, url, BUCKET],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "{0: 10}\n")


def fork_beside_saves() -> None:
    stopped, saved = threading.Event(), threading.Semaphore(0)

    def saves() -> None:
        while not stopped.is_set():
            save(NEW, 1)
            saved.release()

    faulthandler.cancel_dump_traceback_later()  # forks would wait for its thread when they end
    gc.freeze()  # so that they need not look at all of it then
    saving = threading.Thread(target=saves)
    saving.start()
    saved.acquire()
    children = []
    for number in range(FORKS):
        if not (pid := os.fork()):
            if number % 10:
                os._exit(0)  # as the children of multiprocessing end
            sys.exit(0)  # as the interpreter does, which takes torch half a second
        children.append(pid)
    ends = Counter(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    saved.acquire()
    stopped.set()
    saving.join()
    say(str(dict(ends)))


def test_many_forks_beside_saves_end_as_processes_do(fake: FakeS3, zygote: Zygote) -> None:
    """Whatever the save is at: its commit, its uploads, its checksums, torch's own work."""
    child = zygote.start(fork_beside_saves)
    assert child.end() == (0, f"{{0: {FORKS}}}\n")
    check(NEW, 1)
    assert fake.uploads(BUCKET) == {}


# Spawns, and what DCP pickles to get there.


def use_pickled(data: bytes) -> bytes:
    """Save and load with objects that another process has used; return one and an error."""
    writer, reader = pickle.loads(data)
    dcp.save(state_of(2), storage_writer=writer)
    state = blank(state_of(2))
    dcp.load(state, storage_reader=reader)
    assert_same(state, state_of(2))
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(
            state_of(3), storage_writer=S3StorageWriter(None, writer.path, CONFIG, overwrite=False)
        )
    return pickle.dumps((writer, caught.value))


@pytest.fixture(scope="module")
def spawned() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.xdist_group("spawned")
@pytest.mark.parametrize(
    ("strategy", "constructor"),
    [
        (BinaryPrefixStrategy(epoch_num=3), S3ReaderConstructor.sequential()),
        (RoundRobinPrefixStrategy(["a", "b"]), S3ReaderConstructor.range_based(1 * MiB)),
        (None, S3ReaderConstructor.dcp_optimized(max_gap_size=1024)),
    ],
    ids=["sequential", "range_based", "dcp_optimized"],
)
def test_what_is_in_use_goes_to_a_spawned_process_and_back(
    fake: FakeS3, spawned: Executor, strategy: Any, constructor: Any
) -> None:
    """With a live portal, a client, a plan and a checkpoint's metadata on either side."""
    writer = S3StorageWriter(None, NEW, CONFIG, strategy, thread_count=2)
    dcp.save(state_of(1), storage_writer=writer, no_dist=True)
    reader = S3StorageReader(None, NEW, CONFIG, constructor)
    dcp.load(blank(state_of(1)), storage_reader=reader, no_dist=True)

    used = spawned.submit(use_pickled, pickle.dumps((writer, reader)))
    again, failed = pickle.loads(used.result())
    assert again.fs.client.s3client_config == CONFIG
    assert again.prefix_strategy(0) == writer.prefix_strategy(0)
    [(error, _)] = failed.failures.values()
    assert isinstance(error, CheckpointExistsError)
    check(NEW, 2)
    dcp.save(state_of(4), storage_writer=again, no_dist=True)
    check(NEW, 4)


# Running event loops.


def test_from_a_coroutine(fake: FakeS3) -> None:
    """Its loop stands still meanwhile; it is not ours."""

    async def scenario() -> None:
        save(NEW, 1)
        check(NEW, 1)

    asyncio.run(scenario())


def test_from_a_coroutine_by_threads(fake: FakeS3) -> None:
    """Its loop goes on, and saves go on beside each other."""
    rule = fake.inject(Stall(head=False), operation="PutObject", key="*/.metadata", times=2)

    async def scenario() -> None:
        saves = [asyncio.to_thread(save, uri_of(f"{n}"), n) for n in range(2)]
        both = asyncio.gather(*saves)
        await asyncio.to_thread(rule.wait, 2)
        assert not both.done()
        rule.release()
        await both

    asyncio.run(scenario())
    for n in range(2):
        check(uri_of(f"{n}"), n)


def interrupted_cells() -> None:
    """A notebook: cells run in the main thread, inside of a loop that goes on after each."""
    loop = asyncio.new_event_loop()
    cells: list[asyncio.Task[None]] = []

    def first() -> None:
        try:
            save(NEW, 1)
        except dcp.CheckpointException as exc:
            [(error, _)] = exc.failures.values()
            say(type(error).__name__)
        loop.call_soon(second)

    def second() -> None:
        save(NEW, 2)
        check(NEW, 2)
        cells.append(loop.create_task(third()))

    async def third() -> None:  # with a top-level await
        await asyncio.to_thread(save, NEW, 3)
        loop.stop()

    loop.call_soon(first)
    loop.run_forever()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def test_from_a_notebook(fake: FakeS3, zygote: Zygote) -> None:
    """Of which the first cell is interrupted."""
    rule = fake.inject(Stall(head=False), operation="UploadPart")
    child = zygote.start(interrupted_cells)
    rule.wait()
    child.signal(signal.SIGINT)
    assert child.read_line() == "KeyboardInterrupt"
    rule.release()
    assert child.end() == (0, "")
    check(NEW, 3)
    assert fake.uploads(BUCKET) == {}


def test_from_the_portals_own_thread(fake: FakeS3) -> None:
    async def scenario() -> BaseException:
        return failure_of(lambda: save(NEW, 1))

    error = portal().call(scenario)
    assert isinstance(error, PortalError)
    assert "would wait for itself" in str(error)
    assert fake.keys(BUCKET) == []


# Threads, and the end of the portal.


def test_when_the_portal_dies(fake: FakeS3) -> None:
    """The save that it was at fails, and the next one has another."""
    writer = S3StorageWriter(None, NEW, CONFIG)
    attempt = partial(dcp.save, state_of(1), storage_writer=writer, no_dist=True)
    rule = fake.inject(Stall(head=False), operation="UploadPart")
    with ThreadPoolExecutor(1) as threads:
        failing = threads.submit(failure_of, attempt)
        rule.wait()
        before = portal()
        before._thread.loop.call_soon_threadsafe(before._thread.loop.stop)
        assert isinstance(failing.result(), PortalError)
    rule.release()
    attempt()
    assert portal() is not before
    check(NEW, 1)


# The interpreter's exit.


def exit_with_a_daemon() -> None:
    threading.Thread(target=save, args=(NEW, 1), daemon=True).start()
    await_go()


def test_the_interpreter_exits_while_a_daemon_saves(fake: FakeS3, zygote: Zygote) -> None:
    """Which holds up nothing, and commits nothing."""
    save(OLD, 0)
    rule = fake.inject(Stall(head=False), operation="UploadPart")
    child = zygote.start(exit_with_a_daemon)
    rule.wait()
    child.go()
    code, _ = child.end()
    assert code == 0
    check(OLD, 0)
    assert not fake.keys(BUCKET, "new/")  # parts that nobody is left to abort may be


def exit_while_a_process_saves() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        future = dcp.async_save(
            state_of(1),
            storage_writer=S3StorageWriter(None, NEW, CONFIG),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
    assert isinstance(future, Future)
    say("saving")


def test_the_interpreter_exits_while_a_process_saves(fake: FakeS3, zygote: Zygote) -> None:
    """The save is finished, or it is said that it is not; and nothing hangs."""
    child = zygote.start(exit_while_a_process_saves)
    assert child.read_line() == "saving"
    code, said = child.end()
    if fake.keys(BUCKET, "new/.metadata"):
        check(NEW, 1)
    else:
        assert code or said
