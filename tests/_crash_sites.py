"""The servers that saves are killed at, and what is left in their buckets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, ClassVar, Literal

import pytest
import torch.distributed.checkpoint as dcp
from botocore.exceptions import ClientError

from s3dcp import CheckpointNotFoundError, S3StorageReader
from s3dcp._metadata import load_metadata
from s3dcp.testing import Call, Drop, Exchange, FakeS3, Fault, Record
from tests._crash import Kill, Moment, Outcome, Process, Sent, Target
from tests._states import StateDict, blank


class FakeTarget:
    """FakeS3, which kills by itself."""

    def __init__(self, server: FakeS3) -> None:
        self.server = server

    def environ(self) -> dict[str, str]:
        return self.server.environ()

    def killing(self, process: Process, kill: Kill) -> None:
        faults: dict[Moment, Fault] = {
            "before": Call(before=lambda _: _dropped(process.kill, "head")),
            "middle": HalfBody(process.kill),
            "after": Call(after=lambda _: _dropped(process.kill, "effect")),
        }

        def fits(record: Record) -> bool:
            has_body = record.headers.get("content-length", "0") != "0"
            return process.sent(record) and (has_body or kill.moment != "middle")

        self.server.inject(faults[kill.moment], where=fits, skip=kill.number)

    def keys(self, bucket: str) -> set[str]:
        return set(self.server.keys(bucket))

    def read(self, bucket: str, key: str) -> bytes:
        return self.server.read(bucket, key)

    def uploads(self, bucket: str) -> list[str]:
        return sorted(self.server.uploads(bucket).values())


def _dropped(kill: Callable[[], None], at: Literal["head", "effect"]) -> Drop:
    kill()
    return Drop(at=at)


@dataclass(frozen=True)
class HalfBody(Fault):
    """Calls a function when half of the body is there, and takes no more of it."""

    then: Callable[[], None]
    harmless: ClassVar[bool] = True

    async def play(self, exchange: Exchange) -> None:
        half = int(exchange.head.headers["content-length"]) // 2
        await exchange.connection.read_into(memoryview(bytearray(half)))
        self.then()
        exchange.end(reset=True)


class RcloneTarget:
    """rclone, whose clients kill themselves.

    Args:
        environ: Leads to the server.
        boto: Its client.
    """

    def __init__(self, environ: dict[str, str], boto: Any) -> None:
        self._environ = environ
        self._boto = boto

    def environ(self) -> dict[str, str]:
        return self._environ

    def killing(self, process: Process, kill: Kill) -> Kill:
        return kill

    def keys(self, bucket: str) -> set[str]:
        pages = self._boto.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {entry["Key"] for page in pages for entry in page.get("Contents", [])}

    def read(self, bucket: str, key: str) -> bytes:
        body: bytes = self._boto.get_object(Bucket=bucket, Key=key)["Body"].read()
        return body

    def uploads(self, bucket: str) -> list[str]:
        try:
            found = self._boto.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        except ClientError as exc:
            if exc.response["Error"]["Code"] != "NoSuchUpload":  # as rclone says that there is none
                raise
            return []
        return sorted(upload["Key"] for upload in found)


@dataclass(frozen=True)
class Late(Fault):
    """Lets a request take effect once the rule is released, although its client may be gone.

    Args:
        arrived: Set when it has.
    """

    arrived: Event

    async def play(self, exchange: Exchange) -> None:
        await exchange.receive()
        rule = exchange.rule
        assert rule is not None
        released = rule.gate.event()

        async def arrive() -> None:
            await released.wait()
            exchange.perform()
            self.arrived.set()

        arriving = asyncio.create_task(arrive())
        rule.note(exchange.record)
        await asyncio.shield(arriving)


# What is left behind.


@dataclass(slots=True)
class Effects:
    """What requests did to a bucket.

    Attributes:
        written: The objects that were put, or completed.
        deleted: Those that were deleted.
        uploads: Of the multipart uploads under way, the objects that they would become.
    """

    written: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    uploads: list[str] = field(default_factory=list)

    def add(self, sent: Iterable[Sent]) -> None:
        """Take note of requests that took effect."""
        for request in sent:
            key = request.key
            if request.operation == "CreateMultipartUpload":
                self.uploads.append(key)
            elif request.operation in {"CompleteMultipartUpload", "AbortMultipartUpload"}:
                self.uploads.remove(key)
            elif request.operation == "DeleteObject":
                self.deleted.add(key)
            if request.operation in {"PutObject", "CompleteMultipartUpload"}:
                self.written.add(key)


def performed(outcome: Outcome, kill: Kill | None) -> Sequence[Sent]:
    """Return which of a process's requests took effect, if they were sent one by one."""
    undone = outcome.killed and kill is not None and kill.moment != "after"
    return outcome.sent[:-1] if undone else outcome.sent


class Place:
    """A checkpoint's path, and what lies under it.

    Args:
        target: The server.
        bucket: The bucket, of which every place has a folder.
        name: The folder.
    """

    def __init__(self, target: Target, bucket: str, name: str) -> None:
        self.uri = f"s3://{bucket}/{name}"
        self._target = target
        self._bucket = bucket
        self._folder = f"{name}/"
        self.commit = f"{name}/.metadata"

    def objects(self) -> set[str]:
        return {key for key in self._target.keys(self._bucket) if key.startswith(self._folder)}

    def uploads(self) -> list[str]:
        return [key for key in self._target.uploads(self._bucket) if key.startswith(self._folder)]

    def named(self) -> set[str]:
        """The objects of the checkpoint: its `.metadata`, and all that it names."""
        if self.commit not in self.objects():
            return set()
        body = self._target.read(self._bucket, self.commit)
        infos = load_metadata(body, source=self.commit).storage_data.values()
        return {self.commit} | {self._folder + info.relative_path for info in infos}

    def orphans(self) -> set[str]:
        """What nothing refers to, beside the uploads: a tool may remove it at any time."""
        return self.objects() - self.named()

    def load(self, like: StateDict) -> StateDict:
        found: StateDict = blank(like)
        dcp.load(found, storage_reader=S3StorageReader(None, self.uri), no_dist=True)
        return found

    def assert_absent(self, like: StateDict) -> None:
        with pytest.raises(CheckpointNotFoundError):
            S3StorageReader(None, self.uri).read_metadata()
        with pytest.raises(dcp.CheckpointException, match="No checkpoint at"):
            self.load(like)
