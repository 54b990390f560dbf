"""Buckets that are elsewhere: followed where no region was given, and refused where one was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import s3dcp
from s3dcp import S3Client, S3FileSystem, S3StorageReader, S3StorageWriter, WrongRegionError
from s3dcp.testing import FakeS3, Refuse, wrong_region
from tests._fakes import addressed, unwrapped

HOME, ELSEWHERE = "us-east-1", "ap-south-1"
# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """A server of `HOME` that nobody has asked yet, and no region in the environment."""
    with FakeS3(region=HOME) as server, addressed(server):
        monkeypatch.delenv("AWS_REGION")
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        server.create_bucket("here")
        server.create_bucket("away", ELSEWHERE)
        server.create_bucket("far", "sa-east-1")
        yield server


def statuses(server: FakeS3, *wanted: int) -> list[tuple[str, int | None]]:
    return [(each.operation, each.status) for each in server.requests if each.status in wanted]


def redirects(server: FakeS3) -> int:
    return len(statuses(server, 301, 400))


def state(value: float) -> dict[str, Any]:
    return {"weight": torch.full((64,), value), "step": int(value)}


def one_line(uri: str, region: str | None = None) -> None:
    loaded = state(0.0)
    s3dcp.save(state(3.0), uri, region=region)
    s3dcp.load(loaded, uri, region=region)
    assert loaded["step"] == 3


async def _awaited(uri: str, region: str | None) -> None:
    loaded = state(0.0)
    await s3dcp.asave(state(4.0), uri, region=region)
    await s3dcp.aload(loaded, uri, region=region)
    assert loaded["step"] == 4


def awaited(uri: str, region: str | None = None) -> None:
    asyncio.run(_awaited(uri, region))


def writer_and_reader(uri: str, region: str | None = None) -> None:
    loaded = state(0.0)
    with unwrapped():
        dcp.save(state(5.0), storage_writer=S3StorageWriter(region, uri), no_dist=True)
        dcp.load(loaded, storage_reader=S3StorageReader(region, uri), no_dist=True)
    assert loaded["step"] == 5


def file_system(uri: str, region: str | None = None) -> None:
    fs = S3FileSystem(region)
    with fs.create_stream(uri, "wb") as stream:
        stream.write(b"body")
    with fs.create_stream(uri, "rb") as stream:
        assert stream.read() == b"body"
    fs.rename(uri, f"{uri}-2")
    assert fs.exists(f"{uri}-2")
    fs.rm_file(f"{uri}-2")
    assert not fs.ls(uri)


def client(uri: str, region: str | None = None) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")

    async def use() -> None:
        async with S3Client(region) as client:
            await client.put_object(bucket, key, b"body")
            assert await client.get_object(bucket, key) == b"body"
            assert [info.key async for info in client.list_objects(bucket, key)] == [key]

    asyncio.run(use())


def catalog(uri: str, region: str | None = None) -> None:
    assert s3dcp.latest(uri, region=region) is None


DOORS = [one_line, awaited, writer_and_reader, file_system, client, catalog]
Door = Callable[..., None]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("environ", [None, HOME, "eu-west-3"], ids=["none", "here", "third"])
def test_a_bucket_is_followed(
    server: FakeS3, monkeypatch: pytest.MonkeyPatch, door: Door, environ: str | None
) -> None:
    """Once, and then remembered: 301 from the wrong endpoint, 400 for the wrong signature."""
    if environ is not None:
        monkeypatch.setenv("AWS_REGION", environ)
    door("s3://away/run/x")

    assert redirects(server) == 1
    door("s3://away/run/y")
    assert redirects(server) == 1


@pytest.mark.parametrize("door", DOORS)
def test_a_region_that_was_given_is_kept_to(server: FakeS3, door: Door) -> None:
    with pytest.raises(WrongRegionError, match=f"is in '{ELSEWHERE}': pass region='{ELSEWHERE}'"):
        door("s3://away/run/x", region=HOME)

    assert len(server.requests) == 1
    door("s3://away/run/x", region=ELSEWHERE)


def test_every_bucket_has_its_own(server: FakeS3) -> None:
    for _ in range(2):
        for bucket in ("here", "away", "far"):
            client(f"s3://{bucket}/key")

    assert redirects(server) == 2


def test_a_body_is_sent_again_whole(server: FakeS3) -> None:
    data = bytes(range(256)) * 4096
    asyncio.run(S3Client().put_object("away", "key", data))

    assert statuses(server, 301, 200) == [("PutObject", 301), ("PutObject", 200)]
    assert server.read("away", "key") == data


def test_an_answer_that_does_not_say_where(server: FakeS3) -> None:
    """A HEAD's has no body, and not every store sends the header: HeadBucket's has it."""
    server.inject(Refuse("PermanentRedirect", at="head"), operation="HeadObject")
    server.write("away", "key", b"body")
    assert asyncio.run(S3Client().head_object("away", "key")).size_bytes == 4

    assert [(each.operation, each.status) for each in server.requests] == [
        ("HeadObject", 301),
        ("HeadBucket", 301),
        ("HeadBucket", 200),
        ("HeadObject", 200),
    ]


def test_it_is_followed_once(server: FakeS3) -> None:
    server.inject(wrong_region("mars-north-1"), times=None)
    with pytest.raises(WrongRegionError, match="mars-north-1"):
        asyncio.run(S3Client().get_object("here", "key", 0, 4))

    assert len(server.requests) == 2
