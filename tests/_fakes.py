"""Whole saves and loads against a FakeS3, and what must hold of its bucket at every moment."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlanner

import s3dcp._publish
import s3dcp._s3client
from s3dcp import S3ClientConfig, S3StorageReader, S3StorageWriter
from s3dcp._checksums import crc_of
from s3dcp._flow import RetryPolicy
from s3dcp._metadata import crcs_of, load_metadata
from s3dcp.testing import Exchange, FakeS3, Fault
from tests._servers import use
from tests._states import StateDict, assert_same, blank

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bkt"
METADATA = ".metadata"


@contextmanager
def addressed(server: FakeS3) -> Iterator[FakeS3]:
    """Point this process at a server whose bucket is empty, and let retries follow at once.

    How many requests a save makes does not depend on how long the machine takes for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        use(server, patch)
        patch.setattr(s3dcp._s3client, "RetryPolicy", partial(RetryPolicy, jitter=lambda: 0.0))
        patch.setattr(s3dcp._publish, "_RECENT_S", math.inf)
        server.create_bucket(BUCKET)
        try:
            yield server
            server.check()
        finally:
            server.forget()
            server._on_loop(server._s3.buckets.clear)


def uri_of(path: str) -> str:
    return f"s3://{BUCKET}/{path}"


def save(state: StateDict, path: str, config: S3ClientConfig | None = None, **options: Any) -> None:
    """Save, raising the error itself and not torch's wrapping of it."""
    writer = S3StorageWriter(None, uri_of(path), config, **options)
    with unwrapped():
        dcp.save(state, storage_writer=writer, no_dist=True)


def load(state: StateDict, path: str, config: S3ClientConfig | None = None) -> StateDict:
    """Load into blanks of a state dict's structure, and return them."""
    target = blank(state)
    load_into(target, path, config)
    return dict(target)


def load_into(
    target: StateDict,
    path: str,
    config: S3ClientConfig | None = None,
    planner: LoadPlanner | None = None,
) -> None:
    reader = S3StorageReader(None, uri_of(path), config)
    with unwrapped():
        dcp.load(target, storage_reader=reader, planner=planner, no_dist=True)


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise what a rank raised, instead of the exception that torch puts around it."""
    try:
        yield
    except CheckpointException as exc:
        [(error, _)] = exc.failures.values()
        raise error from None


def named(server: FakeS3, path: str) -> set[str]:
    """Return the keys that the published `.metadata` names; none if nothing is published.

    Asserts that every one of them is there, whole, and holds what was saved.
    """
    if f"{path}/{METADATA}" not in server.keys(BUCKET):
        return set()
    metadata = load_metadata(server.read(BUCKET, f"{path}/{METADATA}"), source=path)
    bodies = {}
    for index, info in metadata.storage_data.items():
        key = f"{path}/{info.relative_path}"
        if key not in bodies:
            assert key in server.keys(BUCKET), f"{key} is named by {path}/.metadata, and gone"
            bodies[key] = memoryview(server.read(BUCKET, key))
        item = bodies[key][info.offset : info.offset + info.length]
        assert item.nbytes == info.length, index
        if (crcs := crcs_of(info)) is not None:
            assert crc_of([item]) == crcs.item, index
    return set(bodies)


def assert_holds(server: FakeS3, path: str, state: StateDict) -> None:
    """Assert that a path holds this state, whole, bit for bit, and nothing else."""
    keys = named(server, path)
    assert_same(load(state, path), state)
    assert set(server.keys(BUCKET, f"{path}/")) == keys | {f"{path}/{METADATA}"}


@dataclass(frozen=True)
class Hold(Fault):
    """Keeps a request from taking effect, or its answer from being sent, until released."""

    answer: bool = False

    async def play(self, exchange: Exchange) -> None:
        await exchange.receive()
        if self.answer:
            exchange.perform()
        await exchange.stall()
        await super().play(exchange)


def data_keys(server: FakeS3, path: str) -> set[str]:
    """Return the keys of all data objects under a path, whether anything refers to them or not."""
    return {key for key in server.keys(BUCKET, f"{path}/") if key.endswith(".distcp")}


@dataclass(frozen=True)
class Late(Fault):
    """Lets a request take effect when released, whether its client is still there or not.

    Attributes:
        arrived: Set when it has.
    """

    arrived: Event = field(default_factory=Event)

    async def play(self, exchange: Exchange) -> None:
        await exchange.receive()
        assert exchange.rule is not None
        exchange.rule.note(exchange.record)
        await exchange.rule.gate.event().wait()
        exchange.perform()
        self.arrived.set()
