"""FakeS3 does what S3 does, seen through boto3."""

from __future__ import annotations

import base64
import hashlib
import zlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree as ET

import boto3
import pytest
from awscrt import checksums as crt
from botocore.config import Config
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from s3dcp.testing import FakeS3, FakeS3Process, Limits, LocalServerError
from s3dcp.testing._answers import Blob
from s3dcp.testing._listings import objects
from s3dcp.testing._objects import Bucket, StoredObject
from tests._fakes import BUCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KiB, MiB = 1 << 10, 1 << 20


def client_of(server: FakeS3 | FakeS3Process, **settings: Any) -> Any:
    config = {
        "retries": {"total_max_attempts": 1},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **settings.pop("config", {}),
    }
    return boto3.client(
        "s3",
        **{
            "endpoint_url": server.endpoint_url,
            "aws_access_key_id": server.access_key,
            "aws_secret_access_key": server.secret_key,
            "region_name": server.region,
            "config": Config(**config),
            **settings,
        },
    )


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeS3]:
    """A server of short pages and small parts."""
    with FakeS3(limits=Limits(min_part_bytes=5 * KiB, max_keys=10)) as server:
        yield server


@pytest.fixture(scope="module")
def _boto(shared_fake: FakeS3) -> Iterator[Any]:
    client = client_of(shared_fake)
    yield client
    client.close()


@pytest.fixture
def boto(_boto: Any, fake: FakeS3) -> Any:
    return _boto


@pytest.fixture
def wrong(fake: FakeS3) -> Iterator[list[str]]:
    """The codes of the violations that the test wants, all of which it must name."""
    expected: list[str] = []
    yield expected
    assert [each.code for each in fake.violations] == expected
    fake.forget()


def refused(call: Callable[..., Any], **args: Any) -> tuple[str, int]:
    with pytest.raises(ClientError) as caught:
        call(Bucket=args.pop("Bucket", BUCKET), **args)
    response: Any = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


class TestObjects:
    KEYS = (
        "plain",
        "a b",
        "a+b",
        "a%20b",
        "a%2Fb",
        "a//b",
        "a/./b/../c",
        "a/",
        "ключ/鍵/🗝",
        "q?x=1&y#z",
        "=;:@!$'()*,[]\"<>&",
        "tab\tnewline\nend",
        "é",  # one code point
        "e\u0301",  # two
    )

    def test_keys_are_kept_exactly(self, fake: FakeS3, boto: Any) -> None:
        for key in self.KEYS:
            boto.put_object(Bucket=BUCKET, Key=key, Body=key.encode())

        assert fake.keys(BUCKET) == sorted(self.KEYS)
        pages = boto.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        assert [each["Key"] for page in pages for each in page["Contents"]] == sorted(self.KEYS)
        for key in self.KEYS:
            got = boto.get_object(Bucket=BUCKET, Key=key)
            assert got["Body"].read() == key.encode()
            boto.delete_object(Bucket=BUCKET, Key=key)
        assert fake.keys(BUCKET) == []

    def test_what_is_put_comes_back_with_its_headers(self, fake: FakeS3, boto: Any) -> None:
        kept = {
            "ContentType": "text/x",
            "CacheControl": "no-store",
            "Metadata": {"step": "7"},
            "StorageClass": "STANDARD_IA",
            "ServerSideEncryption": "aws:kms",
            "SSEKMSKeyId": "k",
        }
        put = boto.put_object(Bucket=BUCKET, Key="k", Body=b"12345", **kept)

        for found in (
            boto.get_object(Bucket=BUCKET, Key="k"),
            boto.head_object(Bucket=BUCKET, Key="k"),
        ):
            assert {name: found[name] for name in kept} == kept
            assert (found["ETag"], found["ContentLength"]) == (put["ETag"], 5)
        assert fake.read(BUCKET, "k") == b"12345"

    def test_an_empty_object(self, boto: Any) -> None:
        boto.put_object(Bucket=BUCKET, Key="k", Body=b"")

        assert boto.get_object(Bucket=BUCKET, Key="k")["Body"].read() == b""
        assert refused(boto.get_object, Key="k", Range="bytes=0-0") == ("InvalidRange", 416)

    @pytest.mark.parametrize(
        ("asked", "start", "stop"),
        [
            ("0-0", 0, 1),
            ("2-4", 2, 5),
            ("7-", 7, 10),
            ("-3", 7, 10),
            ("-99", 0, 10),
            ("8-99", 8, 10),
        ],
    )
    def test_ranges(self, fake: FakeS3, boto: Any, asked: str, start: int, stop: int) -> None:
        fake.write(BUCKET, "k", b"0123456789")

        got = boto.get_object(Bucket=BUCKET, Key="k", Range=f"bytes={asked}")

        assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
        assert got["ContentRange"] == f"bytes {start}-{stop - 1}/10"
        assert got["Body"].read() == b"0123456789"[start:stop]

    @pytest.mark.parametrize("asked", ["10-", "10-11", "-0"])
    def test_ranges_beyond_the_end(self, fake: FakeS3, boto: Any, asked: str) -> None:
        fake.write(BUCKET, "k", b"0123456789")

        assert refused(boto.get_object, Key="k", Range=f"bytes={asked}") == ("InvalidRange", 416)

    def test_a_replaced_object_is_another(self, boto: Any) -> None:
        etags = {boto.put_object(Bucket=BUCKET, Key="k", Body=b"x")["ETag"] for _ in range(3)}

        assert len(etags) == 3

    def test_what_is_missing(self, boto: Any) -> None:
        assert refused(boto.get_object, Key="k") == ("NoSuchKey", 404)
        assert refused(boto.head_object, Key="k") == ("404", 404)
        assert refused(boto.get_object, Key="k", Bucket="nope") == ("NoSuchBucket", 404)
        assert refused(boto.put_object, Key="k", Bucket="nope") == ("NoSuchBucket", 404)
        assert refused(boto.list_objects_v2, Bucket="nope") == ("NoSuchBucket", 404)
        boto.delete_object(Bucket=BUCKET, Key="k")

    def test_many_are_deleted_at_once(self, fake: FakeS3, boto: Any) -> None:
        for key in ("a & b", "<c>", "d"):
            fake.write(BUCKET, key, b"")

        keys = [{"Key": key} for key in ("a & b", "<c>", "gone")]
        done = boto.delete_objects(Bucket=BUCKET, Delete={"Objects": keys})

        assert fake.keys(BUCKET) == ["d"]
        assert done["Deleted"] == keys

    def test_large_objects_use_no_more_memory_than_they_have_bytes(self) -> None:
        """Dropped bodies have the size and the checksum that they came with, and no bytes."""
        data = bytes(range(256)) * (6 * MiB // 256)
        with FakeS3(discard="drop/") as server:
            server.create_bucket(BUCKET)
            client = client_of(server)
            for key in ("drop/large", "keep/large"):
                client.put_object(Bucket=BUCKET, Key=key, Body=data, ChecksumAlgorithm="CRC32")
            client.put_object(Bucket=BUCKET, Key="drop/small", Body=b"small")
            info = client.head_object(Bucket=BUCKET, Key="drop/large", ChecksumMode="ENABLED")
            client.close()

            assert server.read(BUCKET, "drop/large") == bytes(len(data))
            assert server.read(BUCKET, "keep/large") == data
            assert server.read(BUCKET, "drop/small") == b"small"
            assert info["ContentLength"] == len(data)
            assert base64.b64decode(info["ChecksumCRC32"]) == zlib.crc32(data).to_bytes(4, "big")
            server.check()


class TestConditions:
    NOT_MODIFIED, FAILED = ("304", 304), ("PreconditionFailed", 412)

    def test_reads(self, boto: Any) -> None:
        etag = boto.put_object(Bucket=BUCKET, Key="k", Body=b"1")["ETag"]
        past, future = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))

        for met in (
            {"IfMatch": etag},
            {"IfMatch": f'"other", {etag}'},
            {"IfMatch": "*"},
            {"IfNoneMatch": '"other"'},
            {"IfUnmodifiedSince": future},
            {"IfModifiedSince": past},
            {"IfMatch": etag, "IfUnmodifiedSince": past},
            {"IfNoneMatch": '"other"', "IfModifiedSince": future},
        ):
            assert boto.get_object(Bucket=BUCKET, Key="k", **met)["Body"].read() == b"1"
        assert refused(boto.get_object, Key="k", IfMatch='"other"') == self.FAILED
        assert refused(boto.get_object, Key="k", IfUnmodifiedSince=past) == self.FAILED
        assert refused(boto.get_object, Key="k", IfNoneMatch=etag) == self.NOT_MODIFIED
        assert refused(boto.get_object, Key="k", IfModifiedSince=future) == self.NOT_MODIFIED
        assert refused(boto.head_object, Key="k", IfMatch='"other"') == ("412", 412)

    def test_writes(self, fake: FakeS3, boto: Any) -> None:
        first = boto.put_object(Bucket=BUCKET, Key="k", Body=b"1", IfNoneMatch="*")["ETag"]

        assert refused(boto.put_object, Key="k", Body=b"2", IfNoneMatch="*") == self.FAILED
        assert refused(boto.put_object, Key="k", Body=b"2", IfMatch='"other"') == self.FAILED
        assert refused(boto.put_object, Key="new", IfMatch=first) == ("NoSuchKey", 404)
        assert fake.read(BUCKET, "k") == b"1"
        second = boto.put_object(Bucket=BUCKET, Key="k", Body=b"2", IfMatch=first)["ETag"]
        assert refused(boto.delete_object, Key="k", IfMatch=first) == self.FAILED
        boto.delete_object(Bucket=BUCKET, Key="k", IfMatch=second)
        assert fake.keys(BUCKET) == []

    def test_completions(self, fake: FakeS3, boto: Any) -> None:
        args = upload(boto, "k", [b"data"])
        fake.write(BUCKET, "k", b"other")

        complete = boto.complete_multipart_upload
        assert refused(complete, **args, IfNoneMatch="*") == self.FAILED
        assert fake.read(BUCKET, "k") == b"other"
        complete(Bucket=BUCKET, **args)
        assert fake.read(BUCKET, "k") == b"data"

    def test_a_store_without_them(self) -> None:
        with FakeS3(conditional_writes=False) as server:
            server.create_bucket(BUCKET)
            client = client_of(server)
            for body in (b"1", b"2"):
                client.put_object(Bucket=BUCKET, Key="k", Body=body, IfNoneMatch="*")
            client.close()

            assert server.read(BUCKET, "k") == b"2"


class TestListings:
    def test_pages_and_prefixes(self, fake: FakeS3, boto: Any) -> None:
        keys = [f"a/{n:02}/x" for n in range(12)] + ["a", "a/", "a!", "b/y", "c"]
        for key in keys:
            fake.write(BUCKET, key, b"12")

        everything = list(boto.get_paginator("list_objects_v2").paginate(Bucket=BUCKET))
        assert [len(page["Contents"]) for page in everything] == [10, 7]
        assert {each["Size"] for page in everything for each in page["Contents"]} == {2}
        page = boto.list_objects_v2(Bucket=BUCKET, Delimiter="/")
        assert [each["Key"] for each in page["Contents"]] == ["a", "a!", "c"]
        assert [each["Prefix"] for each in page["CommonPrefixes"]] == ["a/", "b/"]
        page = boto.list_objects_v2(Bucket=BUCKET, StartAfter="a/10", MaxKeys=3)
        assert [each["Key"] for each in page["Contents"]] == ["a/10/x", "a/11/x", "b/y"]
        assert page["IsTruncated"]
        assert boto.list_objects_v2(Bucket=BUCKET, Prefix="none")["KeyCount"] == 0
        assert boto.list_objects_v2(Bucket=BUCKET, MaxKeys=0)["KeyCount"] == 0

    def test_a_made_up_token(self, boto: Any, wrong: list[str]) -> None:
        wrong += ["InvalidArgument"]

        found = refused(boto.list_objects_v2, ContinuationToken="a/1")

        assert found == ("InvalidArgument", 400)

    @given(
        keys=st.sets(st.text("ab/é", min_size=1, max_size=5), max_size=12),
        prefix=st.text("ab/", max_size=2),
        delimiter=st.sampled_from(["", "/", "a", "b/"]),
        size=st.integers(1, 4),
    )
    def test_pages_together_are_the_whole(
        self, keys: set[str], prefix: str, delimiter: str, size: int
    ) -> None:
        stored = StoredObject(blob=Blob(), etag='"e"', headers={})
        bucket = Bucket("us-east-1", objects=dict.fromkeys(keys, stored))
        query = {"list-type": "2", "prefix": prefix, "delimiter": delimiter, "max-keys": str(size)}
        found: list[str] = []
        while True:
            page = ET.fromstring(bytes(objects(BUCKET, bucket, query, 1000).body))
            named = (
                page.iterfind("{*}Contents/{*}Key"),
                page.iterfind("{*}CommonPrefixes/{*}Prefix"),
            )
            names = [each.text or "" for group in named for each in group]
            assert len(names) == int(page.findtext("{*}KeyCount", ""))
            assert not found or min(names) > max(found)
            found += sorted(names)
            if (token := page.findtext("{*}NextContinuationToken")) is None:
                break
            assert len(names) == size
            query["continuation-token"] = token

        expected = set()
        for key in keys:
            if key.startswith(prefix):
                rest = key.removeprefix(prefix)
                at = rest.find(delimiter) if delimiter else -1
                expected.add(key if at < 0 else prefix + rest[: at + len(delimiter)])
        assert found == sorted(expected)

    def test_uploads(self, boto: Any) -> None:
        keys = ["a/1", "a/2", "b", "b", "b"]
        ids = [boto.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"] for key in keys]

        pages = boto.get_paginator("list_multipart_uploads").paginate(
            Bucket=BUCKET, PaginationConfig={"PageSize": 2}
        )
        found = [(each["Key"], each["UploadId"]) for page in pages for each in page["Uploads"]]
        rolled = boto.get_paginator("list_multipart_uploads").paginate(
            Bucket=BUCKET, Delimiter="/", PaginationConfig={"PageSize": 1}
        )
        prefixes = [each["Prefix"] for page in rolled for each in page.get("CommonPrefixes", ())]

        assert found == sorted(zip(keys, ids, strict=True))
        assert prefixes == ["a/"]
        for key, upload_id in found:
            boto.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload_id)
        assert "Uploads" not in boto.list_multipart_uploads(Bucket=BUCKET)


def upload(boto: Any, key: str, bodies: list[bytes], **settings: Any) -> dict[str, Any]:
    """Upload parts, and return what completes them."""
    algorithm = settings.get("ChecksumAlgorithm")
    started = boto.create_multipart_upload(Bucket=BUCKET, Key=key, **settings)
    named = []
    for number, body in enumerate(bodies, 1):
        sums = {f"Checksum{algorithm}": text_of(algorithm, body)} if algorithm else {}
        part = boto.upload_part(
            Bucket=BUCKET,
            Key=key,
            UploadId=started["UploadId"],
            PartNumber=number,
            Body=body,
            **sums,
        )
        named.append({"PartNumber": number, "ETag": part["ETag"], **sums})
    return {"Key": key, "UploadId": started["UploadId"], "MultipartUpload": {"Parts": named}}


def text_of(algorithm: str, data: bytes) -> str:
    sums: dict[str, Callable[[], bytes]] = {
        "CRC32": lambda: zlib.crc32(data).to_bytes(4, "big"),
        "CRC32C": lambda: crt.crc32c(data).to_bytes(4, "big"),
        "CRC64NVME": lambda: crt.crc64nvme(data).to_bytes(8, "big"),
        "SHA1": lambda: hashlib.sha1(data).digest(),
        "SHA256": lambda: hashlib.sha256(data).digest(),
    }
    return base64.b64encode(sums[algorithm]()).decode()


class TestUploads:
    BODIES: ClassVar = [b"1" * 5 * KiB, b"2" * 7 * KiB, b"3"]

    def test_parts_become_an_object(self, fake: FakeS3, boto: Any) -> None:
        args = upload(boto, "k", self.BODIES, Metadata={"a": "b"})
        listed = boto.list_parts(Bucket=BUCKET, Key="k", UploadId=args["UploadId"])
        assert fake.uploads(BUCKET) == {args["UploadId"]: "k"}
        assert fake.keys(BUCKET) == []

        done = boto.complete_multipart_upload(Bucket=BUCKET, **args)

        assert [each["Size"] for each in listed["Parts"]] == [len(body) for body in self.BODIES]
        assert fake.read(BUCKET, "k") == b"".join(self.BODIES)
        assert done["ETag"].endswith('-3"')
        second = boto.get_object(Bucket=BUCKET, Key="k", PartNumber=2)
        assert second["Body"].read() == self.BODIES[1]
        assert (second["PartsCount"], second["Metadata"]) == (3, {"a": "b"})
        assert fake.uploads(BUCKET) == {}
        assert refused(boto.complete_multipart_upload, **args) == ("NoSuchUpload", 404)

    def test_a_part_may_be_sent_again_and_left_out(self, fake: FakeS3, boto: Any) -> None:
        args = upload(boto, "k", self.BODIES)
        again = boto.upload_part(
            Bucket=BUCKET, Key="k", UploadId=args["UploadId"], PartNumber=3, Body=b"x"
        )

        parts = args["MultipartUpload"]["Parts"]
        parts[1:] = [{"PartNumber": 3, "ETag": again["ETag"]}]
        boto.complete_multipart_upload(Bucket=BUCKET, **args)

        assert fake.read(BUCKET, "k") == self.BODIES[0] + b"x"

    def test_parts_are_listed_in_pages(self, boto: Any) -> None:
        args = upload(boto, "k", [b"x"] * 12)

        pages = list(
            boto.get_paginator("list_parts").paginate(
                Bucket=BUCKET, Key="k", UploadId=args["UploadId"]
            )
        )

        assert [[p["PartNumber"] for p in page["Parts"]] for page in pages] == [
            list(range(1, 11)),
            [11, 12],
        ]
        boto.abort_multipart_upload(Bucket=BUCKET, Key="k", UploadId=args["UploadId"])

    def test_an_aborted_upload_is_gone(self, fake: FakeS3, boto: Any) -> None:
        args = upload(boto, "k", self.BODIES)
        boto.abort_multipart_upload(Bucket=BUCKET, Key="k", UploadId=args["UploadId"])

        assert fake.uploads(BUCKET) == {}
        del args["MultipartUpload"]
        assert refused(boto.abort_multipart_upload, **args) == ("NoSuchUpload", 404)
        assert refused(boto.upload_part, **args, PartNumber=1) == ("NoSuchUpload", 404)

    @pytest.mark.parametrize(
        ("bodies", "spoil", "code"),
        [
            ([b"small", b"last"], None, "EntityTooSmall"),
            (BODIES, lambda parts: parts.reverse(), "InvalidPartOrder"),
            (BODIES, lambda parts: parts.append(dict(parts[2])), "InvalidPartOrder"),
            (BODIES, lambda parts: parts[0].update(ETag=parts[1]["ETag"]), "InvalidPart"),
            (BODIES, lambda parts: parts[2].update(PartNumber=4), "InvalidPart"),
            (BODIES, lambda parts: parts.clear(), "MalformedXML"),
        ],
    )
    def test_wrong_completions(
        self,
        fake: FakeS3,
        boto: Any,
        wrong: list[str],
        bodies: list[bytes],
        spoil: Callable[[Any], None] | None,
        code: str,
    ) -> None:
        wrong += [code]
        args = upload(boto, "k", bodies)
        if spoil:
            spoil(args["MultipartUpload"]["Parts"])

        assert refused(boto.complete_multipart_upload, **args) == (code, 400)
        assert fake.keys(BUCKET) == []
        boto.abort_multipart_upload(Bucket=BUCKET, Key="k", UploadId=args["UploadId"])

    def test_etags_of_md5_sums(self) -> None:
        with FakeS3(md5_etags=True) as server:
            server.create_bucket(BUCKET)
            client = client_of(server)
            put = client.put_object(Bucket=BUCKET, Key="k", Body=b"1")
            done = client.complete_multipart_upload(Bucket=BUCKET, **upload(client, "m", [b"1"]))
            client.close()

        one = hashlib.md5(b"1")
        assert put["ETag"] == f'"{one.hexdigest()}"'
        assert done["ETag"] == f'"{hashlib.md5(one.digest()).hexdigest()}-1"'


class TestChecksums:
    ALGORITHMS = ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256")

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_they_are_verified_echoed_and_kept(
        self, boto: Any, wrong: list[str], algorithm: str
    ) -> None:
        wrong += ["BadDigest"]
        name, text = f"Checksum{algorithm}", text_of(algorithm, b"data")

        put = boto.put_object(Bucket=BUCKET, Key="k", Body=b"data", **{name: text})
        bad = refused(boto.put_object, Key="k", Body=b"Data", **{name: text})

        assert (put[name], bad) == (text, ("BadDigest", 400))
        kept = boto.head_object(Bucket=BUCKET, Key="k", ChecksumMode="ENABLED")
        assert (kept[name], kept["ChecksumType"]) == (text, "FULL_OBJECT")
        assert name not in boto.head_object(Bucket=BUCKET, Key="k")
        part = boto.get_object(Bucket=BUCKET, Key="k", ChecksumMode="ENABLED", Range="bytes=0-1")
        assert part["Body"].read() == b"da"
        assert name not in part

    @pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME"])
    def test_of_a_whole_upload(self, boto: Any, wrong: list[str], algorithm: str) -> None:
        wrong += ["BadDigest"]
        bodies, name = TestUploads.BODIES, f"Checksum{algorithm}"
        args = upload(boto, "k", bodies, ChecksumAlgorithm=algorithm, ChecksumType="FULL_OBJECT")
        whole = text_of(algorithm, b"".join(bodies))

        complete = boto.complete_multipart_upload
        bad = refused(complete, **args, **{name: text_of(algorithm, b"")})
        done = complete(Bucket=BUCKET, **args, **{name: whole}, ChecksumType="FULL_OBJECT")

        assert bad == ("BadDigest", 400)
        assert (done[name], done["ChecksumType"]) == (whole, "FULL_OBJECT")

    @pytest.mark.parametrize("algorithm", ["CRC32", "SHA256"])
    def test_of_the_parts_checksums(self, boto: Any, wrong: list[str], algorithm: str) -> None:
        wrong += ["InvalidRequest"]
        args = upload(boto, "k", TestUploads.BODIES, ChecksumAlgorithm=algorithm)
        name = f"Checksum{algorithm}"
        parts = args["MultipartUpload"]["Parts"]
        raws = b"".join(base64.b64decode(part[name]) for part in parts)
        bare = [{k: part[k] for k in ("PartNumber", "ETag")} for part in parts]

        complete = boto.complete_multipart_upload
        bad = refused(complete, **args | {"MultipartUpload": {"Parts": bare}})
        done = complete(Bucket=BUCKET, **args)

        assert bad == ("InvalidRequest", 400)
        assert done[name] == f"{text_of(algorithm, raws)}-3"
        assert done["ChecksumType"] == "COMPOSITE"

    def test_parts_must_have_the_one_that_was_announced(self, boto: Any, wrong: list[str]) -> None:
        wrong += ["InvalidRequest"] * 3
        args = upload(boto, "k", [], ChecksumAlgorithm="CRC64NVME")
        plain = upload(boto, "k", [])
        del args["MultipartUpload"], plain["MultipartUpload"]
        crc32 = {"ChecksumCRC32": text_of("CRC32", b"")}

        for settings in (args, args | crc32, plain | crc32):
            found = refused(boto.upload_part, **settings, PartNumber=1, Body=b"")
            assert found == ("InvalidRequest", 400)

    def test_sums_that_cannot_be_made_of_parts(self, boto: Any, wrong: list[str]) -> None:
        wrong += ["InvalidRequest"] * 2

        for algorithm, kind in (("SHA256", "FULL_OBJECT"), ("CRC64NVME", "COMPOSITE")):
            found = refused(
                boto.create_multipart_upload,
                Key="k",
                ChecksumAlgorithm=algorithm,
                ChecksumType=kind,
            )
            assert found == ("InvalidRequest", 400)

    def test_md5(self, boto: Any, wrong: list[str]) -> None:
        wrong += ["BadDigest", "InvalidDigest"]
        md5 = base64.b64encode(hashlib.md5(b"data").digest()).decode()

        boto.put_object(Bucket=BUCKET, Key="k", Body=b"data", ContentMD5=md5)
        assert refused(boto.put_object, Key="k", Body=b"x", ContentMD5=md5) == ("BadDigest", 400)
        assert refused(boto.put_object, Key="k", ContentMD5="no")[0] == "InvalidDigest"

    def test_a_store_without_them(self) -> None:
        with FakeS3(checksums=False) as server:
            server.create_bucket(BUCKET)
            client = client_of(server)
            put = client.put_object(Bucket=BUCKET, Key="k", Body=b"1", ChecksumCRC32="AAAAAA==")
            args = upload(client, "m", [b"1"], ChecksumAlgorithm="CRC64NVME")
            done = client.complete_multipart_upload(Bucket=BUCKET, **args)
            client.close()

        assert "ChecksumCRC32" not in put
        assert "ChecksumCRC64NVME" not in done


class TestCopies:
    def test_objects(self, fake: FakeS3, boto: Any) -> None:
        source = {"Bucket": BUCKET, "Key": "ключ a+b%20/?"}
        put = boto.put_object(
            **source, Body=b"data", Metadata={"a": "b"}, ChecksumAlgorithm="CRC32C"
        )

        boto.copy_object(
            Bucket=BUCKET, Key="copy", CopySource=source, CopySourceIfMatch=put["ETag"]
        )

        info = boto.head_object(Bucket=BUCKET, Key="copy", ChecksumMode="ENABLED")
        assert fake.read(BUCKET, "copy") == b"data"
        assert info["Metadata"] == {"a": "b"}
        assert info["ETag"] != put["ETag"]
        assert info["ChecksumCRC32C"] == put["ChecksumCRC32C"]
        failed = refused(
            boto.copy_object, Key="copy", CopySource=source, CopySourceIfMatch='"other"'
        )
        assert failed == ("PreconditionFailed", 412)
        failed = refused(
            boto.copy_object, Key="copy", CopySource=source, CopySourceIfNoneMatch=put["ETag"]
        )
        assert failed == ("PreconditionFailed", 412)

    def test_onto_itself(self, boto: Any, wrong: list[str]) -> None:
        wrong += ["InvalidRequest"]
        boto.put_object(Bucket=BUCKET, Key="k", Body=b"data")
        source = {"Bucket": BUCKET, "Key": "k"}

        replace = {"MetadataDirective": "REPLACE", "Metadata": {"new": "1"}}
        assert refused(boto.copy_object, Key="k", CopySource=source) == ("InvalidRequest", 400)
        boto.copy_object(Bucket=BUCKET, Key="k", CopySource=source, **replace)
        assert boto.head_object(Bucket=BUCKET, Key="k")["Metadata"] == {"new": "1"}

    def test_what_is_missing(self, boto: Any) -> None:
        for source, code in (
            ({"Bucket": BUCKET, "Key": "none"}, "NoSuchKey"),
            ({"Bucket": "none", "Key": "none"}, "NoSuchBucket"),
        ):
            assert refused(boto.copy_object, Key="k", CopySource=source) == (code, 404)

    def test_parts(self, fake: FakeS3, boto: Any, wrong: list[str]) -> None:
        wrong += ["InvalidArgument"]
        fake.write(BUCKET, "source", bytes(range(256)) * 40)
        args = upload(boto, "k", [], ChecksumAlgorithm="CRC64NVME")
        copy = {
            "Key": "k",
            "UploadId": args["UploadId"],
            "CopySource": {"Bucket": BUCKET, "Key": "source"},
        }

        parts = []
        for number, span in enumerate(("0-5119", "5120-10239"), 1):
            got = boto.upload_part_copy(
                Bucket=BUCKET, **copy, PartNumber=number, CopySourceRange=f"bytes={span}"
            )["CopyPartResult"]
            parts.append({"PartNumber": number, "ETag": got["ETag"]})
        beyond = refused(
            boto.upload_part_copy, **copy, PartNumber=3, CopySourceRange="bytes=0-10240"
        )
        args["MultipartUpload"] = {"Parts": parts}
        done = boto.complete_multipart_upload(Bucket=BUCKET, **args)

        assert beyond == ("InvalidArgument", 400)
        assert fake.read(BUCKET, "k") == bytes(range(256)) * 40
        assert done["ChecksumCRC64NVME"] == text_of("CRC64NVME", bytes(range(256)) * 40)


class TestBuckets:
    def test_their_life(self, fake: FakeS3, boto: Any) -> None:
        boto.create_bucket(Bucket="other")
        boto.head_bucket(Bucket="other")
        boto.put_object(Bucket="other", Key="k")

        assert {each["Name"] for each in boto.list_buckets()["Buckets"]} == {BUCKET, "other"}
        assert boto.get_bucket_location(Bucket="other")["LocationConstraint"] == fake.region
        assert refused(boto.create_bucket, Bucket="other") == ("BucketAlreadyOwnedByYou", 409)
        assert refused(boto.delete_bucket, Bucket="other") == ("BucketNotEmpty", 409)
        boto.delete_object(Bucket="other", Key="k")
        boto.delete_bucket(Bucket="other")
        assert refused(boto.head_bucket, Bucket="other") == ("404", 404)

    def test_names_that_s3_does_not_allow(self, fake: FakeS3) -> None:
        for name in ("A", "ab", "a_b", "-ab", "a..b", "a" * 64):
            with pytest.raises(LocalServerError):
                fake.create_bucket(name)

    def test_another_owner(self, boto: Any, wrong: list[str]) -> None:
        wrong += ["AccessDenied"]

        boto.head_bucket(Bucket=BUCKET, ExpectedBucketOwner="123456789012")
        found = refused(boto.list_objects_v2, ExpectedBucketOwner="210987654321")

        assert found == ("AccessDenied", 403)
