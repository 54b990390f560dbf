"""A load of a checkpoint of the other format is told what loads it, at no request of any other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import s3dcp
from s3dcp import (
    AccessDeniedError,
    CheckpointNotFoundError,
    S3Exception,
    S3HuggingFaceStorageReader,
    S3StorageReader,
)
from s3dcp.testing import FakeS3, Refuse
from tests import _hf
from tests._catalogs import put_data
from tests._fakes import BUCKET, uri_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from s3dcp.testing import Record

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

URI = uri_of("run")
OTHER_FORMAT = r"There is one of safetensors: load it with dcp\.load and S3HuggingFaceStorageReader"
DCP_FORMAT = r"There is one of DCP: load it with s3dcp\.load, or dcp\.load and S3StorageReader"


def state() -> dict[str, Any]:
    return {"w": torch.ones(4)}


def load() -> None:
    s3dcp.load(state(), URI)


def aload() -> None:
    asyncio.run(s3dcp.aload(state(), URI))


def with_reader() -> None:
    dcp.load(state(), storage_reader=S3StorageReader(None, URI), no_dist=True)


def with_safetensors_reader() -> None:
    dcp.load(state(), storage_reader=S3HuggingFaceStorageReader(None, URI), no_dist=True)


def save() -> None:
    s3dcp.save(state(), URI)


def save_without_collectives() -> None:
    s3dcp.save(state(), URI, use_collectives=False)


def save_safetensors() -> None:
    _hf.save(state(), "run")


def save_shards() -> None:
    _hf.save(state(), "run", save_distributed=True)


def save_single(fake: FakeS3) -> None:
    save_safetensors()
    [file] = [key for key in fake.keys(BUCKET) if key.endswith(".safetensors")]
    body = fake.read(BUCKET, file)
    for key in fake.keys(BUCKET):
        fake.delete(BUCKET, key)
    fake.write(BUCKET, "run/model.safetensors", body)


def refuse_listings(fake: FakeS3) -> None:
    """Answer as S3 does who has no s3:ListBucket: what is not there is denied."""

    def is_hidden(record: Record) -> bool:
        return record.operation == "ListObjectsV2" or record.key not in fake.keys(BUCKET)

    fake.inject(Refuse("AccessDenied"), where=is_hidden, times=None)


def requests(fake: FakeS3) -> list[str]:
    return [f"{each.operation} {each.key.removeprefix('run/')}" for each in fake.requests]


@pytest.mark.parametrize("listed", [True, False], ids=["", "no s3:ListBucket"])
@pytest.mark.parametrize("write", [save_safetensors, save_shards, save_single])
@pytest.mark.parametrize("read", [load, aload])
def test_safetensors_in_one_call(
    fake: FakeS3, read: Callable[[], None], write: Callable[..., None], listed: bool
) -> None:
    write(*[fake] * (write is save_single))
    if not listed:
        refuse_listings(fake)

    with pytest.raises(CheckpointNotFoundError if listed else AccessDeniedError) as caught:
        read()

    assert caught.match(OTHER_FORMAT)
    assert caught.match(rf"{URI}/\.metadata")


@pytest.mark.parametrize("listed", [True, False], ids=["", "no s3:ListBucket"])
@pytest.mark.parametrize(
    ("write", "read", "says"),
    [
        (save_safetensors, with_reader, OTHER_FORMAT),
        (save, with_safetensors_reader, DCP_FORMAT),
    ],
)
def test_with_a_reader(
    fake: FakeS3, write: Callable[[], None], read: Callable[[], None], says: str, listed: bool
) -> None:
    write()
    if not listed:
        refuse_listings(fake)

    with pytest.raises(CheckpointException, match=says):
        read()


def test_a_rank_without_collectives_is_dcp_too(fake: FakeS3) -> None:
    save_without_collectives()

    with pytest.raises(CheckpointException, match=DCP_FORMAT):
        with_safetensors_reader()


@pytest.mark.parametrize("listed", [True, False], ids=["", "no s3:ListBucket"])
@pytest.mark.parametrize("read", [load, with_reader, with_safetensors_reader])
def test_where_there_is_none_of_either(
    fake: FakeS3, read: Callable[[], None], listed: bool
) -> None:
    put_data(fake, "run/", "__0_0.distcp", "config.json")
    if not listed:
        refuse_listings(fake)

    with pytest.raises((S3Exception, CheckpointException)) as caught:
        read()

    assert "There is one of" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "read", "metadata"),
    [
        (save, load, ["GetObject .metadata"]),
        (save_without_collectives, load, ["GetObject .metadata", "GetObject __0.metadata"]),
        (save_without_collectives, with_reader, ["GetObject .metadata", "GetObject __0.metadata"]),
        (save_safetensors, with_safetensors_reader, [f"GetObject {_hf.INDEX}"]),
    ],
)
def test_a_load_that_succeeds_asks_for_nothing_of_the_other(
    fake: FakeS3, write: Callable[[], None], read: Callable[[], None], metadata: list[str]
) -> None:
    write()
    fake.forget()

    read()

    assert [
        each for each in requests(fake) if not each.endswith((".distcp", ".safetensors"))
    ] == metadata
