"""The portal: its start and its end, and every way for a call to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import uvloop

from s3dcp import PortalError, S3Exception, _calls
from s3dcp._loop_thread import worker_count
from s3dcp._portal import Portal, offload, portal
from tests._scripted import LEAN

_TIMEOUT_S = 60.0


@pytest.fixture
def own() -> Iterator[Portal]:
    """A portal of the test's own."""
    with closing(Portal()) as made:
        yield made


@pytest.fixture(params=["uvloop", "asyncio"])
def either(request: pytest.FixtureRequest) -> Iterator[Portal]:
    """A portal on uvloop's loop, and one on asyncio's."""
    made = Portal() if request.param == "uvloop" else Portal(asyncio.new_event_loop)
    with closing(made):
        yield made


class Blocked:
    """An async function that does not end by itself.

    Attributes:
        started: Set when it runs.
        ended: Set when it was cancelled, and has done what it does then.
    """

    def __init__(self, *, linger: int = 0) -> None:
        self.started = threading.Event()
        self.ended = threading.Event()
        self._linger = linger

    async def __call__(self) -> None:
        try:
            self.started.set()
            await asyncio.Future()
        finally:
            for _ in range(self._linger):
                await asyncio.sleep(0)
            self.ended.set()


async def answer() -> int:
    return 42


async def add(a: int, *, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


async def fail() -> NoReturn:
    raise LookupError("on the portal")


def run(program: str) -> str:
    """Run a script to its end; return what it wrote, errors included."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", LEAN + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_without_standard_files() -> None:
    """As in a daemon. libuv aborts when it closes a socket that has the number of one of them."""
    output = run("""
import os, socket, sys
from s3dcp._portal import Portal

result = os.dup(1)
for number in range(3):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None  # as the interpreter has it, if it starts like this

async def number():
    with socket.socket() as made:
        return made.fileno()

portal = Portal()
os.write(result, str(portal.call(number) > 2).encode())
portal.close()
""")
    assert output == "True"


class TestCalls:
    def test_they_return_and_raise(self, either: Portal) -> None:
        assert either.call(add, 1, b=2) == 3
        assert either.wait(either.submit(add, 3, b=4)) == 7
        with pytest.raises(LookupError, match="on the portal"):
            either.call(fail)

    def test_they_run_on_its_thread_on_uvloop(self, own: Portal) -> None:
        async def where() -> tuple[str, bool]:
            loop = asyncio.get_running_loop()
            return threading.current_thread().name, isinstance(loop, uvloop.Loop)

        assert own.call(where) == ("s3dcp-portal", True)

    def test_names_are_looked_up_by_threads_of_its_own(self, own: Portal) -> None:
        """And not by libuv's threads, which a fork would wait for when it ends."""

        async def look_up() -> list[Any]:
            loop = asyncio.get_running_loop()
            found: list[Any] = await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
            await loop.getnameinfo(found[0][4])
            return found

        threads = len(list(Path("/proc/self/task").iterdir()))
        assert {address[4][0] for address in own.call(look_up)} <= {"127.0.0.1", "::1"}
        assert len(list(Path("/proc/self/task").iterdir())) == threads

    @pytest.mark.parametrize("installed", [True, False], ids=["uvloop", "asyncio"])
    def test_lookups_that_hang_hold_up_no_work(
        self, monkeypatch: pytest.MonkeyPatch, installed: bool
    ) -> None:
        """However many: addresses, too, are not looked up."""
        if not installed:
            monkeypatch.setitem(sys.modules, "uvloop", None)
        release = threading.Event()
        started = threading.Semaphore(0)

        real = socket.getaddrinfo

        def hang(host: str, port: int, *, flags: int) -> list[Any]:
            if flags & socket.AI_NUMERICHOST:
                return real(host, port, flags=flags)
            started.release()
            release.wait(_TIMEOUT_S)
            return []

        async def look_up(host: str) -> int:
            return len(await asyncio.get_running_loop().getaddrinfo(host, 443))

        with closing(Portal()) as own, monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", hang)
            calls = [own.submit(look_up, "hangs.invalid") for _ in range(worker_count() + 1)]
            try:
                assert started.acquire(timeout=_TIMEOUT_S)
                assert own.call(offload, sum, range(5)) == 10
                assert own.call(look_up, "127.0.0.1")
                assert not any(call.done for call in calls)
            finally:
                release.set()
            for call in calls:
                own.wait(call)

    def test_uvloop_is_not_made_everyones(self, own: Portal) -> None:
        with closing(asyncio.new_event_loop()) as loop:
            assert not type(loop).__module__.startswith("uvloop")

    def test_from_many_threads(self, own: Portal) -> None:
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n: results.append(own.call(add, n, b=1)))
            for n in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_TIMEOUT_S)
        assert sorted(results) == list(range(1, 21))

    def test_a_call_drops_its_arguments(self, own: Portal) -> None:
        class Tensor:
            pass

        tensor = Tensor()
        seen = weakref.ref(tensor)

        async def use(given: Tensor) -> None:
            await offload(id, given)

        own.call(use, tensor)
        own.call(answer)  # the loop has gone round since
        del tensor
        assert seen() is None

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_one_that_ends_the_thread(self, either: Portal) -> None:
        async def leave() -> NoReturn:
            raise SystemExit

        # asyncio ends the loop at once, uvloop only once it has told the caller.
        with pytest.raises((PortalError, SystemExit)):
            either.call(leave)
        either.close()
        assert not either.is_alive

    def test_from_its_own_thread_they_are_refused(self, own: Portal) -> None:
        async def inside() -> int:
            for refused in (lambda: own.call(answer), own.close):
                with pytest.raises(PortalError, match="would wait for itself"):
                    refused()
            return await own.run(answer)

        assert own.call(inside) == 42

    def test_a_refused_call_leaves_no_coroutine(self, own: Portal) -> None:
        """Warnings are errors here: one that is never awaited would be one."""
        own.close()
        for refused in (lambda: own.call(answer), lambda: own.submit(answer)):
            with pytest.raises(PortalError, match="has ended"):
                refused()


class TestLater:
    def test_it_is_called(self, either: Portal) -> None:
        called = threading.Event()
        either.call_later(0.0, called.set)
        assert called.wait(10)

    def test_unless_it_is_taken_back(self, either: Portal) -> None:
        called: list[bool] = []
        started, go_on = threading.Event(), threading.Event()

        async def hold_up() -> None:
            started.set()
            go_on.wait(10)

        busy = either.submit(hold_up)
        assert started.wait(10)
        take_back = either.call_later(0.0, lambda: called.append(True))
        take_back()
        go_on.set()
        either.wait(busy)
        for _ in range(3):
            either.call(answer)
        assert not called

    def test_after_the_end(self, own: Portal) -> None:
        called = threading.Event()
        take_back = own.call_later(60.0, called.set)
        own.close()
        assert called.is_set()
        take_back()
        with pytest.raises(PortalError, match="has ended"):
            own.call_later(60.0, bool)


class TestRun:
    """Awaiting the portal from other loops."""

    def test_results_and_errors(self, either: Portal) -> None:
        async def elsewhere() -> int:
            with pytest.raises(LookupError, match="on the portal"):
                await either.run(fail)
            return await either.run(add, 1, b=2)

        assert asyncio.run(elsewhere()) == 3

    def test_cancelling_it_waits_for_the_end(self, either: Portal) -> None:
        blocked = Blocked(linger=50)

        async def elsewhere() -> bool:
            task = asyncio.create_task(either.run(blocked))
            await asyncio.to_thread(blocked.started.wait, _TIMEOUT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return blocked.ended.is_set()

        assert asyncio.run(elsewhere())
        assert either.call(answer) == 42

    def test_an_error_during_the_cancellation_is_not_reported_later(
        self, own: Portal, caplog: pytest.LogCaptureFixture
    ) -> None:
        started = threading.Event()

        async def stubborn() -> None:
            started.set()
            try:
                await asyncio.Future()
            finally:
                raise LookupError("while cancelled")

        async def elsewhere() -> None:
            task = asyncio.create_task(own.run(stubborn))
            await asyncio.to_thread(started.wait, _TIMEOUT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        gc.freeze()  # so that to collect takes no time over what was there before
        asyncio.run(elsewhere())
        gc.collect()
        gc.unfreeze()
        assert not caplog.records


class TestCancel:
    def test_it_waits_for_the_tasks_to_end(self, either: Portal) -> None:
        calls = [Blocked(linger=100) for _ in range(3)]
        futures = [either.submit(call) for call in calls]
        for call in calls:
            assert call.started.wait(_TIMEOUT_S)

        either.cancel(futures)

        assert all(call.ended.is_set() for call in calls)
        for future in futures:
            with pytest.raises(PortalError, match="cancelled"):
                future.result()

    def test_of_what_has_ended(self, own: Portal) -> None:
        future = own.submit(answer)
        assert own.wait(future) == 42
        own.cancel([future])
        own.cancel([])
        assert future.result() == 42

    def test_before_it_started(self, own: Portal) -> None:
        """The loop is held up until the cancellation is queued behind the call."""
        hold, held = threading.Event(), threading.Event()

        async def hold_up() -> None:
            held.set()
            hold.wait(_TIMEOUT_S)  # to hold up the loop is the point

        holding = own.submit(hold_up)
        assert held.wait(_TIMEOUT_S)
        blocked = Blocked()
        future = own.submit(blocked)
        own.cancel_soon([future])
        hold.set()
        own.wait(holding)

        with pytest.raises(PortalError, match="cancelled"):
            future.result()
        assert not blocked.started.is_set()

    def test_the_grace_ends(
        self, own: Portal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A task that will not end holds nobody up for ever."""
        monkeypatch.setattr(_calls, "GRACE_S", 0.05)
        let_go = threading.Event()
        started = threading.Event()

        async def stubborn() -> None:
            started.set()
            try:
                await asyncio.Future()
            finally:
                await offload(let_go.wait, _TIMEOUT_S)

        future = own.submit(stubborn)
        assert started.wait(_TIMEOUT_S)
        own.cancel([future])
        assert not future.done
        assert "1 calls did not end within 0.05 s" in caplog.text
        monkeypatch.undo()
        let_go.set()
        with pytest.raises(PortalError):
            future.result()

    @pytest.mark.parametrize(
        ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, LookupError)]
    )
    def test_an_interrupt_cancels_the_call_and_waits(
        self, either: Portal, number: signal.Signals, raised: type[BaseException]
    ) -> None:
        """Ctrl-C, or a signal handler that raises, while the main thread waits for the portal."""
        handled: list[int] = []
        ended = threading.Event()

        def handler(*_: object) -> None:
            handled.append(number)
            if len(handled) == 1:
                raise raised

        async def interrupted() -> None:
            try:
                [call] = either._calls
                while len(call._callbacks) < 2:  # noqa: ASYNC110 - the waiter tells nobody
                    await asyncio.sleep(0)
                # One that comes just before the waiting thread sleeps does not wake it.
                while not handled:
                    os.kill(os.getpid(), number)
                    await asyncio.sleep(0.01)
                await asyncio.Future()
            finally:
                for _ in range(100):
                    await asyncio.sleep(0)
                ended.set()

        before = signal.signal(number, handler)
        try:
            with pytest.raises(raised):
                either.call(interrupted)
            assert ended.is_set()
        finally:
            signal.signal(number, before)
        assert either.call(answer) == 42

    def test_a_second_interrupt_does_not_end_the_waiting(self, either: Portal) -> None:
        """It is raised in place of the first, once the call has let go of its memory."""
        handled: list[int] = []
        ended = threading.Event()

        def handler(*_: object) -> None:
            handled.append(len(handled))
            if len(handled) <= 2:
                raise (KeyboardInterrupt, SystemExit)[handled[-1]]

        async def until_handled(count: int) -> None:
            while len(handled) < count:
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(0.01)

        async def interrupted() -> None:
            try:
                [call] = either._calls
                while len(call._callbacks) < 2:  # noqa: ASYNC110 - the waiter tells nobody
                    await asyncio.sleep(0)
                await until_handled(1)
                await asyncio.Future()
            finally:
                await until_handled(2)
                for _ in range(100):
                    await asyncio.sleep(0)
                ended.set()

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with pytest.raises(SystemExit):
                either.call(interrupted)
            assert ended.is_set()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert either.call(answer) == 42


class TestStart:
    def test_a_failure_reaches_the_caller(self) -> None:
        def broken() -> asyncio.AbstractEventLoop:
            raise OSError(24, "Too many open files")

        before = set(threading.enumerate())
        with pytest.raises(PortalError, match=r"could not start.*Too many open files") as caught:
            Portal(broken)

        assert isinstance(caught.value, S3Exception)
        assert isinstance(caught.value.__cause__, OSError)
        for thread in set(threading.enumerate()) - before:
            thread.join(_TIMEOUT_S)
            assert not thread.is_alive()

    def test_without_a_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As while the interpreter exits, from Python 3.12 on."""

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(PortalError, match=r"could not start.*interpreter shutdown"):
            Portal()

    def test_there_is_one_a_process(self) -> None:
        assert portal() is portal()
        assert portal().is_alive

    def test_a_closed_one_is_replaced(self) -> None:
        first = portal()
        first.close()
        assert portal() is not first
        assert portal().call(answer) == 42

    def test_no_thread_is_started_later(self, own: Portal) -> None:
        before = threading.active_count()

        async def work() -> None:
            await asyncio.gather(*(offload(sum, range(1000)) for _ in range(50)))

        own.call(work)
        assert threading.active_count() == before


class TestClose:
    def test_it_is_idempotent_and_ends_the_threads(self) -> None:
        before = set(threading.enumerate())
        own = Portal()
        assert own.is_alive
        started = set(threading.enumerate()) - before
        assert {thread.name.rpartition("-")[0] for thread in started} == {
            *("s3dcp", "s3dcp-worker", "s3dcp-resolver")
        }
        for _ in range(3):
            own.close()
            assert not own.is_alive
        assert not any(thread.is_alive() for thread in started)

    def test_from_two_threads(self, own: Portal) -> None:
        entered, go = threading.Event(), threading.Event()

        async def closer() -> None:
            entered.set()
            await offload(go.wait, _TIMEOUT_S)

        own.at_close(closer)
        threads = [threading.Thread(target=own.close) for _ in range(2)]
        threads[0].start()
        assert entered.wait(_TIMEOUT_S)
        threads[1].start()
        go.set()
        for thread in threads:
            thread.join(_TIMEOUT_S)
            assert not thread.is_alive()
        assert not own.is_alive

    def test_it_cancels_what_runs(self, either: Portal) -> None:
        blocked = Blocked(linger=10)
        future = either.submit(blocked)
        assert blocked.started.wait(_TIMEOUT_S)

        either.close()

        assert blocked.ended.is_set()
        with pytest.raises(PortalError, match="cancelled"):
            future.result()

    def test_it_closes_what_is_open_first(self, own: Portal) -> None:
        closed: list[str] = []

        async def close(name: str) -> None:
            await asyncio.sleep(0)
            closed.append(name)

        own.at_close(lambda: close("a"))
        own.at_close(lambda: close("b"))
        own.close()
        assert closed == ["a", "b"]

    def test_one_that_fails_does_not_keep_it_open(self, own: Portal) -> None:
        closed: list[str] = []

        async def close() -> None:
            closed.append("b")

        own.at_close(fail)
        own.at_close(close)
        own.close()
        assert not own.is_alive
        assert closed == ["b"]

    def test_a_call_during_it_is_refused_or_ended(self, own: Portal) -> None:
        """Whoever comes while it closes is told so, and never waits for ever."""
        blocked = Blocked()
        found: Future[PortalError] = Future()

        def intrude() -> None:
            try:
                own.call(blocked)
            except PortalError as exc:
                found.set_result(exc)

        thread = threading.Thread(target=intrude, daemon=True)

        async def closer() -> None:
            thread.start()
            # Either it has been refused, or its call has been queued and has begun.
            await offload(lambda: blocked.started.wait(0.2) or found.done())

        own.at_close(closer)
        own.close()
        assert isinstance(found.result(_TIMEOUT_S), PortalError)

    def test_what_tasks_started_is_ended_too(self, own: Portal) -> None:
        """A task in the background, which no call awaits, is not destroyed while it is pending."""
        blocked = Blocked()
        tasks: list[asyncio.Task[None]] = []

        async def start() -> None:
            tasks.append(asyncio.create_task(blocked()))
            await offload(blocked.started.wait, _TIMEOUT_S)

        own.call(start)
        own.close()
        assert blocked.ended.is_set()
        assert tasks[0].cancelled()

    def test_asynchronous_generators_are_closed(self, own: Portal) -> None:
        closed = threading.Event()
        kept: list[AsyncIterator[int]] = []

        async def numbers() -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0)
                closed.set()

        async def start() -> int:
            kept.append(numbers())
            return await anext(kept[0])

        assert own.call(start) == 1
        own.close()
        assert closed.is_set()

    def test_cancelling_on_a_closed_one_is_nothing(
        self, own: Portal, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "s3dcp.portal")
        future = own.submit(answer)
        own.wait(future)
        own.close()
        own.cancel_soon([future])
        own.cancel([future])
        assert "nothing to cancel" in caplog.text


class TestDeath:
    """The loop is stopped by somebody else."""

    def test_its_calls_end(self, either: Portal) -> None:
        blocked = Blocked(linger=10)
        call = either.submit(blocked)
        assert blocked.started.wait(_TIMEOUT_S)
        loop = either._thread.loop
        loop.call_soon_threadsafe(loop.stop)
        with pytest.raises(PortalError, match="cancelled"):
            call.result()
        assert blocked.ended.is_set()
        either.close()
        assert not either.is_alive
        with pytest.raises(PortalError, match="has ended"):
            either.call(answer)

    def test_so_do_those_that_had_not_begun(self, either: Portal) -> None:
        hold, held = threading.Event(), threading.Event()

        async def die() -> None:
            held.set()
            hold.wait(_TIMEOUT_S)  # to hold up the loop is the point
            asyncio.get_running_loop().stop()

        dying = either.submit(die)
        assert held.wait(_TIMEOUT_S)
        waiting = [either.submit(Blocked()) for _ in range(3)]
        hold.set()
        dying.wait()
        for call in waiting:
            with pytest.raises(PortalError):
                call.result()

    def test_the_next_call_gets_another(self) -> None:
        first = portal()
        first._thread.loop.call_soon_threadsafe(first._thread.loop.stop)
        first.close()
        assert portal() is not first
        assert portal().call(answer) == 42


class TestOffload:
    def test_results_and_errors(self, either: Portal) -> None:
        def broken() -> None:
            raise LookupError("in a worker")

        async def work() -> tuple[str, int]:
            with pytest.raises(LookupError, match="in a worker"):
                await offload(broken)
            name = await offload(lambda: threading.current_thread().name)
            return name, await offload(sum, range(5))

        name, total = either.call(work)
        assert name.startswith("s3dcp-worker-")
        assert total == 10

    def test_the_loop_goes_on_meanwhile(self, own: Portal) -> None:
        release = threading.Event()

        async def work() -> bool:
            waiting = asyncio.ensure_future(offload(release.wait, _TIMEOUT_S))
            await asyncio.sleep(0)
            release.set()
            return await waiting

        assert own.call(work)

    def test_what_was_cancelled_in_the_queue_does_not_run(self, own: Portal) -> None:
        release = threading.Event()
        ran: list[int] = []

        async def work() -> None:
            count = worker_count()
            busy = [asyncio.ensure_future(offload(release.wait, _TIMEOUT_S)) for _ in range(count)]
            queued = asyncio.ensure_future(offload(ran.append, 1))
            await asyncio.sleep(0)
            queued.cancel()
            await asyncio.wait([queued])
            release.set()
            await asyncio.gather(*busy)
            await offload(id, None)

        own.call(work)
        assert ran == []


class TestExit:
    def test_work_in_flight_is_ended(self) -> None:
        program = """
import asyncio, threading
from s3dcp._portal import portal
started = threading.Event()
async def work():
    try:
        started.set()
        await asyncio.Future()
    finally:
        await asyncio.sleep(0)
        print("ended", flush=True)
portal().submit(work)
assert started.wait(60)
"""
        assert run(program) == "ended\n"

    def test_calls_and_offload_work_during_it(self) -> None:
        """When executors refuse new work, and threads cannot be started (Python 3.12 and on)."""
        program = """
import atexit, threading
from concurrent.futures import ThreadPoolExecutor
from s3dcp._portal import offload, portal
pool = ThreadPoolExecutor(1)
pool.submit(int).result()
portal()
async def work():
    return await offload(threading.current_thread), await offload(sum, range(5))
def leave():
    try:
        pool.submit(int)
    except RuntimeError:
        print("executors refuse", flush=True)
    thread, total = portal().call(work)
    print(thread.name.rpartition("-")[0], total, flush=True)
atexit.register(leave)
"""
        assert run(program).splitlines() == [
            "executors refuse",
            "s3dcp-worker 10",
        ]

    def test_a_thread_that_is_saving_is_waited_for(self) -> None:
        """As in `async_save`: a thread that the main one leaves behind."""
        program = """
import threading
from s3dcp._portal import offload, portal
here, go = portal(), threading.Event()
async def work():
    return await offload(sum, range(5))
def save():
    threading.main_thread().join()
    print(here.call(work), flush=True)
threading.Thread(target=save).start()
"""
        assert run(program) == "10\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
class TestFork:
    def test_the_child_gets_a_portal_of_its_own(self) -> None:
        # Python 3.12 warns of a fork beside threads, which is what is tested.
        program = """
import os, sys, warnings
from s3dcp._portal import portal
warnings.simplefilter("ignore", DeprecationWarning)
async def answer():
    return os.getpid()
before = portal()
assert before.call(answer) == os.getpid()
child = os.fork()
if not child:
    assert portal() is not before
    assert portal().call(answer) == os.getpid()
    sys.exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert portal() is before
assert before.call(answer) == os.getpid()
print("done")
"""
        assert run(program) == "done\n"

    def test_while_another_thread_makes_one(self) -> None:
        """The lock that this thread holds at the moment of the fork does not hold up the child."""
        program = """
import os, sys, threading, warnings
import s3dcp._portal as module
warnings.simplefilter("ignore", DeprecationWarning)
async def answer():
    return 42
held, release = threading.Event(), threading.Event()
def hold():
    with module._lock:
        held.set()
        release.wait(60)
thread = threading.Thread(target=hold)
thread.start()
held.wait(60)
child = os.fork()
if not child:
    assert module.portal().call(answer) == 42
    os._exit(7)
release.set()
thread.join()
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert module.portal().call(answer) == 42
print("done")
"""
        assert run(program) == "done\n"

    def test_the_parents_portal_refuses_the_childs_calls(self) -> None:
        program = """
import os, warnings
from s3dcp._errors import PortalError
from s3dcp._portal import portal
warnings.simplefilter("ignore", DeprecationWarning)
async def answer():
    return 42
before = portal()
child = os.fork()
if not child:
    try:
        before.call(answer)
    except PortalError:
        os._exit(7)
    os._exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
print("done")
"""
        assert run(program) == "done\n"
