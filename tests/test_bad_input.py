"""Bad input: one clear typed error, early, that says what to do; nothing written, nothing lost.

Every case is met in every way into the package. Through `dcp.*` the error arrives inside torch's
CheckpointException: as itself from a save, as text where a load could not read the metadata.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat

from s3dcp import (
    AccessDeniedError,
    BucketNotFoundError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    InvalidS3UriError,
    ObjectNotFoundError,
    S3Client,
    S3ClientConfig,
    S3ConfigError,
    S3ConnectionError,
    S3CredentialsError,
    S3Exception,
    S3FileSystem,
    S3StorageReader,
    S3StorageWriter,
    S3TimeoutError,
    WrongRegionError,
)
from s3dcp._metadata import dump_metadata, load_metadata
from tests._hf import INDEX, MANIFEST
from tests._scripted import Request, Scripted, Serve, error, forward, hang
from tests._servers import Server

MiB = 1 << 20
# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

Objects = dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Place:
    """Where, and with which settings, something is tried."""

    uri: str
    config: S3ClientConfig | None = None
    region: str | None = "us-east-1"


def state(value: float = 1.0, size: int = 100) -> dict[str, Any]:
    return {"weight": torch.full((size,), value), "step": 7}


def save(place: Place, size: int = 100, **kwargs: Any) -> None:
    writer = S3StorageWriter(place.region, place.uri, place.config, **kwargs)
    dcp.save(state(2.0, size), storage_writer=writer, no_dist=True)


def load(place: Place, **kwargs: Any) -> None:
    reader = S3StorageReader(place.region, place.uri, place.config, **kwargs)
    found = state(0.0)
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert torch.equal(found["weight"], state()["weight"])


def file_system(place: Place) -> Any:
    return S3FileSystem(place.region, s3client_config=place.config)


def write(place: Place, size: int = 100) -> None:
    with file_system(place).create_stream(f"{place.uri}/new", "wb") as stream:
        stream.write(bytes(size))


def read(place: Place) -> None:
    with file_system(place).create_stream(f"{place.uri}/.metadata", "rb") as stream:
        stream.read()


def put(place: Place, size: int = 100) -> None:
    bucket, _, key = place.uri.removeprefix("s3://").partition("/")
    asyncio.run(S3Client(place.region, place.config).put_object(bucket, f"{key}/new", bytes(size)))


def get(place: Place) -> None:
    bucket, _, key = place.uri.removeprefix("s3://").partition("/")
    asyncio.run(S3Client(place.region, place.config).get_object(bucket, f"{key}/.metadata", 0, 9))


WAYS: dict[str, Callable[[Place], Any]] = {
    "save": save,
    "load": load,
    "exists": lambda place: file_system(place).exists(f"{place.uri}/.metadata"),
    "ls": lambda place: file_system(place).ls(place.uri),
    "rename": lambda place: file_system(place).rename(f"{place.uri}/.metadata", f"{place.uri}/m"),
    "rm_file": lambda place: file_system(place).rm_file(f"{place.uri}/.metadata"),
    "write": write,
    "read": read,
    "put": put,
    "get": get,
}


#: Those that ask with a HEAD, whose refusal has no body and so no reason.
HEADS = {"read", "rename"}

#: What a load asks for where it may find no `.metadata`.
SAFETENSORS_COMMITS = [INDEX, MANIFEST, "model.safetensors"]


def met_by(call: Callable[[], Any]) -> BaseException:
    """Return what a call raises: what DCP carries where it is DCP's, sent through a pickle."""
    with pytest.raises((CheckpointException, S3Exception)) as caught:
        call()
    raised = caught.value
    found = raised.failures[0][0] if isinstance(raised, CheckpointException) else raised
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, BaseException)
    assert (type(again), str(again), vars(again)) == (type(found), str(found), vars(found))
    return again


def try_ways(
    subtests: pytest.Subtests,
    place: Place,
    checked: Callable[[str, BaseException], None],
    names: Iterable[str] = tuple(WAYS),
) -> None:
    """Check what every way into the package raises; one place, so one client, for all of them."""
    for name in names:
        with subtests.test(way=name):
            checked(name, met_by(partial(WAYS[name], place)))


def check(found: BaseException, kind: type[S3Exception], *words: str) -> None:
    """Check the error; of a load, that could not read the metadata, the text."""
    text = str(found)
    if isinstance(found, AssertionError):
        assert "global metadata read failed" in text
    else:
        assert type(found) is kind, repr(found)
    for word in words:
        assert word in text


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is there, and has to stay."""

    server: Server
    boto: Any
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/run"

    def objects(self) -> Objects:
        found = self.boto.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return {entry["Key"]: (entry["ETag"], entry["Size"]) for entry in found}

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Nothing is written or lost in here, nor an upload left."""
        before = self.objects()
        assert len(before) == 2
        yield
        assert self.objects() == before
        with contextlib.suppress(self.boto.exceptions.NoSuchUpload):  # rclone's word for none
            assert not self.boto.list_multipart_uploads(Bucket=self.bucket).get("Uploads")
        load(Place(self.uri, S3ClientConfig(endpoint_url=self.server.endpoint_url)))


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with Scripted(hang) as scripted:
        yield scripted.answering


@pytest.fixture
def stored(server: Server, boto: Any, bucket: str) -> Stored:
    made = Stored(server, boto, bucket)
    writer = S3StorageWriter(server.region, made.uri)
    dcp.save(state(), storage_writer=writer, no_dist=True)
    return made


class TestPaths:
    """Refused before there is a request, or a client."""

    def test_not_an_s3_uri(self, subtests: pytest.Subtests) -> None:
        def checked(_: str, found: BaseException) -> None:
            check(found, InvalidS3UriError, "Only s3:// URIs are supported", "s3://BUCKET/")

        ways = [name for name in WAYS if name not in {"put", "get"}]  # they take a bucket's name
        for uri in (
            "run",
            "/tmp/run",
            "file:///run",
            "https://b.s3.amazonaws.com/run",
            "s3:/b/run",
        ):
            try_ways(subtests, Place(uri), checked, ways)

    def test_no_bucket(self, subtests: pytest.Subtests) -> None:
        def checked(_: str, found: BaseException) -> None:
            check(found, InvalidS3UriError, "ucket")

        try_ways(subtests, Place("s3:///run"), checked)

    def test_a_segment_that_goes_up(self, subtests: pytest.Subtests) -> None:
        def checked(_: str, found: BaseException) -> None:
            check(found, InvalidS3UriError, "'.' and '..' are not allowed")

        try_ways(subtests, Place("s3://bucket/../other"), checked)

    def test_as_a_checkpoint_id(self) -> None:
        """Given to DCP for this save alone."""
        writer = S3StorageWriter("us-east-1", "s3://bucket/run")
        with pytest.raises(InvalidS3UriError, match="Only s3:// URIs"):
            dcp.save({}, checkpoint_id="/tmp/run", storage_writer=writer, no_dist=True)
        reader = S3StorageReader("us-east-1", "s3://bucket/run")
        with pytest.raises(InvalidS3UriError, match="Only s3:// URIs"):
            dcp.load({}, checkpoint_id="/tmp/run", storage_reader=reader, no_dist=True)
        assert writer.path == reader.path == "s3://bucket/run"

    def test_a_prefix_strategy_that_leaves_the_checkpoint(self, stored: Stored) -> None:
        class Hostile:
            def __call__(self, rank: int) -> str:
                return "../elsewhere_"

        with stored.untouched():
            place = Place(stored.uri)
            found = met_by(lambda: save(place, prefix_strategy=Hostile()))
        check(found, InvalidS3UriError, "the prefix strategy")

    @pytest.mark.parametrize("mode", ["r", "ab", "wb+"])
    def test_an_unknown_mode(self, mode: str) -> None:
        with (
            pytest.raises(S3ConfigError, match="only supports 'rb'"),
            file_system(Place("s3://b/k")).create_stream("s3://b/k", mode),
        ):
            pass


class TestArguments:
    def test_safetensors(self) -> None:
        place, chosen = Place("s3://bucket/run"), SerializationFormat.SAFETENSORS
        found = met_by(lambda: save(place, serialization_format=chosen))
        check(found, S3ConfigError, "HuggingFace")

    @pytest.mark.parametrize("count", [0, -1])
    def test_thread_count(self, count: int) -> None:
        found = met_by(lambda: save(Place("s3://bucket/run"), thread_count=count))
        check(found, S3ConfigError, "thread_count must be a positive whole number")

    @pytest.mark.parametrize("part_size", [MiB, 6 << 30])
    def test_a_part_size_that_s3_refuses(
        self, serve: Serve, stored: Stored, part_size: int
    ) -> None:
        """At the first multipart upload, before a byte is sent; small objects have no parts."""
        with serve(forward(stored.server.endpoint_url)) as scripted:
            config = S3ClientConfig(part_size=part_size, endpoint_url=scripted.endpoint_url)
            place = Place(stored.uri, config)
            with stored.untouched():
                calls: list[Callable[[], None]] = [partial(save, place), partial(put, place)]
                if part_size == MiB:  # the stream would need 5 GiB to come that far
                    calls.append(partial(write, place))
                for call in calls:
                    found = met_by(lambda call=call: call(size=10 * MiB))  # type: ignore[misc]
                    check(found, S3ConfigError, "part_size", "between 5 MiB and 5 GiB")
            assert not [r for r in scripted.requests if r.method in {"PUT", "POST"}]

            for call in calls:
                call()
        assert len(stored.objects()) == 3  # the new checkpoint, and the object

    def test_settings_of_another_library(self) -> None:
        """As of half a move from the reference library, whose settings have the same name."""
        found = met_by(lambda: save(Place("s3://bucket/run", config={"part_size": 1})))  # type: ignore[arg-type]
        check(found, S3ConfigError, "S3ClientConfig of s3dcp", "builtins: dict")

    def test_what_is_called_later(self, stored: Stored) -> None:
        found = met_by(lambda: save(Place(stored.uri), prefix_strategy="hex"))
        check(found, S3ConfigError, "prefix_strategy must be a callable, got 'hex'")
        found = met_by(lambda: load(Place(stored.uri), reader_constructor="sequential"))
        check(found, S3ConfigError, "reader_constructor must be a callable, got 'sequential'")


class TestBuckets:
    def test_one_that_does_not_exist(
        self, serve: Serve, server: Server, boto: Any, subtests: pytest.Subtests
    ) -> None:
        with serve(forward(server.endpoint_url)) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)

            def checked(way: str, found: BaseException) -> None:
                if way in HEADS:  # whose answer cannot say which of the two is missing
                    check(found, ObjectNotFoundError, "no-such-bucket")
                else:
                    check(found, BucketNotFoundError, "NoSuchBucket", "create the bucket")
                assert len(scripted.requests) == 1
                scripted.requests.clear()

            try_ways(subtests, Place("s3://no-such-bucket/run", config), checked)
        names = [entry["Name"] for entry in boto.list_buckets()["Buckets"]]
        assert "no-such-bucket" not in names

    def test_a_name_that_s3_does_not_allow(self, server: Server, subtests: pytest.Subtests) -> None:
        for bucket in ("A_B", "b", "bucket!", "b..b", "x" * 64):

            def checked(_: str, found: BaseException, bucket: str = bucket) -> None:
                assert isinstance(found, S3Exception | AssertionError)
                assert bucket in str(found)

            try_ways(subtests, Place(f"s3://{bucket}/run"), checked)


class TestCheckpoints:
    def test_one_that_does_not_exist(self, serve: Serve, stored: Stored) -> None:
        with serve(forward(stored.server.endpoint_url)) as scripted, stored.untouched():
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            place = Place(f"s3://{stored.bucket}/other", config)
            found = met_by(lambda: load(place))
            check(found, CheckpointNotFoundError, f"No checkpoint at {place.uri}", "load another")
            with pytest.raises(CheckpointNotFoundError):
                S3StorageReader(place.region, place.uri, place.config).read_metadata()
            names = [each.path.rpartition("/")[2] for each in scripted.requests]
        assert names == [".metadata", "__0.metadata", *SAFETENSORS_COMMITS, ".metadata"]

    def test_an_object_that_does_not_exist(self, stored: Stored) -> None:
        place = Place(stored.uri)
        with stored.untouched():
            found = met_by(lambda: get(Place(f"s3://{stored.bucket}/other")))
        check(found, ObjectNotFoundError, f"s3://{stored.bucket}/other/.metadata", "NoSuchKey")

        [data] = [key for key in stored.objects() if key.endswith(".distcp")]
        stored.boto.delete_object(Bucket=stored.bucket, Key=data)
        found = met_by(lambda: load(place))
        check(found, ObjectNotFoundError, data, "NoSuchKey", "weight")


class TestCredentials:
    def test_none(
        self,
        serve: Serve,
        stored: Stored,
        monkeypatch: pytest.MonkeyPatch,
        subtests: pytest.Subtests,
    ) -> None:
        with serve(forward(stored.server.endpoint_url)) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            with stored.untouched(), monkeypatch.context() as patch:
                patch.delenv("AWS_ACCESS_KEY_ID")
                patch.delenv("AWS_SECRET_ACCESS_KEY")

                def checked(_: str, found: BaseException) -> None:
                    check(found, S3CredentialsError, "Unable to locate", "set AWS_ACCESS_KEY_ID")

                try_ways(subtests, Place(stored.uri, config), checked)
            assert scripted.requests == []

    def test_half(self, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
        with stored.untouched(), monkeypatch.context() as patch:
            patch.delenv("AWS_SECRET_ACCESS_KEY")
            found = met_by(lambda: save(Place(stored.uri)))
        check(found, S3CredentialsError, "AWS_SECRET_ACCESS_KEY")

    @pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_ones(
        self,
        serve: Serve,
        stored: Stored,
        monkeypatch: pytest.MonkeyPatch,
        subtests: pytest.Subtests,
        name: str,
    ) -> None:
        """By rclone, which checks signatures; moto does not."""
        with serve(forward(stored.server.endpoint_url)) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            with stored.untouched(), monkeypatch.context() as patch:
                patch.setenv(name, "wrong")

                def checked(way: str, found: BaseException) -> None:
                    if way in HEADS:
                        check(found, AccessDeniedError, "403")
                    else:
                        check(found, S3CredentialsError, "set AWS_ACCESS_KEY_ID and")
                    assert len(scripted.requests) == 1
                    scripted.requests.clear()

                try_ways(subtests, Place(stored.uri, config), checked)

    def test_a_profile_that_does_not_exist(self, stored: Stored, subtests: pytest.Subtests) -> None:
        def checked(_: str, found: BaseException) -> None:
            check(found, S3ConfigError, "no-such-profile", "check S3ClientConfig.profile")

        config = S3ClientConfig(profile="no-such-profile")
        with stored.untouched():
            try_ways(subtests, Place(stored.uri, config), checked)

    def test_a_configuration_file_that_is_none(
        self, stored: Stored, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "config").write_text("[default\nregion")
        with stored.untouched(), monkeypatch.context() as patch:
            patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
            found = met_by(lambda: save(Place(stored.uri)))
        check(found, S3ConfigError, "AWS configuration file")


class TestAccess:
    def test_denied(self, serve: Serve, stored: Stored, subtests: pytest.Subtests) -> None:
        with serve(lambda _: error(403, "AccessDenied")) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            with stored.untouched():

                def checked(way: str, found: BaseException) -> None:
                    check(found, AccessDeniedError, "check the policy", "s3:ListBucket")
                    _, *others = [each.path.rpartition("/")[2] for each in scripted.requests]
                    assert others == (SAFETENSORS_COMMITS if way == "load" else [])
                    scripted.requests.clear()

                try_ways(subtests, Place(stored.uri, config), checked)

    @pytest.mark.parametrize("size", [100, 10 * MiB], ids=["small", "multipart"])
    @pytest.mark.parametrize("suffix", [".distcp", "/.metadata"])
    def test_denied_to_write(self, serve: Serve, stored: Stored, size: int, suffix: str) -> None:
        """The objects, or only the last one: what was written before it is taken back."""
        real = forward(stored.server.endpoint_url)

        def handle(request: Request) -> Any:
            denied = request.method == "PUT" and request.path.endswith(suffix)
            return error(403, "AccessDenied") if denied else real(request)

        with serve(handle) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            with stored.untouched():
                found = met_by(lambda: save(Place(stored.uri, config), size=size))
        check(found, AccessDeniedError, suffix, "check the policy")

    def test_denied_when_it_may_be_committed(self, serve: Serve, stored: Stored) -> None:
        """An answer to the commit was lost: what it may refer to is let be."""
        answers = [error(500, "InternalError"), error(403, "AccessDenied")]
        real = forward(stored.server.endpoint_url)

        def handle(request: Request) -> Any:
            commit = request.method == "PUT" and request.path.endswith("/.metadata")
            return answers.pop(0) if commit else real(request)

        before = stored.objects()
        with serve(handle) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            check(met_by(lambda: save(Place(stored.uri, config))), AccessDeniedError)
        assert before.items() < stored.objects().items()

    @pytest.mark.usefixtures("moto")
    def test_a_race_that_is_lost(self, serve: Serve, stored: Stored) -> None:
        """On moto, which honours conditions. The loser takes back what it wrote."""
        body = stored.boto.get_object(Bucket=stored.bucket, Key="run/.metadata")["Body"].read()
        real = forward(stored.server.endpoint_url)

        def handle(request: Request) -> Any:
            if request.method == "PUT" and request.path.endswith("/.metadata"):
                put_object(Key="race/.metadata", Body=body)
            return real(request)

        put_object = partial(stored.boto.put_object, Bucket=stored.bucket)
        with serve(handle) as scripted:
            place = Place(
                f"s3://{stored.bucket}/race", S3ClientConfig(endpoint_url=scripted.endpoint_url)
            )
            found = met_by(lambda: save(place, overwrite=False))
        check(found, CheckpointExistsError, "already exists", "overwrite=True")
        assert [key for key in stored.objects() if key.startswith("race/")] == ["race/.metadata"]

    def test_denied_to_delete(
        self, serve: Serve, stored: Stored, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The save is whole; what it replaced stays, and is named."""
        before = stored.objects()
        real = forward(stored.server.endpoint_url)

        def handle(request: Request) -> Any:
            return error(403, "AccessDenied") if request.method == "DELETE" else real(request)

        with serve(handle) as scripted:
            save(Place(stored.uri, S3ClientConfig(endpoint_url=scripted.endpoint_url)))
        [old] = [key for key in before if key.endswith(".distcp")]
        assert old in stored.objects()
        assert len(stored.objects()) == 3
        [warning] = [r for r in caplog.records if "could not delete" in r.getMessage()]
        assert old in warning.getMessage()
        assert warning.levelno == logging.WARNING


class TestRegions:
    @pytest.mark.parametrize("code", [301, 307, 400])
    def test_another_ones(
        self, serve: Serve, stored: Stored, subtests: pytest.Subtests, code: int
    ) -> None:
        headers = {"x_amz_bucket_region": "eu-central-1"}
        answers = {
            301: error(301, "PermanentRedirect", **headers),
            307: error(307, "TemporaryRedirect", **headers),
            400: error(
                400, "AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>", **headers
            ),
        }
        with serve(lambda _: answers[code]) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            with stored.untouched():

                def checked(_: str, found: BaseException) -> None:
                    check(found, WrongRegionError, "in 'eu-central-1'", "region='eu-central-1'")
                    assert len(scripted.requests) == 1
                    scripted.requests.clear()

                try_ways(subtests, Place(stored.uri, config), checked)


class TestEndpointsThatDoNotAnswer:
    def test_nobody_listens(self, stored: Stored, subtests: pytest.Subtests) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            config = S3ClientConfig(endpoint_url=url, max_attempts=2)
            with stored.untouched():

                def checked(_: str, found: BaseException) -> None:
                    check(found, S3ConnectionError, url, "check the endpoint's address")

                try_ways(subtests, Place(stored.uri, config), checked)

    def test_somebody_listens_and_says_nothing(
        self, serve: Serve, stored: Stored, subtests: pytest.Subtests
    ) -> None:
        with serve(hang) as scripted:
            config = S3ClientConfig(
                endpoint_url=scripted.endpoint_url, max_attempts=2, read_timeout_s=0.1
            )
            with stored.untouched():

                def checked(_: str, found: BaseException) -> None:
                    check(found, S3TimeoutError, "raise the timeouts in S3ClientConfig")
                    assert len(scripted.requests) <= 4
                    scripted.requests.clear()

                try_ways(subtests, Place(stored.uri, config), checked)

    def test_plain_http_is_no_tls(self, stored: Stored) -> None:
        url = stored.server.endpoint_url.replace("http://", "https://")
        config = S3ClientConfig(endpoint_url=url, max_attempts=2)
        with stored.untouched():
            found = met_by(lambda: save(Place(stored.uri, config)))
        check(found, S3ConnectionError, url)


class Bomb:
    """Unpickled by plain pickle, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def hostile_inside(body: bytes, path: Path) -> bytes:
    metadata = load_metadata(body, source="the test")
    metadata.planner_data = Bomb(path)
    return dump_metadata(metadata)


#: What is made of a checkpoint's metadata; code in it would make a folder.
DAMAGES: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda _, __: b"",
    "truncated": lambda body, _: body[: len(body) // 2],
    "cut at the end": lambda body, _: body[:-1],
    "text": lambda _, __: b'{"state_dict": {}}',
    "another object": lambda _, __: pickle.dumps({"step": 7}),
    "another library's": lambda _, __: pickle.dumps(asyncio.Queue),
    "hostile": lambda _, path: pickle.dumps(Bomb(path)),
    "hostile inside": hostile_inside,
}


def damage(stored: Stored, how: str, path: Path) -> Objects:
    """Damage the metadata; return what is in the bucket then."""
    body = stored.boto.get_object(Bucket=stored.bucket, Key="run/.metadata")["Body"].read()
    damaged = DAMAGES[how](body, path)
    stored.boto.put_object(Bucket=stored.bucket, Key="run/.metadata", Body=damaged)
    return stored.objects()


class TestMetadata:
    @pytest.mark.parametrize("how", DAMAGES)
    def test_it_is_not_loaded(self, serve: Serve, stored: Stored, tmp_path: Path, how: str) -> None:
        before = damage(stored, how, tmp_path / "ran")
        with serve(forward(stored.server.endpoint_url)) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            place = Place(stored.uri, config)
            found = met_by(lambda: load(place))
            check(found, CorruptMetadataError, f"{stored.uri}/.metadata")
            with pytest.raises(CorruptMetadataError) as caught:
                S3StorageReader(place.region, place.uri, place.config).read_metadata()
            assert len(scripted.requests) <= 3
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert stored.objects() == before
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("how", DAMAGES)
    def test_it_can_be_replaced(
        self, stored: Stored, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """By a save that may; what the damaged one named, if anything, is left in place."""
        before = damage(stored, how, tmp_path / "ran")
        writer = S3StorageWriter("us-east-1", stored.uri)
        dcp.save(state(), storage_writer=writer, no_dist=True)

        assert before.keys() < stored.objects().keys()
        assert "are left in place" in caplog.text
        load(Place(stored.uri))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["../other/data", "/etc/passwd", "a/../../other/data", ""])
    def test_it_names_what_is_not_its_own(self, serve: Serve, stored: Stored, name: str) -> None:
        """Nothing outside of the checkpoint is read, and nothing there is deleted."""
        stored.boto.put_object(Bucket=stored.bucket, Key="other/data", Body=b"precious")
        body = stored.boto.get_object(Bucket=stored.bucket, Key="run/.metadata")["Body"].read()
        metadata = load_metadata(body, source="the test")
        for info in metadata.storage_data.values():
            info.relative_path = name
        forged = dump_metadata(metadata)
        stored.boto.put_object(Bucket=stored.bucket, Key="run/.metadata", Body=forged)
        before = stored.objects()

        with serve(forward(stored.server.endpoint_url)) as scripted:
            place = Place(stored.uri, S3ClientConfig(endpoint_url=scripted.endpoint_url))
            found = met_by(lambda: load(place))
            assert [request.path for request in scripted.requests] == [
                f"/{stored.bucket}/run/.metadata"
            ]
            check(found, InvalidS3UriError, f"{stored.uri}/.metadata", repr(name))

            save(place)
        assert before.keys() < stored.objects().keys()
        assert stored.objects()["other/data"] == before["other/data"]
