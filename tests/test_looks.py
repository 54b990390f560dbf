"""What a save asks for first: what is there already, while its uploads begin."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan

from s3dcp import CheckpointExistsError, S3StorageReader, S3StorageWriter
from s3dcp._config import MiB
from s3dcp._errors import AccessDeniedError
from s3dcp.testing import Exchange, FakeS3, Fault, Refuse
from tests._states import StateDict, assert_same, blank, fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

LARGE: StateDict = {"a": fill((3, MiB)), "b": 1}  # two parts
SMALL: StateDict = {"a": fill((4,))}


@pytest.fixture
def uri(fake: FakeS3) -> str:
    bucket = f"looks-{secrets.token_hex(6)}"
    fake.create_bucket(bucket)
    return f"s3://{bucket}/ck"


def save(uri: str, state: StateDict, *, overwrite: bool = True) -> None:
    writer = S3StorageWriter(None, uri, overwrite=overwrite)
    dcp.save(state, storage_writer=writer, no_dist=True)


def load(uri: str, state: StateDict) -> StateDict:
    target: StateDict = blank(state)
    dcp.load(target, storage_reader=S3StorageReader(None, uri), no_dist=True)
    return target


def operations(fake: FakeS3) -> list[str]:
    return [record.operation for record in fake.requests]


@dataclass(frozen=True)
class Late(Fault):
    """Answers once the rule is released."""

    async def play(self, exchange: Exchange) -> None:
        await exchange.stall()
        await super().play(exchange)


def test_uploads_begin_meanwhile(fake: FakeS3, uri: str) -> None:
    """One round trip for both; but no byte is sent before it is known what is there."""
    look = fake.inject(Late(), operation="GetObject", key="ck/.metadata")
    begun = fake.inject(Late(), operation="CreateMultipartUpload")
    with ThreadPoolExecutor() as pool:
        saving = pool.submit(save, uri, LARGE)
        look.wait()
        begun.wait()
        begun.release()
        look.release()
        saving.result()
    first, second, *rest = operations(fake)
    assert {first, second} == {"GetObject", "CreateMultipartUpload"}
    assert rest == ["UploadPart", "UploadPart", "CompleteMultipartUpload", "PutObject"]
    assert_same(load(uri, LARGE), LARGE)


@pytest.mark.parametrize("state", [LARGE, SMALL])
def test_a_bucket_that_may_not_be_read(fake: FakeS3, uri: str, state: StateDict) -> None:
    """Nothing is sent, and what was begun is aborted."""
    fake.inject(Refuse("AccessDenied"), operation="GetObject")
    with pytest.raises(dcp.CheckpointException) as caught:
        save(uri, state)
    [(failure, _)] = caught.value.failures.values()
    assert isinstance(failure, AccessDeniedError)
    assert not {"UploadPart", "PutObject"} & set(operations(fake))
    assert fake.uploads(uri.split("/")[2]) == {}


def test_other_ranks_hear_of_it_while_they_plan(fake: FakeS3, uri: str) -> None:
    fake.inject(Refuse("AccessDenied"), operation="GetObject")
    writer = S3StorageWriter(None, uri)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(SavePlan([]))
    with pytest.raises(AccessDeniedError):
        writer.prepare_global_plan([plan, SavePlan([])])


def test_what_may_not_be_replaced_is_known_before_anything_begins(fake: FakeS3, uri: str) -> None:
    save(uri, SMALL)
    fake.forget()
    with pytest.raises(dcp.CheckpointException) as caught:
        save(uri, LARGE, overwrite=False)
    [(failure, _)] = caught.value.failures.values()
    assert isinstance(failure, CheckpointExistsError)
    assert operations(fake) == ["GetObject"]


def test_an_upload_that_begins_for_less_than_a_part(fake: FakeS3, uri: str) -> None:
    """The plan says 16 MiB of a sparse tensor, of which three values are stored."""
    at, values = torch.arange(6).view(2, 3), torch.ones(3)
    sparse = torch.sparse_coo_tensor(at, values, (2048, 2048), check_invariants=True)
    save(uri, {"a": sparse})
    assert operations(fake).count("UploadPart") == 1
    target = {"a": torch.zeros_like(sparse)}
    dcp.load(target, storage_reader=S3StorageReader(None, uri), no_dist=True)
    assert torch.equal(target["a"].to_dense(), sparse.to_dense())
