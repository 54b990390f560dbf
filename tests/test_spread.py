"""Bodies over several loops: which do, that nothing else changes, and how the loops end."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme

import s3dcp
from s3dcp import IntegrityError, PortalError, S3ClientConfig, _spread
from s3dcp._client import S3Store
from s3dcp._portal import Portal
from s3dcp._spread import SpreadStore
from s3dcp.testing import Cut, Drop, FakeS3, Fault, FlipByte, Stall
from tests._fakes import uri_of
from tests._states import assert_same, blank

MiB = 1 << 20

FOUR_LOOPS = S3ClientConfig(throughput_target_gbps=40.0, part_size=5 * MiB)
STATE = {f"layer.{n}": torch.randint(0, 255, (6 * MiB,), dtype=torch.uint8) for n in range(6)}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def shared_fake(authority: trustme.CA) -> Iterator[FakeS3]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FakeS3(ssl_context=context) as server:
        yield server


@pytest.fixture
def fake(
    fake: FakeS3, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FakeS3:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    return fake


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[int]]:
    """How many calls of a store's methods each thread has made."""
    counts: dict[str, Counter[int]] = {}

    def counted(name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        counts[name] = Counter()

        def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            counts[name][threading.get_ident()] += 1
            return method(*args, **kwargs)

        return call

    for name in ("get", "get_range", "put", "upload_part", "create_upload", "complete_upload"):
        monkeypatch.setattr(S3Store, name, counted(name, getattr(S3Store, name)))
    return counts


def test_large_bodies_go_over_all_loops(fake: FakeS3, threads: dict[str, Counter[int]]) -> None:
    s3dcp.save(STATE, uri_of("run"), s3client_config=FOUR_LOOPS)
    target = blank(STATE)
    s3dcp.load(target, uri_of("run"), s3client_config=FOUR_LOOPS)

    assert_same(target, STATE)
    assert {name: len(by_thread) for name, by_thread in threads.items()} == {
        "get": 1,
        "get_range": 4,
        "put": 1,  # the commit's
        "upload_part": 4,
        "create_upload": 1,
        "complete_upload": 1,
    }
    for name in ("get_range", "upload_part"):
        by_thread = threads[name].values()
        assert max(by_thread) - min(by_thread) <= 2


def test_small_bodies_stay(fake: FakeS3, threads: dict[str, Counter[int]]) -> None:
    state = {f"layer.{n}": torch.arange(1000) for n in range(8)}
    s3dcp.save(state, uri_of("run"), s3client_config=FOUR_LOOPS)
    s3dcp.load(blank(state), uri_of("run"), s3client_config=FOUR_LOOPS)

    assert {len(by_thread) for by_thread in threads.values()} <= {0, 1}
    assert len(threads["put"]) == 1


@pytest.mark.parametrize(
    ("work", "operation", "fault"),
    [
        (s3dcp.save, "UploadPart", Drop(reset=True)),
        (s3dcp.load, "GetObject", Cut(body_bytes=MiB)),
    ],
)
def test_what_breaks_off_is_tried_again(
    fake: FakeS3, work: Callable[..., Any], operation: str, fault: Fault
) -> None:
    s3dcp.save(STATE, uri_of("run"), s3client_config=FOUR_LOOPS)
    rule = fake.inject(fault, operation=operation, key="*.distcp", times=4)
    reports: list[s3dcp.Report] = []
    state = blank(STATE) if work is s3dcp.load else STATE
    work(state, uri_of("run"), s3client_config=FOUR_LOOPS, on_report=reports.append)

    rule.wait(4)
    assert_same(state, STATE)
    assert reports[0].retries == 4


def test_damage_is_named(fake: FakeS3) -> None:
    s3dcp.save(STATE, uri_of("run"), s3client_config=FOUR_LOOPS)
    fake.inject(FlipByte(3 * MiB), operation="GetObject", key="*.distcp", times=None)
    with pytest.raises(IntegrityError, match=r"layer\.\d"):
        s3dcp.load(blank(STATE), uri_of("run"), s3client_config=FOUR_LOOPS)


def test_a_cancel_ends_what_the_other_loops_do(fake: FakeS3) -> None:
    s3dcp.save(STATE, uri_of("run"), s3client_config=FOUR_LOOPS)
    rule = fake.inject(Stall(body_bytes=MiB), operation="GetObject", key="*.distcp", times=None)
    target = blank(STATE)

    async def main() -> None:
        loading = asyncio.create_task(
            s3dcp.aload(target, uri_of("run"), s3client_config=FOUR_LOOPS)
        )
        await asyncio.to_thread(rule.wait, 4)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading

    asyncio.run(main())
    left = {name: tensor.clone() for name, tensor in target.items()}
    rule.release()
    fake.rules.clear()
    s3dcp.load(blank(STATE), uri_of("run"), s3client_config=FOUR_LOOPS)  # on the same loops
    assert_same(target, left)  # nobody wrote into it any more


@pytest.mark.parametrize(
    ("encrypted", "gbps", "threads"), [(True, 40.0, 3), (True, 1.0, 0), (False, 40.0, 0)]
)
def test_threads_start_where_there_is_tls_and_end_with_the_portal(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch, encrypted: bool, gbps: float, threads: int
) -> None:
    url = fake.endpoint_url if encrypted else fake.endpoint_url.replace("https", "http")
    config = S3ClientConfig(endpoint_url=url, throughput_target_gbps=gbps)
    before = set(threading.enumerate())
    here = Portal()
    own = set(threading.enumerate()) - before
    store = SpreadStore(None, config)
    here.at_close(store.close)
    here.call(store.open)
    others = set(threading.enumerate()) - before - own
    assert len([thread for thread in others if thread.name == "s3dcp-portal"]) == threads

    here.close()
    assert not set(threading.enumerate()) - before


def test_it_makes_do_with_the_threads_that_start(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[Portal] = []

    def scarce() -> Portal:
        if started:
            raise PortalError("can't start new thread")
        started.append(Portal())
        return started[0]

    monkeypatch.setattr(_spread, "Portal", scarce)
    target = blank(STATE)
    # No client has these settings yet.
    config = replace(FOUR_LOOPS, read_timeout_s=59.0)
    s3dcp.save(STATE, uri_of("run"), s3client_config=config)
    s3dcp.load(target, uri_of("run"), s3client_config=config)

    assert_same(target, STATE)
    assert "TLS is left to 2 loops: can't start new thread" in caplog.messages
