"""Every error that the transport or a facade raises says what to do next, and to what.

One case or more for each public error, provoked as a user would meet it.
"""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

import s3dcp
from s3dcp import S3ClientConfig, S3FileSystem
from s3dcp import _errors as errors
from s3dcp._portal import portal
from s3dcp.testing import (
    Drop,
    FakeS3,
    FlipByte,
    Record,
    Refuse,
    Stall,
    WrongRange,
    lost_response,
)
from tests._fakes import BUCKET, data_keys, uri_of

URI = uri_of("run/step-1")
ONCE = S3ClientConfig(max_attempts=1)


def save(*, overwrite: bool = True) -> None:
    state = {"t": torch.arange(8.0), "step": 1}
    s3dcp.save(state, URI, s3client_config=ONCE, overwrite=overwrite)


def load(uri: str = URI, config: S3ClientConfig = ONCE) -> None:
    s3dcp.load({"t": torch.zeros(8), "step": 0}, uri, s3client_config=config)


def refused(code: str, fake: FakeS3) -> None:
    fake.inject(Refuse(code, at="head"), times=None)
    load()


def no_bucket(_: FakeS3) -> None:
    load("s3://no-such-bucket/run")


def no_credentials(_: FakeS3) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        load()


def another_region(fake: FakeS3) -> None:
    fake.create_bucket("away", "eu-west-1")
    s3dcp.load({}, "s3://away/run", region=fake.region)


def cut_short(fake: FakeS3) -> None:
    fake.inject(Drop(), times=None)
    load()


def nobody_listens(_: FakeS3) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        endpoint_url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        load(config=S3ClientConfig(max_attempts=1, endpoint_url=endpoint_url))


def silent(fake: FakeS3) -> None:
    fake.inject(Stall(), times=None)
    load(config=dataclasses.replace(ONCE, read_timeout_s=0.2))


def another_range(fake: FakeS3) -> None:
    save()
    fake.inject(WrongRange(), key="*.distcp", times=None)
    load()


def gone(fake: FakeS3) -> None:
    save()
    [key] = data_keys(fake, "run/step-1")
    fake.delete(BUCKET, key)
    load()


def there_already(_: FakeS3) -> None:
    save()
    save(overwrite=False)


def replaced(fake: FakeS3) -> None:
    save()

    def replace(_: Record) -> bool:
        fake.write(BUCKET, "run/step-1/.metadata", b"another")
        return True

    fake.inject(Refuse("NoSuchKey"), key="*.distcp", where=replace)
    load()


def unsettled(fake: FakeS3) -> None:
    """The commit's answer is lost, and what became of it cannot be read."""
    lost = fake.inject(lost_response(), operation="PutObject", key="*/.metadata")
    fake.inject(Refuse("AccessDenied"), key="*/.metadata", where=lambda _: bool(lost.struck))
    save()


class Forgetful(DefaultSavePlanner):
    """Leaves out of the writing what it has planned."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return dataclasses.replace(super().finish_plan(new_plan), items=[])


def incomplete(_: FakeS3) -> None:
    s3dcp.save({"t": torch.zeros(8)}, URI, planner=Forgetful())


def torn(fake: FakeS3) -> None:
    fake.write(BUCKET, "run/step-1/.metadata", b"\x80\x04]")
    load()


def flipped(fake: FakeS3) -> None:
    save()
    fake.inject(FlipByte(700), operation="GetObject", key="*.distcp", times=None)
    load()


class Ours:
    """Of a type that `weights_only=True` does not know."""


def in_the_way(_: FakeS3) -> None:
    save()
    s3dcp.copy(URI, __file__)


def unsafe(_: FakeS3) -> None:
    s3dcp.save({"x": Ours()}, URI)
    s3dcp.load({"x": 0}, URI)


def blocking_on_the_portal(_: FakeS3) -> None:
    async def main() -> None:
        S3FileSystem(None).exists(URI)

    portal().call(main)


CASES: list[tuple[type[errors.S3Exception], Callable[[FakeS3], object], str]] = [
    (errors.S3ConfigError, lambda _: S3ClientConfig(part_size=0), "must be a positive whole"),
    (errors.S3ConfigError, lambda _: load(config=S3ClientConfig(profile="x")), "check .*profile"),
    (errors.InvalidS3UriError, lambda _: load("/tmp/run"), "write s3://BUCKET/PREFIX"),
    (errors.InvalidS3UriError, lambda _: load("s3:///run"), "write s3://BUCKET/PREFIX"),
    (errors.S3CredentialsError, no_credentials, "set AWS_ACCESS_KEY_ID"),
    (errors.S3CredentialsError, partial(refused, "ExpiredToken"), "renew the credentials"),
    (errors.S3ConnectionError, cut_short, "check the network"),
    (errors.S3ConnectionError, nobody_listens, "check the endpoint's address"),
    (errors.S3TimeoutError, silent, "raise the timeouts"),
    (errors.S3ProtocolError, another_range, "a proxy that changes answers"),
    (errors.S3ServiceError, partial(refused, "NotImplemented"), "the store's documentation"),
    (errors.AccessDeniedError, partial(refused, "AccessDenied"), "check the policy"),
    (errors.AccessDeniedError, partial(refused, "RequestTimeTooSkewed"), "clock"),
    (errors.BucketNotFoundError, no_bucket, "create the bucket"),
    (errors.ObjectNotFoundError, gone, "load one of those"),
    (errors.WrongRegionError, another_region, "pass region='eu-west-1'"),
    (errors.PreconditionFailedError, partial(refused, "PreconditionFailed"), "read it again"),
    (errors.ConflictError, partial(refused, "OperationAborted"), "one client at a time"),
    (errors.ThrottledError, partial(refused, "SlowDown"), "use a prefix strategy"),
    (errors.ServerError, partial(refused, "InternalError"), "try again later"),
    (errors.CheckpointNotFoundError, lambda _: load(), "load another one"),
    (errors.CheckpointNotFoundError, lambda _: s3dcp.delete(URI), "List what there is"),
    (errors.CheckpointExistsError, there_already, "save to another path"),
    (errors.CheckpointChangedError, replaced, "load it again"),
    (errors.CommitConflictError, unsettled, "Load what is there before saving"),
    (errors.IncompleteSaveError, incomplete, "save again"),
    (errors.CorruptMetadataError, torn, "load an older checkpoint"),
    (errors.IntegrityError, flipped, "load an older checkpoint"),
    (errors.UnsafeItemError, unsafe, "pass weights_only=False"),
    (errors.DiskError, in_the_way, "copy to another folder"),
    (errors.PortalError, blocking_on_the_portal, "await S3Client"),
]


@pytest.mark.parametrize(("kind", "provoke", "step"), CASES)
def test_it_says_what_to_do(
    fake: FakeS3, kind: type[errors.S3Exception], provoke: Callable[[FakeS3], object], step: str
) -> None:
    with pytest.raises(kind) as caught:
        provoke(fake)

    assert type(caught.value) is kind
    assert re.search(step, str(caught.value))


def test_no_error_is_left_out() -> None:
    """But for the two that only group others."""
    public = {
        found
        for name in s3dcp.__all__
        if isinstance(found := getattr(s3dcp, name), type) and issubclass(found, Exception)
    }

    assert {kind for kind, _, _ in CASES} == public - {errors.S3Exception, errors.CheckpointError}
