"""`s3dcp.load` on ranks: `.metadata` is read once for all, and what goes wrong is told to all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner

import s3dcp
from s3dcp import S3Exception, WeightsOnlyLoadPlanner
from s3dcp._group_reader import from_coordinator
from s3dcp.testing import FakeS3, Refuse
from tests._fakes import BUCKET, uri_of
from tests._ranks import RankPool

URI = uri_of("run/step-1")


@pytest.fixture(params=[2, 4])
def pool(request: pytest.FixtureRequest, ranks2: RankPool, ranks4: RankPool) -> RankPool:
    return {2: ranks2, 4: ranks4}[request.param]


def reads(fake: FakeS3) -> list[str]:
    """The names of the metadata that were read in whole, in order."""
    return sorted(
        record.key.rpartition("/")[2]
        for record in fake.requests
        if record.operation == "GetObject"
        and record.key.endswith(".metadata")
        and "range" not in record.headers
    )


def save(uri: str, **options: Any) -> None:
    rank = dist.get_rank()
    state = {f"own-{rank}": torch.full((3,), float(rank)), "all": torch.arange(4), "step": 7}
    s3dcp.save(state, uri, **options)


def load(uri: str, **options: Any) -> tuple[str, str]:
    """Load on a rank; what was raised, and its text."""
    rank = dist.get_rank()
    state: dict[str, Any] = {f"own-{rank}": torch.zeros(3), "all": torch.zeros(4).long(), "step": 0}
    try:
        s3dcp.load(state, uri, **options)
    except BaseException as exc:  # noqa: BLE001 - what it is, is what is asked
        return type(exc).__name__, str(exc)
    assert state[f"own-{rank}"].tolist() == [float(rank)] * 3
    assert state["all"].tolist() == [0, 1, 2, 3]
    assert state["step"] == 7
    return "", ""


def load_awaited(uri: str) -> int:
    state = {"step": 0}
    asyncio.run(s3dcp.aload(state, uri))
    return state["step"]


def load_alone(uri: str) -> tuple[str, str]:
    return load(uri, no_dist=True)


def save_without_collectives(uri: str) -> None:
    planner = DefaultSavePlanner()
    save(uri, use_collectives=False, planner=planner)


def load_in_halves(uris: Sequence[str]) -> tuple[str, str]:
    """Each half of the ranks is a group with a checkpoint of its own.

    The coordinator of the second one is not the first rank of all.
    """
    size = dist.get_world_size()
    halves = [dist.new_group(list(range(start, start + size // 2))) for start in (0, size // 2)]
    half = dist.get_rank() // (size // 2)
    return load(uris[half], process_group=halves[half])


class FailsIn(WeightsOnlyLoadPlanner):
    """Fails on one rank, as soon as it has seen the metadata."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == self._rank:
            raise S3Exception("not here")
        super().set_up_planner(*args, **kwargs)


def load_failing(uri: str, rank: int) -> tuple[str, str]:
    return load(uri, planner=FailsIn(rank))


def test_it_is_read_once(pool: RankPool, fake: FakeS3) -> None:
    pool.run(save, URI)
    before = len(reads(fake))
    assert pool.run(load, URI) == [("", "")] * pool.world_size
    assert reads(fake)[before:] == [".metadata"]
    assert pool.run(load_awaited, URI) == [7] * pool.world_size
    assert reads(fake)[before:] == [".metadata"] * 2


def test_each_group_has_a_coordinator(ranks4: RankPool, fake: FakeS3) -> None:
    uris = URI, f"{URI}0"
    for uri in uris:
        ranks4.run(save, uri)
    before = len(reads(fake))
    assert ranks4.run(load_in_halves, uris) == [("", "")] * 4
    assert reads(fake)[before:] == [".metadata"] * 2


def test_without_a_group_all_read(ranks2: RankPool, fake: FakeS3) -> None:
    ranks2.run(save, URI)
    before = len(reads(fake))
    assert ranks2.run(load_alone, URI) == [("", "")] * 2
    assert reads(fake)[before:] == [".metadata"] * 2


def test_what_ranks_committed_by_themselves(ranks2: RankPool, fake: FakeS3) -> None:
    """There is no `.metadata`: one rank finds that out, and then all read their own."""
    ranks2.run(save_without_collectives, URI)
    before = len(fake.requests)
    assert ranks2.run(load, URI) == [("", "")] * 2
    asked = [each.key for each in fake.requests[before:] if each.key.endswith("metadata")]
    names = sorted(key.rpartition("/")[2] for key in asked)
    assert names == [".metadata", "__0.metadata", "__1.metadata"]


@pytest.mark.parametrize(
    ("code", "error"),
    [("AccessDenied", "AccessDeniedError"), ("InternalError", "ServerError")],
)
def test_an_error_is_everyones(pool: RankPool, fake: FakeS3, code: str, error: str) -> None:
    rule = fake.inject(Refuse(code, status=403 if code == "AccessDenied" else 500), times=None)
    config = s3dcp.S3ClientConfig(max_attempts=1)
    found = pool.run(load, URI, s3client_config=config)

    assert found == [found[0]] * pool.world_size
    assert found[0][0] == error
    assert f"{URI}/.metadata" in found[0][1]
    assert [each.key for each in rule.struck].count("run/step-1/.metadata") == 1


def test_all_unpickle_it_by_themselves(ranks2: RankPool, fake: FakeS3) -> None:
    fake.write(BUCKET, "run/step-1/.metadata", b"\x80\x04cos\nsystem\n(X\x01\x00\x00\x00atR.")
    found = ranks2.run(load, URI)

    assert [name for name, _ in found] == ["CorruptMetadataError"] * 2
    assert reads(fake) == [".metadata"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_does_not_keep_the_others(
    ranks2: RankPool, fake: FakeS3, rank: int
) -> None:
    ranks2.run(save, URI)
    assert ranks2.run(load_failing, URI, rank) == [("S3Exception", "not here")] * 2


def on_a_rank(raised: BaseException | None) -> tuple[int, str]:
    def find() -> int:
        if raised is not None:
            raise raised
        return os.getpid()

    try:
        return from_coordinator(find, None), ""
    except BaseException as exc:  # noqa: BLE001 - what it is, is what is asked
        return 0, repr(exc)


@pytest.mark.parametrize(
    "raised", [None, KeyboardInterrupt(), s3dcp.ThrottledError("x", status=503), OSError(5, "y")]
)
def test_what_the_coordinator_does_is_everyones(
    pool: RankPool, raised: BaseException | None
) -> None:
    found = pool.run(on_a_rank, raised)

    assert len(set(found)) == 1
    assert bool(found[0][0]) == (raised is None)
    assert found[0][1] == (repr(raised) if raised else "")
