"""A user's program, for mypy alone: every public name, called as its documentation has it.

`make types` checks it, strictly, against what `py.typed` promises. Nothing here is ever run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, assert_type

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

import s3dcp
import s3dcp.testing

URI = "s3://bucket/run/step-1"
STATE: dict[str, Any] = {"model": {"weights": torch.zeros(3)}, "step": 1}

# Settings and strategies.

config = s3dcp.S3ClientConfig(
    throughput_target_gbps=25.0,
    part_size=16 << 20,
    force_path_style=True,
    max_attempts=5,
    endpoint_url="http://127.0.0.1:9000",
)


class Ours(s3dcp.S3PrefixStrategyBase):
    def generate_prefix(self, rank: int) -> str:
        return f"{rank}/"


class Octal(s3dcp.NumericPrefixStrategy):
    def _format_number(self, number: int, length: int) -> str:
        return f"{number:0{length}o}"


strategies: Sequence[s3dcp.S3PrefixStrategyBase] = [
    s3dcp.DefaultPrefixStrategy(),
    s3dcp.BinaryPrefixStrategy(epoch_num=1, prefix_count=4),
    s3dcp.HexPrefixStrategy(min_prefix_length=4),
    s3dcp.RoundRobinPrefixStrategy(["left", "right"]),
    Ours(),
    Octal(8),
]
assert_type(strategies[0](3), str)


# Calls.


def bar(done_bytes: int, total_bytes: int, /) -> None:
    print(done_bytes, total_bytes)  # noqa: T201 - as a user does


progress: s3dcp.ProgressCallback = bar


def report_of(report: s3dcp.Report) -> None:
    assert_type(report.seconds, float)
    assert_type(report.totals, s3dcp.Totals)
    assert_type(report.totals.operations["GetObject"], s3dcp.OperationTotals)
    assert_type(report.cost_usd(s3dcp.RequestPrices(put_usd=0.0054)), float)
    assert_type(report.error, str | None)


def blocking(stager: AsyncStager) -> None:
    assert_type(s3dcp.save(STATE, URI, progress=True, on_report=report_of), Metadata)
    s3dcp.load(STATE, URI, weights_only=False, progress=progress)
    s3dcp.load(STATE, URI, planner=s3dcp.WeightsOnlyLoadPlanner())
    assert_type(s3dcp.async_save(STATE, URI, s3client_config=config), Future[Metadata])
    response = s3dcp.async_save(STATE, URI, async_stager=stager)
    assert_type(response, Future[Metadata] | AsyncSaveResponse)


async def awaited() -> None:
    assert_type(await s3dcp.asave(STATE, URI, prefix_strategy=strategies[0]), Metadata)
    await asyncio.gather(s3dcp.aload(STATE, URI), s3dcp.aload({}, URI))
    assert_type(await s3dcp.acopy(URI, "/tmp/step-1"), s3dcp.CopyReport)


def catalog() -> None:
    assert_type(s3dcp.list_checkpoints("s3://bucket/run"), list[s3dcp.CheckpointInfo])
    if newest := s3dcp.latest("s3://bucket/run"):
        assert_type(newest.step, int | None)
        s3dcp.delete(newest.uri, region="eu-west-1")
    assert_type(s3dcp.copy(URI, "s3://bucket/kept").totals, s3dcp.Totals)
    garbage = s3dcp.gc("s3://bucket/run", keep=3)
    assert_type(garbage, s3dcp.Garbage)
    assert_type(garbage.objects, tuple[s3dcp.ObjectInfo, ...])
    assert_type(s3dcp.abort_uploads("s3://bucket/run", dry_run=False), list[s3dcp.UploadInfo])
    assert_type(s3dcp.__version__, str)


# DCP's own calls.


def storages() -> Iterator[s3dcp.S3StorageWriter | s3dcp.S3StorageReader]:
    writer = s3dcp.S3StorageWriter(
        "eu-west-1", URI, config, strategies[1], 2, progress=progress, overwrite=False
    )
    assert_type(writer.fs, s3dcp.S3FileSystem)
    assert_type(writer.report, s3dcp.Report)
    assert_type(writer.totals, s3dcp.Totals)
    constructor = s3dcp.S3ReaderConstructor.dcp_optimized(max_gap_size=1 << 20)
    assert_type(constructor, s3dcp.DCPS3ReaderConstructorProtocol)
    reader = s3dcp.S3StorageReader(None, URI, reader_constructor=constructor)
    assert_type(reader.read_metadata(), Metadata)
    assert_type(s3dcp.StorageMetadata("0001/").prefix, str)
    yield writer
    yield reader
    yield s3dcp.S3HuggingFaceStorageWriter(
        None, URI, fqn_to_index_mapping={"weights": 1}, save_distributed=True
    )
    yield s3dcp.S3HuggingFaceStorageReader(None, URI, on_report=report_of)
    s3dcp.consolidate_safetensors_files(URI, "s3://bucket/full")


# Files and objects.


class Ranged(s3dcp.RangedS3Reader):
    pass


def files() -> None:
    fs = s3dcp.S3FileSystem(None, s3client_config=config)
    with fs.create_stream(f"{URI}/notes", "wb") as stream:
        assert isinstance(stream, s3dcp.S3Writer)
        assert_type(stream.write(b"text"), int)
    with fs.create_stream(f"{URI}/notes", "rb") as stream:
        assert isinstance(stream, s3dcp.S3Reader)
        assert_type(stream.read(4), bytes)
        assert isinstance(stream, s3dcp.SequentialS3Reader | s3dcp.DCPOptimizedS3Reader)
    assert_type(fs.ls(URI), list[str])
    constructor: s3dcp.S3ReaderConstructorProtocol = Ranged
    for constructor in (
        s3dcp.S3ReaderConstructor.sequential(),
        s3dcp.S3ReaderConstructor.range_based(buffer_size=0),
        s3dcp.S3ReaderConstructor.default(),
    ):
        assert_type(s3dcp.S3ReaderConstructor.get_reader_type_string(constructor), str)
    assert_type(s3dcp.ItemRange(0, 10).end, int)


async def objects() -> None:
    async with s3dcp.S3Client("eu-west-1", config) as client:
        assert_type(client, s3dcp.S3Client)
        await client.put_object("bucket", "key", b"bytes")
        assert_type(await client.get_object("bucket", "key", 1, 3), bytearray)
        assert_type(await client.head_object("bucket", "key"), s3dcp.ObjectInfo)
        assert_type([info.key async for info in client.list_objects("bucket")], list[str])


# Errors, from the leaves to the root.


def told(error: BaseException) -> str:  # noqa: C901, PLR0911
    match error:
        case s3dcp.CheckpointExistsError() | s3dcp.CheckpointNotFoundError():
            return "which?"
        case s3dcp.CheckpointChangedError() | s3dcp.CommitConflictError():
            return "again"
        case s3dcp.CorruptMetadataError() | s3dcp.IntegrityError() | s3dcp.UnsafeItemError():
            return "another"
        case s3dcp.DiskError():
            return f"{error.__cause__}"
        case s3dcp.IncompleteSaveError() | s3dcp.CheckpointError():
            return "nothing was published"
        case s3dcp.ThrottledError() | s3dcp.ServerError() | s3dcp.S3TimeoutError():
            return "later"
        case s3dcp.AccessDeniedError() | s3dcp.S3CredentialsError() | s3dcp.WrongRegionError():
            return f"{error.bucket} {error.status} {error.code}"
        case s3dcp.BucketNotFoundError() | s3dcp.ObjectNotFoundError():
            return f"{error.key}"
        case s3dcp.PreconditionFailedError() | s3dcp.ConflictError() | s3dcp.S3ProtocolError():
            return "the store"
        case s3dcp.InvalidS3UriError() | s3dcp.S3ConfigError() | s3dcp.PortalError():
            return "the program"
        case s3dcp.S3ServiceError() | s3dcp.S3ConnectionError() | s3dcp.S3Exception():
            assert_type(error.retryable, bool)
            return error.message
    return ""


# Tests of one's own.


def tested() -> None:
    with s3dcp.testing.FakeS3() as server:
        assert_type(server, s3dcp.testing.FakeS3)
        server.create_bucket("bucket")
        fault: s3dcp.testing.Fault = s3dcp.testing.slow_down()
        for fault in (s3dcp.testing.Cut(100), s3dcp.testing.Stall(head=False)):
            assert_type(server.inject(fault, operation="GetObject"), s3dcp.testing.Rule)
        assert_type(server.requests, list[s3dcp.testing.Record])
        assert_type(server.environ(), dict[str, str])
    with s3dcp.testing.FakeS3.process() as process:
        assert_type(process, s3dcp.testing.FakeS3Process)
    with s3dcp.testing.LocalS3("/tmp/s3") as local:
        assert_type(local.endpoint_url, str)
