"""The example service over HTTP: it goes over to newer checkpoints while it answers requests.

How late its loop is, it says itself, and which part of that was its own doing: the time for which
its process ran. The rest is the machine's, which other tests keep busy. Two medians of the worst
delays in each of several reloads are asserted to be under 20 ms: that of the loop's own part; and
that of all of it, by the clock, beyond what the machine did to the same loop right before, without
a reload, or meanwhile to a process that does nothing, whichever is more. A loop that waits for S3
would be late in every reload.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from statistics import median, quantiles
from typing import Any, NamedTuple, Self

import pytest
import torch

import s3dcp
from s3dcp.testing import FakeS3, FakeS3Process
from tests._servers import use
from tests.test_examples import _EXAMPLES, _Runner, run

__all__ = ["run"]  # the fixture

_LIMIT_S = 60.0
_MOST_LATE_MS = 20.0
_TEXT = b"import asyncio"
_RELOADS = 7
_RUN, _KEPT = "s3://bucket/run", "s3://bucket/kept"

pytestmark = pytest.mark.timeout(3 * _LIMIT_S)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3Process]:
    with FakeS3.process() as process:
        process.create_bucket("bucket")
        use(process, monkeypatch)
        yield process


class Delays(NamedTuple):
    """How late a loop was, in ms."""

    all: float
    own: float

    @classmethod
    def of(cls, health: Any) -> Self:
        return cls(health["delay_ms"], health["own_delay_ms"])

    def or_worse(self, other: Self) -> Self:
        return type(self)(max(self.all, other.all), max(self.own, other.own))


_IDLE = """
import sys, threading, time

worst_s = 0.0

def watch():
    global worst_s
    while True:
        due_s = time.perf_counter() + 0.002
        time.sleep(0.002)
        worst_s = max(worst_s, time.perf_counter() - due_s)

threading.Thread(target=watch, daemon=True).start()
for _ in sys.stdin:
    taken_s, worst_s = worst_s, 0.0
    print(1e3 * taken_s, flush=True)
"""


@contextmanager
def idle_process() -> Iterator[Callable[[], float]]:
    """Yield what tells how late an idle process has been since this was last asked, in ms."""
    with subprocess.Popen(
        [sys.executable, "-c", _IDLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        asked, told = process.stdin, process.stdout
        assert asked is not None
        assert told is not None

        def ask() -> float:
            asked.write("\n")
            asked.flush()
            return float(told.readline())

        ask()  # so that it runs
        yield ask


class Service:
    """The service, as its clients see it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.latencies_s: list[float] = []
        self.answers: list[tuple[str, float]] = []

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Send one request on a connection of its own."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as link:
            return _ask(link, method, path, body)

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Ask for scores without a pause; not one request may fail."""
        done = threading.Event()
        failures: list[BaseException] = []

        def load() -> None:
            try:
                with closing(http.client.HTTPConnection("127.0.0.1", self._port)) as link:
                    while not done.is_set():
                        began_s = time.perf_counter()
                        status, answer = _ask(link, "POST", "/score", _TEXT)
                        self.latencies_s.append(time.perf_counter() - began_s)
                        assert status == 200, answer
                        self.answers.append((answer["checkpoint"], answer["loss"]))
            except BaseException as exc:  # noqa: BLE001 - raised below
                failures.append(exc)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(_LIMIT_S)
        assert failures == []

    def delays(self) -> Delays:
        """Return the worst delays of the loop since this was last asked."""
        return Delays.of(self.ask("GET", "/health")[1])

    def wait_for(self, uri: str) -> Delays:
        """Return the worst delays of the loop until a checkpoint is served."""
        worst = Delays(0.0, 0.0)

        def served() -> bool:
            nonlocal worst
            health = self.ask("GET", "/health")[1]
            worst = worst.or_worse(Delays.of(health))
            return bool(health["checkpoint"] == uri)

        until(served)
        return worst


def _ask(
    link: http.client.HTTPConnection, method: str, path: str, body: bytes = b""
) -> tuple[int, Any]:
    link.request(method, path, body)
    answer = link.getresponse()
    raw = answer.read()
    return answer.status, json.loads(raw) if answer.status == 200 else raw.decode()


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@contextmanager
def served(run: _Runner) -> Iterator[Service]:
    """Run the service until it is told to stop, which it does at once and without an error."""
    script = str(_EXAMPLES / "serve_model.py")
    options = ("--uri", _RUN, "--save-to", _KEPT, "--port", "0", "--poll-s", "0.1")
    with run.start("-u", script, *options) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:([1-9]\d*)", line)
            assert found, f"{line}{run.logged()}"
            yield Service(int(found[1]))
            process.send_signal(signal.SIGTERM)
            assert process.wait(_LIMIT_S) == 0, run.logged()
        finally:
            process.kill()


def gpt(seed: int) -> torch.nn.Module:
    """Return the example's model, with weights of its own."""
    spec = importlib.util.spec_from_file_location("gpt", _EXAMPLES / "gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    model: torch.nn.Module = module.GPT()
    return model


def loss_of(model: torch.nn.Module) -> float:
    text = torch.tensor([list(_TEXT)])
    with torch.inference_mode():
        return float(model(text[:, :-1], text[:, 1:]))


def publish(step: int, run: str = _RUN) -> tuple[str, float]:
    """Save a checkpoint as a training run does; return its place, and the loss that it gives."""
    model = gpt(step)
    uri = f"{run}/step-{step}"
    s3dcp.save({"training": {"model": model.state_dict(), "step": step}}, uri)
    return uri, loss_of(model)


def publish_damaged(step: int) -> None:
    """Publish a checkpoint with a flipped bit: whole, by its looks."""
    publish(step, "s3://bucket/aside")

    async def copy() -> None:
        async with s3dcp.S3Client() as client:
            prefix = f"aside/step-{step}/"
            keys = [info.key async for info in client.list_objects("bucket", prefix)]
            for key in sorted(keys, reverse=True):  # `.metadata` is the last
                body = await client.get_object("bucket", key)
                if key.endswith(".distcp"):
                    body[len(body) // 2] ^= 1
                await client.put_object("bucket", key.replace("aside/", "run/"), body)

    asyncio.run(copy())


def test_it_answers_while_it_reloads_and_saves(run: _Runner, server: FakeS3Process) -> None:
    without, reloads, machine_ms = [], [], []
    with served(run) as service, idle_process() as idle_ms:
        assert service.ask("POST", "/score", _TEXT)[0] == 503
        uri, loss = publish(1)
        published = {uri: loss}
        service.wait_for(f"{_RUN}/step-1")
        with service.under_load():
            for step in range(2, 2 + _RELOADS):
                service.delays()
                publish(step, "s3://bucket/aside")  # as busy a machine, and no reload
                without.append(service.delays())
                idle_ms()
                published |= [publish(step)]
                reloads.append(service.wait_for(f"{_RUN}/step-{step}"))
                machine_ms.append(idle_ms())
            saved = service.ask("POST", "/save")

    assert saved == (200, {"checkpoint": f"{_RUN}/step-{step}", "saved": f"{_KEPT}/step-{step}"})
    copy = gpt(0)
    s3dcp.load({"training": {"model": copy.state_dict()}}, f"{_KEPT}/step-{step}")
    assert loss_of(copy) == published[f"{_RUN}/step-{step}"]
    losses = sorted(published.values())
    apart = min(after - before for before, after in pairwise(losses))
    assert apart > 1e-4  # so that a mixture of two is told from either
    for uri, loss in service.answers:
        assert loss == pytest.approx(published[uri], abs=apart / 10)
    assert {uri for uri, _ in service.answers} == set(published)
    cuts = quantiles(service.latencies_s, n=100)
    own_ms = median(each.own for each in reloads)
    beyond_ms = median(
        reload.all - max(before.all, machine)
        for reload, before, machine in zip(reloads, without, machine_ms, strict=True)
    )
    print(  # noqa: T201 - what the test has found out: `pytest -rP` shows it
        f"{len(service.answers)} requests during {len(reloads)} reloads, none failed: "
        f"p50 {1e3 * cuts[49]:.1f} ms, p99 {1e3 * cuts[98]:.1f} ms. The loop's worst delay, median "
        f"of the reloads: {own_ms:.1f} ms ({median(each.own for each in without):.1f} without), "
        f"with the machine's part {median(each.all for each in reloads):.1f} ms "
        f"({median(each.all for each in without):.1f} without, {median(machine_ms):.1f} of an idle "
        f"process), {beyond_ms:.1f} ms beyond what the machine did"
    )
    assert own_ms < _MOST_LATE_MS, reloads
    assert beyond_ms < _MOST_LATE_MS, (reloads, without, machine_ms)


def test_it_goes_on_with_what_it_has(run: _Runner, server: FakeS3Process) -> None:
    """Where the newest checkpoint is damaged, and where the store is gone."""
    uri, loss = publish(1)
    with served(run) as service:
        service.wait_for(uri)
        publish_damaged(2)
        until(lambda: "not reloaded" in run.logged())
        assert service.ask("POST", "/score", _TEXT)[1]["checkpoint"] == uri
        server.stop()
        until(lambda: run.logged().count("not reloaded") > 1)
        status, answer = service.ask("POST", "/score", _TEXT)
        assert status == 200
        assert answer == {"checkpoint": uri, "loss": pytest.approx(loss)}
        status, text = service.ask("POST", "/save")
        assert status == 502
        assert "127.0.0.1" in text
