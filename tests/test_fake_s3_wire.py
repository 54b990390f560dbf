"""FakeS3 as it is seen by the byte: signatures, what it is strict about, and HTTP."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from s3dcp.testing import FakeS3, FlipByte, LocalServerError
from tests._fakes import BUCKET
from tests._wire import Wire, request
from tests.test_fake_s3 import client_of, refused, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MiB = 1 << 20


@pytest.fixture
def boto(fake: FakeS3) -> Iterator[Any]:
    client = client_of(fake)
    yield client
    client.close()


@pytest.fixture
def wrong(fake: FakeS3) -> Iterator[list[str]]:
    """The codes of the violations that the test wants, all of which it must name."""
    expected: list[str] = []
    yield expected
    assert [each.code for each in fake.violations] == expected
    fake.forget()


@pytest.fixture
def open_fake() -> Iterator[FakeS3]:
    """A server for raw requests, which nobody signs."""
    with FakeS3(anonymous=True) as server:
        server.create_bucket(BUCKET)
        yield server
        server.check()


@pytest.fixture
def wire(open_fake: FakeS3) -> Iterator[Wire]:
    with Wire(open_fake.endpoint_url) as wire:
        yield wire


def signed(server: FakeS3, method: str, path: str, body: bytes, **settings: str) -> bytes:
    """A raw request signed by botocore."""
    made = AWSRequest(method, server.endpoint_url + path, data=body)
    credentials = Credentials(
        settings.get("access_key", server.access_key), settings.get("secret_key", server.secret_key)
    )
    region = settings.get("region", server.region)
    S3SigV4Auth(credentials, "s3", region).add_auth(made)
    headers = {k: v for k, v in made.prepare().headers.items() if k != "Content-Length"}
    host = server.endpoint_url.removeprefix("http://")
    return request(method, path, body, Host=host, **headers)


class TestSignatures:
    def answered(self, server: FakeS3, raw: bytes) -> tuple[int, str]:
        with Wire(server.endpoint_url) as wire:
            wire.send(raw)
            answer = wire.answer()
            return answer.status, answer.code

    def test_a_good_one(self, fake: FakeS3) -> None:
        assert self.answered(fake, signed(fake, "PUT", f"/{BUCKET}/k", b"data")) == (200, "")
        assert fake.read(BUCKET, "k") == b"data"
        assert "authorization" not in fake.requests[0].headers

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"secret_key": "wrong"}, (403, "SignatureDoesNotMatch")),
            ({"access_key": "WRONG"}, (403, "InvalidAccessKeyId")),
        ],
    )
    def test_wrong_credentials(
        self,
        fake: FakeS3,
        wrong: list[str],
        settings: dict[str, str],
        expected: tuple[int, str],
    ) -> None:
        wrong += [expected[1]]

        assert self.answered(fake, signed(fake, "GET", f"/{BUCKET}/k", b"", **settings)) == expected

    def test_another_region(self, fake: FakeS3) -> None:
        """What was sent to this endpoint is sent away; what was signed wrongly, refused."""
        fake.create_bucket("away", "eu-west-1")
        cases: dict[tuple[str, str], tuple[int, str]] = {
            (BUCKET, "us-east-1"): (404, "NoSuchKey"),
            (BUCKET, "eu-west-1"): (400, "AuthorizationHeaderMalformed"),
            ("away", "us-east-1"): (301, "PermanentRedirect"),
            ("away", "eu-west-1"): (404, "NoSuchKey"),
            ("away", "sa-east-1"): (400, "AuthorizationHeaderMalformed"),
        }
        for (bucket, region), expected in cases.items():
            asked = signed(fake, "GET", f"/{bucket}/k", b"", region=region)
            assert self.answered(fake, asked) == expected
        assert not fake.violations

    @pytest.mark.parametrize(
        ("before", "after", "expected"),
        [
            (b"PUT /bkt/k ", b"PUT /bkt/other ", (403, "SignatureDoesNotMatch")),
            (b"PUT /bkt/k ", b"PUT /bkt/k?x-id=1 ", (403, "SignatureDoesNotMatch")),
            (b"\r\n\r\ndata", b"\r\n\r\nDATA", (400, "XAmzContentSHA256Mismatch")),
            (b"\r\nX-Amz-Date", b"\r\nx-amz-meta-a: b\r\nX-Amz-Date", (403, "AccessDenied")),
            (b"/s3/aws4_request", b"/ec2/aws4_request", (400, "AuthorizationHeaderMalformed")),
            (b"\r\nAuthorization", b"\r\nOther", (403, "AccessDenied")),
            (b"\r\nX-Amz-Content-SHA256", b"\r\nOther", (400, "InvalidRequest")),
            (
                b"\r\nX-Amz-Content-SHA256: ",
                b"\r\nx-amz-security-token: t\r\nX-Amz-Content-SHA256: ",
                (400, "InvalidToken"),
            ),
            (b"\r\nX-Amz-Date: 20", b"\r\nX-Amz-Date: 19", (403, "SignatureDoesNotMatch")),
        ],
    )
    def test_what_was_changed_after_it_was_signed(
        self,
        fake: FakeS3,
        wrong: list[str],
        before: bytes,
        after: bytes,
        expected: tuple[int, str],
    ) -> None:
        wrong += [expected[1]]
        raw = signed(fake, "PUT", f"/{BUCKET}/k", b"data")
        assert raw.count(before) == 1

        assert self.answered(fake, raw.replace(before, after)) == expected
        assert fake.keys(BUCKET) == []

    def test_a_stale_one(
        self, fake: FakeS3, wrong: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong += ["RequestTimeTooSkewed"]
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: long_ago)

        raw = signed(fake, "GET", f"/{BUCKET}/k", b"")

        assert self.answered(fake, raw) == (403, "RequestTimeTooSkewed")

    def test_a_session(self) -> None:
        with FakeS3(session_token="token") as server:
            server.create_bucket(BUCKET)
            assert server.environ()["AWS_SESSION_TOKEN"] == "token"
            good = client_of(server, aws_session_token="token")
            bad = client_of(server, aws_session_token="other")
            good.put_object(Bucket=BUCKET, Key="k")
            assert refused(bad.put_object, Key="k") == ("InvalidToken", 400)
            good.close()
            bad.close()

    def test_signed_chunks(self, fake: FakeS3, wrong: list[str]) -> None:
        """As SDKs stream over http: each chunk's signature goes on from the one before."""
        wrong += ["SignatureDoesNotMatch"]
        chunks = [b"a" * 70_000, b"b" * 10, b""]
        kind = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
        made = AWSRequest("PUT", f"{fake.endpoint_url}/{BUCKET}/k", data=b"")
        made.headers["x-amz-decoded-content-length"] = "70010"
        auth = S3SigV4Auth(Credentials(fake.access_key, fake.secret_key), "s3", fake.region)
        auth.payload = lambda _: kind
        made.context["signing"] = {}
        auth._should_sha256_sign_payload = lambda _: True
        auth.add_auth(made)
        headers = dict(made.prepare().headers)
        headers.pop("Content-Length")
        assert headers["X-Amz-Content-SHA256"] == kind
        day, previous = headers["X-Amz-Date"][:8], headers["Authorization"][-64:]
        key = f"AWS4{fake.secret_key}".encode()
        for word in (day, fake.region, "s3", "aws4_request"):
            key = hmac.digest(key, word.encode(), "sha256")
        body = b""
        for chunk in chunks:
            text = "\n".join(
                (
                    "AWS4-HMAC-SHA256-PAYLOAD",
                    headers["X-Amz-Date"],
                    f"{day}/{fake.region}/s3/aws4_request",
                    previous,
                    hashlib.sha256(b"").hexdigest(),
                    hashlib.sha256(chunk).hexdigest(),
                )
            )
            previous = hmac.digest(key, text.encode(), "sha256").hex()
            body += f"{len(chunk):x};chunk-signature={previous}\r\n".encode() + chunk + b"\r\n"

        host = fake.endpoint_url.removeprefix("http://")
        raw = request("PUT", f"/{BUCKET}/k", body, Host=host, **headers)
        assert self.answered(fake, raw) == (200, "")
        assert fake.read(BUCKET, "k") == b"".join(chunks)
        spoilt = raw.replace(b"b" * 10, b"c" * 10)
        assert self.answered(fake, spoilt) == (403, "SignatureDoesNotMatch")
        assert fake.read(BUCKET, "k") == b"".join(chunks)


class TestStrictness:
    """What S3 lets pass, or answers in a way that a client may not notice."""

    @pytest.mark.parametrize(
        ("raw", "code"),
        [
            (request("GET", f"/{BUCKET}/k", Range="bytes=0-1,3-4"), "InvalidArgument"),
            (request("GET", f"/{BUCKET}/k", Range="0-1"), "InvalidArgument"),
            (request("GET", f"/{BUCKET}/k", Range="bytes=5-1"), "InvalidArgument"),
            (request("PUT", f"/{BUCKET}/k", Range="bytes=0-1"), "InvalidArgument"),
            (request("PUT", f"/{BUCKET}/k", If_Match='W/"etag"'), "InvalidArgument"),
            (request("GET", f"/{BUCKET}/k", If_Match="etag"), "InvalidArgument"),
            (request("PUT", f"/{BUCKET}/k", If_None_Match='"etag"'), "NotImplemented"),
            (request("POST", f"/{BUCKET}/k?uploads", If_Match='"e"'), "InvalidArgument"),
            (request("PUT", f"/{BUCKET}/k", x_amz_sdk_checksum_algorithm="SHA1"), "InvalidRequest"),
            (request("PUT", f"/{BUCKET}/k", None), "MissingContentLength"),
            (request("GET", f"/{BUCKET}/k?acl"), "NotImplemented"),
            (request("GET", f"/{BUCKET}/k?versionId=1"), "NotImplemented"),
            (request("GET", f"/{BUCKET}/{'k' * 1025}"), "KeyTooLongError"),
            (request("GET", f"/{BUCKET}/%ff"), "InvalidURI"),
            (request("POST", f"/{BUCKET}?delete", b"<Delete/>"), "InvalidRequest"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, open_fake: FakeS3, wire: Wire, raw: bytes, code: str) -> None:
        wire.send(raw)

        assert wire.answer().code == code
        assert [each.code for each in open_fake.violations] == [code]
        with pytest.raises(AssertionError, match=code):
            open_fake.check()
        open_fake.forget()

    def test_what_s3_lets_pass(self) -> None:
        with FakeS3(anonymous=True, strict=False) as server, Wire(server.endpoint_url) as wire:
            server.create_bucket(BUCKET)
            chunks = b"3\r\nabc\r\n8;x=y\r\ndefghijk\r\n0\r\nTrailer: 1\r\n\r\n"
            wire.send(request("PUT", f"/{BUCKET}/k", None, Transfer_Encoding="chunked") + chunks)
            assert wire.answer().status == 200
            wire.send(request("GET", f"/{BUCKET}/k", Range="bytes=0-1,3-4"))
            answer = wire.answer()

            assert (answer.status, answer.body) == (200, b"abcdefghijk")
            server.check()

    def test_ordinary_failures_are_none(self, fake: FakeS3, boto: Any) -> None:
        refused(boto.get_object, Key="k")
        refused(boto.put_object, Key="k", Bucket="none")

        assert fake.violations == []


def aws_chunked(body: bytes, size: int) -> bytes:
    return request(
        "PUT",
        f"/{BUCKET}/k",
        body,
        Content_Encoding="aws-chunked",
        x_amz_decoded_content_length=str(size),
    )


class TestHttp:
    @pytest.mark.parametrize(
        "host",
        [
            f"{BUCKET}.localhost:99",
            f"{BUCKET}.s3.eu-west-1.amazonaws.com",
            f"{BUCKET}.s3.amazonaws.com",
        ],
    )
    def test_a_host_of_their_own(self, open_fake: FakeS3, wire: Wire, host: str) -> None:
        wire.send(request("PUT", "/a/b", b"data", Host=host))

        assert wire.answer().status == 200
        assert open_fake.read(BUCKET, "a/b") == b"data"

    def test_requests_follow_each_other(self, open_fake: FakeS3, wire: Wire) -> None:
        raws = [request("PUT", f"/{BUCKET}/{n}", b"x" * n) for n in (0, 1, 100_000, 7)]
        wire.send(b"".join(raws))
        for _ in raws:
            assert wire.answer().status == 200
        for n in (0, 1, 100_000, 7):
            wire.send(request("GET", f"/{BUCKET}/{n}"))
            assert wire.answer().body == b"x" * n
        wire.send(request("HEAD", f"/{BUCKET}/7") + request("GET", f"/{BUCKET}/1"))

        assert wire.answer(of_head=True).headers["content-length"] == "7"
        assert wire.answer().body == b"x"
        assert {each.connection for each in open_fake.requests} == {0}

    @pytest.mark.parametrize(
        "raw",
        [
            request("PUT", f"/{BUCKET}/k", b"data", Connection="close"),
            request("PUT", f"/{BUCKET}/k", b"data").replace(b"HTTP/1.1", b"HTTP/1.0"),
        ],
    )
    def test_the_last_request(self, open_fake: FakeS3, wire: Wire, raw: bytes) -> None:
        wire.send(raw)

        assert wire.answer().headers["connection"] == "close"
        assert wire.rest() == (b"", "closed")
        assert open_fake.read(BUCKET, "k") == b"data"

    def test_a_body_is_taken_byte_by_byte(self, open_fake: FakeS3, wire: Wire) -> None:
        for byte in request("PUT", f"/{BUCKET}/k", b"data"):
            wire.send(bytes([byte]))

        assert wire.answer().status == 200
        assert open_fake.read(BUCKET, "k") == b"data"

    def test_large_bodies(self, open_fake: FakeS3, wire: Wire) -> None:
        data = bytes(range(256)) * (5 * MiB // 256) + b"end"
        wire.send(request("PUT", f"/{BUCKET}/k", data))
        assert wire.answer().status == 200
        wire.send(request("GET", f"/{BUCKET}/k", Range=f"bytes=1-{5 * MiB + 1}"))

        assert wire.answer().body == data[1:-1]

    def test_a_client_that_asks_first(self, open_fake: FakeS3, wire: Wire) -> None:
        head, _, body = request("PUT", f"/{BUCKET}/k", b"data", Expect="100-continue").partition(
            b"\r\n\r\n"
        )
        wire.send(head + b"\r\n\r\n")
        assert wire.line() == b"HTTP/1.1 100 Continue"
        assert wire.line() == b""
        wire.send(body)

        assert wire.answer().status == 200

    def test_a_client_that_asks_first_and_may_not(self, fake: FakeS3, wrong: list[str]) -> None:
        wrong += ["AccessDenied"]
        raw = request("PUT", f"/{BUCKET}/k", b"data", Expect="100-continue").removesuffix(b"data")
        with Wire(fake.endpoint_url) as wire:
            wire.send(raw)
            answer = wire.answer()
            assert (answer.status, answer.headers["connection"]) == (403, "close")
            assert wire.rest() == (b"", "closed")

    @pytest.mark.parametrize("framed", ["length", "chunked"])
    def test_aws_chunks(self, open_fake: FakeS3, wire: Wire, framed: str) -> None:
        crc = text_of("CRC32", b"data" * 3)
        body = f"4\r\ndata\r\n8\r\ndatadata\r\n0\r\nx-amz-checksum-crc32:{crc}\r\n\r\n".encode()
        headers = {
            "Content-Encoding": "aws-chunked",
            "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
            "x-amz-decoded-content-length": "12",
            "x-amz-trailer": "x-amz-checksum-crc32",
        }
        if framed == "length":
            raw = request("PUT", f"/{BUCKET}/k", body, **headers)
        else:
            raw = request("PUT", f"/{BUCKET}/k", None, Transfer_Encoding="chunked", **headers)
            for at in range(0, len(body), 5):
                raw += b"%x\r\n%b\r\n" % (len(body[at : at + 5]), body[at : at + 5])
            raw += b"0\r\n\r\n"
        wire.send(raw)

        answer = wire.answer()
        assert (answer.status, answer.headers["x-amz-checksum-crc32"]) == (200, crc)
        assert open_fake.read(BUCKET, "k") == b"data" * 3
        wire.send(request("HEAD", f"/{BUCKET}/k"))
        assert "content-encoding" not in wire.answer(of_head=True).headers

    @pytest.mark.parametrize("framed", ["plain", "aws-chunked"])
    def test_dropped_bodies_are_verified_as_they_come(self, framed: str) -> None:
        data = bytes(range(256)) * (5 * MiB // 256) + b"end"
        name, headers = "x-amz-checksum-crc64nvme", dict[str, str]()
        with FakeS3(anonymous=True, discard="drop/") as server, Wire(server.endpoint_url) as wire:
            server.create_bucket(BUCKET)

            def put(crc: str) -> None:
                body = data
                if framed == "plain":
                    headers[name] = crc
                else:
                    chunks = b"%x\r\n%b\r\n" * 2 % (9, data[:9], len(data) - 9, data[9:])
                    body = chunks + f"0\r\n{name}:{crc}\r\n\r\n".encode()
                    headers["Content-Encoding"] = "aws-chunked"
                    headers["x-amz-decoded-content-length"] = str(len(data))
                    headers["x-amz-trailer"] = name
                wire.send(request("PUT", f"/{BUCKET}/drop/k", body, **headers))

            true, wrong = text_of("CRC64NVME", data), text_of("CRC64NVME", data[1:])
            put(true)
            answer = wire.answer()
            assert (answer.status, answer.headers[name]) == (200, true)
            put(wrong)
            assert b"BadDigest" in wire.answer().body
            assert [each.code for each in server.violations] == ["BadDigest"]
            server.forget()
            server.inject(FlipByte(offset=7, upload=True))
            put(true)
            assert b"BadDigest" in wire.answer().body
            assert server.read(BUCKET, "drop/k") == bytes(len(data))
            server.check()

    @pytest.mark.parametrize(
        "raw",
        [
            b"nonsense\r\n\r\n",
            b"GET http://host/ HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nbroken\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 12_000 + b"\r\n",
            b"\r\n\r\n",
            b"PUT /bkt/k HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
            request("PUT", f"/{BUCKET}/k", None, Transfer_Encoding="chunked") + b"zz\r\n",
            request("PUT", f"/{BUCKET}/k", None, Transfer_Encoding="chunked") + b"1\r\nabc\r\n",
            aws_chunked(b"4\r\ndata\r\n0\r\n\r\n", 5),
            aws_chunked(b"4\r\ndata\r\n0\r\n\r\n", 3),
            aws_chunked(b"4\r\ndata\r\n0\r\n\r\n+", 4),
            aws_chunked(b"4\r\ndata+\r\n0\r\n\r\n", 4),
        ],
    )  # fmt: skip
    def test_what_is_no_http(self, open_fake: FakeS3, wire: Wire, raw: bytes) -> None:
        wire.send(raw)

        assert wire.answer().status == 400
        assert wire.rest() == (b"", "closed")
        assert [each.code for each in open_fake.violations] == ["BadRequest"]
        assert open_fake.keys(BUCKET) == []
        open_fake.forget()

    def test_a_body_longer_than_its_length(self, open_fake: FakeS3, wire: Wire) -> None:
        wire.send(request("PUT", f"/{BUCKET}/k", b"data") + b"more\r\n\r\n")

        assert wire.answer().status == 200
        assert wire.answer().status == 400
        assert [each.record.operation for each in open_fake.violations] == ["PutObject"]
        open_fake.forget()

    def test_a_body_shorter_than_its_length(self, open_fake: FakeS3, wire: Wire) -> None:
        wire.send(request("PUT", f"/{BUCKET}/k", b"data", Content_Length="5"))
        wire.finish()

        assert wire.rest() == (b"", "closed")
        assert open_fake.keys(BUCKET) == []
        assert open_fake.requests[0].status is None

    def test_a_client_that_does_not_read_is_not_read_ahead_of(self, open_fake: FakeS3) -> None:
        """What it did not take waits in the object's own memory."""
        open_fake.write(BUCKET, "k", bytes(64 * MiB))
        with Wire(open_fake.endpoint_url) as wire:
            wire.send(request("GET", f"/{BUCKET}/k"))
            wire.line()
            (connection,) = open_fake._running.service._connections  # type: ignore[union-attr]

            assert connection.unsent > 32 * MiB
            assert connection.transport.get_write_buffer_size() <= 4 * MiB

    def test_slow_links(self) -> None:
        """Latency and bandwidth bound the time from below; above, nothing does."""
        with (
            FakeS3(anonymous=True, latency_s=0.05, bytes_per_s=20 * MiB) as server,
            Wire(server.endpoint_url) as wire,
        ):
            server.create_bucket(BUCKET)
            for raw in (
                request("PUT", f"/{BUCKET}/k", bytes(2 * MiB)),
                request("GET", f"/{BUCKET}/k"),
            ):
                start = datetime.now(UTC)
                wire.send(raw)
                assert wire.answer().status == 200
                assert datetime.now(UTC) - start > timedelta(seconds=0.05 + 0.1 - 0.02)

    def test_tls(self, tmp_path: Path) -> None:
        """And what SDKs send over it alone: unsigned chunks with a trailing checksum."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
        data = bytes(range(256)) * (3 * MiB // 256)
        with FakeS3(ssl_context=context) as server:
            server.create_bucket(BUCKET)
            assert server.endpoint_url.startswith("https://")
            config = {"request_checksum_calculation": "when_supported"}
            client = client_of(server, verify=str(tmp_path / "ca.pem"), config=config)
            client.put_object(Bucket=BUCKET, Key="k", Body=data)
            got = client.get_object(Bucket=BUCKET, Key="k")["Body"].read()
            client.close()

            assert got == data
            headers = server.requests[0].headers
            assert headers["x-amz-content-sha256"] == "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
            server.check()


class TestServer:
    def test_it_keeps_what_it_holds_when_it_is_stopped(self) -> None:
        server = FakeS3()
        server.create_bucket(BUCKET)
        with server:
            first = server.endpoint_url
            server.write(BUCKET, "k", b"data")
            with pytest.raises(LocalServerError, match="running already"):
                server.start()
        with server:
            assert server.read(BUCKET, "k") == b"data"
            assert repr(server) == f"<FakeS3 endpoint_url={server.endpoint_url!r}>"
        server.stop()
        with pytest.raises(LocalServerError, match="not running"):
            server.endpoint_url  # noqa: B018 - it raises
        assert first
        assert repr(server) == "<FakeS3 stopped>"

    def test_it_stops_with_clients_connected(self) -> None:
        with FakeS3() as server:
            wire = Wire(server.endpoint_url)
            wire.send(b"PUT /half HTTP/1.1\r\n")
        with wire:
            data, _ = wire.rest()
            assert data == b""

    def test_a_port_that_is_taken(self) -> None:
        with FakeS3() as server:
            port = int(server.endpoint_url.rpartition(":")[2])
            with pytest.raises(LocalServerError, match="cannot listen"):
                FakeS3(port=port).start()

    def test_what_it_counts(self, fake: FakeS3, boto: Any) -> None:
        boto.put_object(Bucket=BUCKET, Key="k", Body=b"12345")
        boto.get_object(Bucket=BUCKET, Key="k", Range="bytes=1-2")["Body"].read()
        refused(boto.get_object, Key="none")

        put, get, missing = fake.requests
        assert [each.index for each in fake.requests] == [0, 1, 2]
        assert (put.operation, put.key, put.bytes_in, put.status) == ("PutObject", "k", 5, 200)
        assert (get.operation, get.bytes_out, get.status) == ("GetObject", 2, 206)
        assert get.headers["range"] == "bytes=1-2"
        assert (missing.status, missing.code) == (404, "NoSuchKey")
        counts = fake.stats()
        assert (counts["requests"], counts["PutObject"], counts["GetObject"]) == (3, 1, 2)
        assert counts["bytes_in"] == 5
        assert counts["bytes_out"] == 2 + missing.bytes_out
