"""S3FileSystem: the file system that DCP's readers and writers see.

The contract runs on both servers. rclone keeps objects as files: it knows no `a//b`, no key that
ends with a slash, and no `a` beside `a/b`. What is about those runs on moto.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from s3dcp import (
    AccessDeniedError,
    BucketNotFoundError,
    InvalidS3UriError,
    ObjectNotFoundError,
    S3ClientConfig,
    S3ConfigError,
    S3FileSystem,
    S3ProtocolError,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
    ServerError,
    _uploads,
)
from s3dcp._portal import portal
from s3dcp.testing import FakeS3, Refuse, internal_error
from tests._fakes import BUCKET
from tests._forked import Zygote
from tests._scripted import Request, Scripted, Serve, answer, error, forward, hang
from tests._servers import Server

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

MiB = 1 << 20
# The streams' first part; more bytes than these make a multipart upload.
PART = 8 * MiB

# For which every library on the way has an encoding of its own.
ODD = [
    "a b",
    "a+b",
    "a%41b",
    "a%2Fb",
    "ключ",
    "鍵 🔑",
    "a'b\"c",
    "a&b=c?d#e",
    "a,b;c:d@e$f",
    "~a!b(c)*",
]
SLASHED = ["a//b", "//a", "a/b/", "a///"]


class Place(os.PathLike[str]):
    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with Scripted(hang) as scripted:
        yield scripted.answering


@pytest.fixture
def fs(server: Server) -> S3FileSystem:
    return S3FileSystem(server.region)


def contents(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def write(fs: S3FileSystem, path: str, body: bytes, failure: BaseException) -> None:
    """Write a body, and fail before the end."""
    with fs.create_stream(path, "wb") as stream:
        stream.write(body)
        raise failure


def put(boto: Any, bucket: str, **objects: bytes) -> None:
    for key, body in objects.items():
        boto.put_object(Bucket=bucket, Key=key, Body=body)


def get(boto: Any, bucket: str, key: str) -> bytes:
    body: bytes = boto.get_object(Bucket=bucket, Key=key)["Body"].read()
    return body


def keys(boto: Any, bucket: str) -> list[str]:
    return [entry["Key"] for entry in boto.list_objects_v2(Bucket=bucket).get("Contents", [])]


def uploads(boto: Any, bucket: str) -> list[Any]:
    """The multipart uploads under way, once all that was left to the portal is done."""

    async def nothing() -> None:
        pass

    portal().call(nothing)  # by which what was submitted before has started
    portal().settle(set(portal()._calls))
    return left_uploads(boto, bucket)


def left_uploads(boto: Any, bucket: str) -> list[Any]:
    try:
        found: list[Any] = boto.list_multipart_uploads(Bucket=bucket).get("Uploads") or []
    except boto.exceptions.NoSuchUpload:  # rclone's word for none
        return []
    return found


@pytest.mark.usefixtures("s3")
class TestWriting:
    @pytest.mark.parametrize("size", [0, 1, 100_000, PART, PART + 1, 2 * PART + 12_345])
    def test_an_object_of_any_size(
        self, fs: S3FileSystem, boto: Any, bucket: str, size: int
    ) -> None:
        body = contents(size)
        with fs.create_stream(f"s3://{bucket}/a/b", "wb") as stream:
            view = memoryview(body)
            for start in range(0, size, 3_000_001):
                assert stream.write(view[start : start + 3_000_001])
            assert keys(boto, bucket) == []  # before the end there is nothing

        assert keys(boto, bucket) == ["a/b"]
        assert get(boto, bucket, "a/b") == body
        assert uploads(boto, bucket) == []

    def test_it_replaces_what_was_there(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        for body in (b"one", contents(PART + 1), b"three"):
            with fs.create_stream(f"s3://{bucket}/key", "wb") as stream:
                stream.write(body)
            assert get(boto, bucket, "key") == body

    @pytest.mark.parametrize("size", [0, 10, PART, 3 * PART])
    def test_an_exception_publishes_nothing(
        self, fs: S3FileSystem, boto: Any, bucket: str, size: int
    ) -> None:
        put(boto, bucket, old=b"old")
        for key in ("old", "new"):
            with pytest.raises(LookupError, match="in the block"):
                write(fs, f"s3://{bucket}/{key}", contents(size), LookupError("in the block"))

        assert uploads(boto, bucket) == []
        assert keys(boto, bucket) == ["old"]
        assert get(boto, bucket, "old") == b"old"

    def test_an_interrupt_does_not_either(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            write(fs, f"s3://{bucket}/key", contents(3 * PART), KeyboardInterrupt())

        assert uploads(boto, bucket) == []
        assert keys(boto, bucket) == []

    def test_torch_saves_into_it(self, fs: Any, boto: Any, bucket: str) -> None:
        saved: dict[str, Any] = {"a": torch.arange(1000), "b": "text"}
        with fs.create_stream(f"s3://{bucket}/key.pt", "wb") as stream:
            torch.save(saved, stream)
        with fs.create_stream(f"s3://{bucket}/key.pt", "rb") as stream:
            loaded = torch.load(stream)

        assert torch.equal(loaded["a"], saved["a"])
        assert loaded["b"] == "text"


def raise_in_the_block(uri: str) -> None:
    with S3FileSystem(None).create_stream(uri, "wb") as stream:
        stream.write(bytes(6 * PART))  # more than is sent ahead: the upload is under way
        raise LookupError("in the block")


def test_a_process_that_ends_by_the_exception_leaves_no_upload(
    serve: Serve, zygote: Zygote, server: Server, boto: Any, bucket: str
) -> None:
    """The upload is dropped before the exception goes on, which may end the process."""
    busy, real = [error(503, "SlowDown")] * 2, forward(server.endpoint_url)

    def handle(request: Request) -> Any:
        return busy.pop() if request.method == "DELETE" and busy else real(request)

    with serve(handle) as scripted:
        url = {"AWS_ENDPOINT_URL": scripted.endpoint_url}
        code, output = zygote.start(raise_in_the_block, f"s3://{bucket}/key", **url).end()
    assert code == 1
    assert output.splitlines()[-1] == "LookupError: in the block"
    assert left_uploads(boto, bucket) == []
    assert keys(boto, bucket) == []


@pytest.mark.usefixtures("s3")
class TestReading:
    @pytest.mark.parametrize("size", [0, 1, 100_000, 2 * PART + 12_345])
    @pytest.mark.parametrize("kind", ["sequential", "range_based"])
    def test_an_object_of_any_size(
        self, server: Server, boto: Any, bucket: str, kind: str, size: int
    ) -> None:
        body = contents(size)
        put(boto, bucket, key=body)
        constructor = getattr(S3ReaderConstructor, kind)()
        fs: Any = S3FileSystem(server.region, reader_constructor=constructor)
        with fs.create_stream(f"s3://{bucket}/key", "rb") as stream:
            assert stream.read() == body
            assert stream.read() == b""
        with fs.create_stream(f"s3://{bucket}/key", "rb") as stream:
            stream.seek(-min(size, 10), io.SEEK_END)
            assert stream.read() == body[-10:]
            stream.seek(0)
            buffer = bytearray(min(size, 1000))
            assert stream.readinto(buffer) == len(buffer)
            assert buffer == body[:1000]

    def test_what_is_not_there(self, fs: S3FileSystem, bucket: str) -> None:
        with (
            pytest.raises(ObjectNotFoundError) as caught,
            fs.create_stream(f"s3://{bucket}/no/key", "rb") as stream,
        ):
            stream.read()
        assert (caught.value.bucket, caught.value.key) == (bucket, "no/key")
        assert isinstance(caught.value, FileNotFoundError)

    def test_left_in_the_middle(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, key=contents(3 * PART))
        for _ in range(3):
            with fs.create_stream(f"s3://{bucket}/key", "rb") as stream:
                assert stream.read(10) == contents(10)
        assert fs.exists(f"s3://{bucket}/key")


class TestStreams:
    @pytest.mark.parametrize("mode", ["r", "w", "ab", "rb+", "w+b", "", "RB"])
    def test_another_mode(self, mode: str) -> None:
        fs = S3FileSystem("us-east-1")
        with (
            pytest.raises(ValueError, match="only supports 'rb'") as caught,
            fs.create_stream("s3://bucket/key", mode),
        ):
            pass
        assert isinstance(caught.value, S3ConfigError)

    @pytest.mark.parametrize("path", ["key", "s3://bucket", "s3://bucket/", "s3://bucket/../k"])
    def test_another_path(self, path: str) -> None:
        fs = S3FileSystem("us-east-1")
        for mode in ("rb", "wb"):
            with pytest.raises(InvalidS3UriError), fs.create_stream(path, mode):
                pass


@pytest.mark.usefixtures("s3")
class TestRename:
    def test_it_moves_the_object(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, old=b"body", new=b"replaced")
        fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
        assert keys(boto, bucket) == ["new"]
        assert get(boto, bucket, "new") == b"body"

    @pytest.mark.parametrize("odd", [key for key in ODD if "%2F" not in key])
    def test_odd_keys(self, fs: S3FileSystem, boto: Any, bucket: str, odd: str) -> None:
        put(boto, bucket, **{f"from/{odd}": b"body"})
        fs.rename(f"s3://{bucket}/from/{odd}", f"s3://{bucket}/to/{odd}")
        assert keys(boto, bucket) == [f"to/{odd}"]
        assert get(boto, bucket, f"to/{odd}") == b"body"

    def test_to_itself(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, key=b"body")
        fs.rename(f"s3://{bucket}/key", Place(f"s3://{bucket}/key"))
        assert get(boto, bucket, "key") == b"body"

    def test_what_is_not_there(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, new=b"body")
        with pytest.raises(ObjectNotFoundError):
            fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
        assert get(boto, bucket, "new") == b"body"

    def test_to_another_bucket(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, key=b"body")
        with pytest.raises(ValueError, match="inside one bucket") as caught:
            fs.rename(f"s3://{bucket}/key", "s3://other/key")
        assert isinstance(caught.value, S3ConfigError)
        assert keys(boto, bucket) == ["key"]


@pytest.mark.usefixtures("moto")
@pytest.mark.parametrize("key", ["a%2Fb", *SLASHED])
def test_rename_of_keys_that_are_no_file_names(
    serve: Serve, fs: S3FileSystem, boto: Any, bucket: str, key: str
) -> None:
    """On moto: rclone's keys are file names."""
    put(boto, bucket, **{f"from/{key}": b"body"})
    fs.rename(f"s3://{bucket}/from/{key}", f"s3://{bucket}/to/{key}")
    assert keys(boto, bucket) == [f"to/{key}"]
    assert get(boto, bucket, f"to/{key}") == b"body"


class TestRenamesDelete:
    """A copy, then a deletion, which is tried three times."""

    @contextmanager
    def failing(
        self, serve: Serve, server: Server, monkeypatch: pytest.MonkeyPatch, *answers: bytes
    ) -> Iterator[tuple[Scripted, S3FileSystem]]:
        left, real = list(answers), forward(server.endpoint_url)

        def handle(request: Request) -> Any:
            return left.pop(0) if request.method == "DELETE" and left else real(request)

        with serve(handle) as scripted:
            monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.endpoint_url)
            yield scripted, S3FileSystem(server.region)

    def test_two_failures(
        self, serve: Serve, server: Server, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(boto, bucket, old=b"body")
        failures = [error(500, "InternalError"), error(503, "ServiceUnavailable")]
        with self.failing(serve, server, monkeypatch, *failures) as (scripted, fs):
            fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
        assert keys(boto, bucket) == ["new"]
        assert [request.method for request in scripted.requests] == [
            *("HEAD", "PUT"),
            *("DELETE", "DELETE", "DELETE"),
        ]

    def test_three_failures(
        self, serve: Serve, server: Server, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(boto, bucket, old=b"body")
        failures = [error(500, "InternalError")] * 3
        with self.failing(serve, server, monkeypatch, *failures) as (scripted, fs):
            with pytest.raises(ServerError) as caught:
                fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
            assert len(scripted.sent("DELETE")) == 3
        assert (caught.value.operation, caught.value.key) == ("DeleteObject", "old")
        # Nothing is lost: it is there twice.
        assert get(boto, bucket, "old") == get(boto, bucket, "new") == b"body"

    def test_a_refusal(
        self, serve: Serve, server: Server, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(boto, bucket, old=b"body")
        with self.failing(serve, server, monkeypatch, error(403, "AccessDenied")) as (scripted, fs):
            with pytest.raises(AccessDeniedError):
                fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
            assert len(scripted.sent("DELETE")) == 1

    def test_a_failed_copy_deletes_nothing(
        self, serve: Serve, server: Server, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(boto, bucket, old=b"body")
        real = forward(server.endpoint_url)

        def handle(request: Request) -> Any:
            return error(403, "AccessDenied") if request.method == "PUT" else real(request)

        with serve(handle) as scripted:
            monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.endpoint_url)
            with pytest.raises(AccessDeniedError) as caught:
                S3FileSystem(server.region).rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
            assert scripted.sent("DELETE") == []
        assert caught.value.operation == "CopyObject"
        assert keys(boto, bucket) == ["old"]


@pytest.mark.usefixtures("moto")
def test_rename_of_what_is_too_large_for_one_copy(
    fs: S3FileSystem, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is 5 GiB; here it is 5 MiB, and parts are copied."""
    body = contents(20 * MiB + 1)
    put(boto, bucket, old=body)
    monkeypatch.setattr(_uploads, "MAX_PART_BYTES", 5 * MiB)
    monkeypatch.setattr(_uploads, "_COPY_PART_BYTES", 8 * MiB)
    fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")

    assert keys(boto, bucket) == ["new"]
    assert boto.head_object(Bucket=bucket, Key="new")["ETag"].strip('"').endswith("-3")
    assert get(boto, bucket, "new") == body


@pytest.mark.usefixtures("rclone")
def test_a_store_that_cannot_copy_parts_is_told_from_one_that_did(
    fs: S3FileSystem, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is rclone, which answers 200 and has stored an empty part."""
    put(boto, bucket, old=contents(6 * MiB))
    monkeypatch.setattr(_uploads, "MAX_PART_BYTES", 5 * MiB)
    with pytest.raises(S3ProtocolError, match="does not copy parts"):
        fs.rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
    assert keys(boto, bucket) == ["old"]
    assert uploads(boto, bucket) == []


@pytest.mark.usefixtures("moto")
def test_a_copy_in_parts_that_fails_leaves_nothing(
    serve: Serve, server: Server, boto: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(boto, bucket, old=contents(12 * MiB))
    monkeypatch.setattr(_uploads, "MAX_PART_BYTES", 5 * MiB)
    monkeypatch.setattr(_uploads, "_COPY_PART_BYTES", 5 * MiB)
    real = forward(server.endpoint_url)

    def handle(request: Request) -> Any:
        refused = "partNumber=2" in request.query
        return error(403, "AccessDenied") if refused else real(request)

    with serve(handle) as scripted:
        monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.endpoint_url)
        with pytest.raises(AccessDeniedError) as caught:
            S3FileSystem(server.region).rename(f"s3://{bucket}/old", f"s3://{bucket}/new")
        assert len(scripted.sent("DELETE")) == 1
        assert "uploadId=" in scripted.sent("DELETE")[0].query
    assert caught.value.operation == "UploadPartCopy"
    assert keys(boto, bucket) == ["old"]
    assert uploads(boto, bucket) == []


def test_a_copy_that_fails_after_200_is_made_again(fake: FakeS3) -> None:
    """S3 answers a copy before it knows how it ends."""
    fake.write(BUCKET, "old", b"body")
    fake.inject(Refuse("InternalError", 200), operation="CopyObject")
    S3FileSystem(None).rename(f"s3://{BUCKET}/old", f"s3://{BUCKET}/new")

    assert fake.keys(BUCKET) == ["new"]
    assert fake.read(BUCKET, "new") == b"body"
    assert fake.stats()["CopyObject"] == 2


def test_a_part_whose_copy_fails_is_copied_again(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one alone; it may fail after the store has begun to answer, too."""
    body = contents(15 * MiB)
    fake.write(BUCKET, "old", body)
    monkeypatch.setattr(_uploads, "MAX_PART_BYTES", 5 * MiB)
    monkeypatch.setattr(_uploads, "_COPY_PART_BYTES", 5 * MiB)
    fake.inject(internal_error(), operation="UploadPartCopy")
    late = fake.inject(Refuse("InternalError", 200), operation="UploadPartCopy")
    S3FileSystem(None).rename(f"s3://{BUCKET}/old", f"s3://{BUCKET}/new")

    assert fake.keys(BUCKET) == ["new"]
    assert fake.read(BUCKET, "new") == body
    assert [(record.status, record.code) for record in late.struck] == [(200, "InternalError")]
    stats = fake.stats()
    assert (stats["HeadObject"], stats["CreateMultipartUpload"]) == (1, 1)
    assert stats["UploadPartCopy"] == 3 + 2


@pytest.mark.usefixtures("s3")
class TestLooking:
    def test_exists(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, **{"full": b"body", "empty": b"", "folder/key": b"body"})
        assert fs.exists(f"s3://{bucket}/full") is True
        assert fs.exists(Place(f"s3://{bucket}/empty")) is True
        assert fs.exists(f"s3://{bucket}/missing") is False
        assert fs.exists(f"s3://{bucket}/fol") is False
        # A prefix is no object.
        assert fs.exists(f"s3://{bucket}/folder") is False

    def test_exists_in_a_bucket_that_does_not(self, fs: S3FileSystem, bucket: str) -> None:
        with pytest.raises(BucketNotFoundError, match="create the bucket"):
            fs.exists(f"s3://{bucket}-missing/key")

    def test_rm_file(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        put(boto, bucket, one=b"", two=b"")
        fs.rm_file(f"s3://{bucket}/one")
        assert keys(boto, bucket) == ["two"]
        fs.rm_file(f"s3://{bucket}/one")  # an absent one is no error

    def test_rm_file_in_a_bucket_that_is_missing(self, fs: S3FileSystem, bucket: str) -> None:
        with pytest.raises(BucketNotFoundError):
            fs.rm_file(f"s3://{bucket}-missing/key")

    def test_ls(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        names = ["a/1", "a/2", "a/b/3", "a/b/c/4", "ab", "a/d e+%41/é"]
        put(boto, bucket, **dict.fromkeys(names, b""))
        here = f"s3://{bucket}"
        inside = [f"{here}/a/1", f"{here}/a/2", f"{here}/a/b", f"{here}/a/d e+%41"]
        assert sorted(fs.ls(f"{here}/a")) == inside
        assert sorted(fs.ls(f"{here}/a/")) == inside
        assert sorted(fs.ls(Place(f"{here}/a/b"))) == [f"{here}/a/b/3", f"{here}/a/b/c"]
        assert fs.ls(f"{here}/a/d e+%41") == [f"{here}/a/d e+%41/é"]
        assert sorted(fs.ls(here)) == sorted(fs.ls(f"{here}/")) == [f"{here}/a", f"{here}/ab"]
        assert fs.ls(f"{here}/missing") == []

    def test_ls_in_a_bucket_that_is_missing(self, fs: S3FileSystem, bucket: str) -> None:
        with pytest.raises(BucketNotFoundError):
            fs.ls(f"s3://{bucket}-missing/key")

    def test_mkdir_does_nothing(self, fs: S3FileSystem, boto: Any, bucket: str) -> None:
        fs.mkdir(f"s3://{bucket}/folder")
        assert keys(boto, bucket) == []


def test_ls_over_a_page(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def page(token: str, *names: str) -> bytes:
        entries = "".join(f"<Contents><Key>{n}</Key><Size>1</Size></Contents>" for n in names)
        more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
        truncated = f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>"
        return answer(
            200,
            f"<ListBucketResult><EncodingType>url</EncodingType>{truncated}{more}{entries}"
            "</ListBucketResult>".encode(),
        )

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    pages = [page("next", "a/1", "a/2+%2B"), page("", "a/3")]
    with serve(lambda _: pages.pop(0)) as scripted:
        config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
        fs = S3FileSystem("us-east-1", s3client_config=config)
        assert fs.ls("s3://bucket/a") == ["s3://bucket/a/1", "s3://bucket/a/2 +", "s3://bucket/a/3"]
        assert "continuation-token=next" in scripted.requests[1].query


class TestPaths:
    def test_concat_path(self) -> None:
        fs = S3FileSystem("us-east-1")
        assert fs.concat_path("s3://b/k", ".metadata") == "s3://b/k/.metadata"
        assert fs.concat_path("s3://b/k/", "a/b") == "s3://b/k/a/b"
        assert fs.concat_path("s3://b/k//", "a") == "s3://b/k//a"
        assert fs.concat_path(Path("s3://b/k"), "a b") == "s3://b/k/a b"
        assert fs.concat_path(Place("s3://b/k//"), "%41") == "s3://b/k//%41"

    def test_init_path(self) -> None:
        fs = S3FileSystem("us-east-1")
        assert fs.init_path("s3://b/k//") == "s3://b/k//"
        assert fs.init_path(Path("s3://b/k")) == "s3://b/k"
        with pytest.raises(InvalidS3UriError):
            fs.init_path("/tmp/k")

    def test_a_client_of_ones_own(self) -> None:
        config = S3ClientConfig(max_attempts=1)
        other = S3FileSystem("eu-west-1", s3client_config=config)
        fs = S3FileSystem("us-east-1", s3_client=other.client)
        assert fs.client is other.client
        assert fs.client.s3client_config == config


def checkpoint(prefix: str | os.PathLike[str], region: str) -> None:
    """Save there and load from there."""
    saved: dict[str, Any] = {"weight": torch.arange(100.0).reshape(10, 10), "step": 7}
    dcp.save(saved, storage_writer=S3StorageWriter(region, prefix), no_dist=True)
    loaded: dict[str, Any] = {"weight": torch.zeros(10, 10), "step": 0}
    dcp.load(loaded, storage_reader=S3StorageReader(region, prefix), no_dist=True)
    assert torch.equal(loaded["weight"], saved["weight"])
    assert loaded["step"] == 7


@pytest.mark.usefixtures("s3")
class TestCheckpointsAtOddPlaces:
    @pytest.mark.parametrize("wrap", [str, Place, PurePosixPath], ids=["str", "PathLike", "Path"])
    def test_of_odd_characters(self, server: Server, boto: Any, bucket: str, wrap: Any) -> None:
        odd = "/".join(key for key in ODD if "%2F" not in key)
        checkpoint(wrap(f"s3://{bucket}/{odd}"), server.region)
        found = keys(boto, bucket)
        assert f"{odd}/.metadata" in found
        assert len(found) == 2
        assert all(key.startswith(f"{odd}/") for key in found)

    def test_at_the_buckets_root(self, server: Server, boto: Any, bucket: str) -> None:
        checkpoint(f"s3://{bucket}", server.region)
        assert ".metadata" in keys(boto, bucket)
        checkpoint(f"s3://{bucket}/", server.region)

    def test_at_a_trailing_slash(self, server: Server, boto: Any, bucket: str) -> None:
        """A folder's, as DCP understands it: the same place as without it."""
        checkpoint(f"s3://{bucket}/run/", server.region)
        assert "run/.metadata" in keys(boto, bucket)
        reader = S3StorageReader(server.region, f"s3://{bucket}/run")
        dcp.load({"step": 0}, storage_reader=reader, no_dist=True)


@pytest.mark.usefixtures("moto")
@pytest.mark.parametrize("wrap", [str, Place], ids=["str", "PathLike"])
@pytest.mark.parametrize("key", ["a//b", "/a", "//a", "a//", "a%2Fb"])
def test_checkpoints_at_places_that_are_no_folders(
    server: Server, boto: Any, bucket: str, key: str, wrap: Any
) -> None:
    """On moto: rclone's keys are file names. pathlib's objects cannot hold these paths."""
    checkpoint(wrap(f"s3://{bucket}/{key}"), server.region)
    found = keys(boto, bucket)
    slash = "" if key.endswith("/") else "/"
    assert f"{key}{slash}.metadata" in found
    assert all(name.startswith(f"{key}{slash}") for name in found)
