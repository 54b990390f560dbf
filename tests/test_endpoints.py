"""Where requests go, as whom, and over what: addresses, credentials, headers, TLS, proxies, stores.

AWS itself is played by a proxy that ends the tunnels to it: botocore believes that it speaks to
`bucket.s3.eu-west-1.amazonaws.com`, over TLS, with a certificate for that name.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import trustme

from s3dcp import (
    S3Client,
    S3ClientConfig,
    S3ConfigError,
    S3ConnectionError,
    S3StorageReader,
    S3StorageWriter,
    WrongRegionError,
)
from tests._scripted import Handler, Request, Scripted, answer, error, forward
from tests._servers import Server
from tests._tls import TlsEndpoint

MiB = 1 << 20
REGION = "eu-west-1"
# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")


def checkpoint(
    uri: str,
    config: S3ClientConfig | None = None,
    region: str | None = None,
    size: int = 100,
) -> None:
    """Save, save over it, and load."""
    for step in range(2):
        saved: dict[str, Any] = {"weight": torch.arange(float(size)) + step, "step": step}
        dcp.save(saved, storage_writer=S3StorageWriter(region, uri, config), no_dist=True)
        loaded: dict[str, Any] = {"weight": torch.zeros(size), "step": -1}
        dcp.load(loaded, storage_reader=S3StorageReader(region, uri, config), no_dist=True)
        assert torch.equal(loaded["weight"], saved["weight"])
        assert loaded["step"] == step


def get(bucket: str, key: str = "a/key", region: str | None = REGION, **settings: Any) -> bytearray:
    client = S3Client(region, S3ClientConfig(max_attempts=1, **settings))
    return asyncio.run(client.get_object(bucket, key, 0, 4))


def body(request: Request) -> bytes:
    return answer(206, b"body", Content_Range="bytes 0-3/4")


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "aws.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


Aws = Callable[[Handler], Scripted]


@pytest.fixture
def aws(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, ca_bundle: Path, credentials: None
) -> Iterator[Aws]:
    """Starts an AWS whose requests the handler answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(
        "s3.eu-west-1.amazonaws.com",
        "*.s3.eu-west-1.amazonaws.com",
        "*.s3-accesspoint.eu-west-1.amazonaws.com",
        "*.mrap.accesspoint.s3-global.amazonaws.com",
        "*.s3.amazonaws.com",
        "*.s3.cn-north-1.amazonaws.com.cn",
        "*.s3-fips.us-gov-west-1.amazonaws.com",
        "*.s3.dualstack.eu-west-1.amazonaws.com",
    ).configure_cert(context)
    started: list[Scripted] = []

    def start(handler: Handler) -> Scripted:
        scripted = Scripted(handler, tunnel_tls=context)
        started.append(scripted.__enter__())
        monkeypatch.setenv("HTTPS_PROXY", scripted.endpoint_url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(ca_bundle))
        return scripted

    yield start
    for scripted in started:
        scripted.__exit__(None, None, None)


class TestAwsAddresses:
    @pytest.mark.parametrize(
        ("bucket", "region", "settings", "host", "path"),
        [
            ("mine", "eu-west-1", {}, "mine.s3.eu-west-1.amazonaws.com", "/a/key"),
            # botocore still has the global address for it.
            ("mine", "us-east-1", {}, "mine.s3.amazonaws.com", "/a/key"),
            ("mine", "cn-north-1", {}, "mine.s3.cn-north-1.amazonaws.com.cn", "/a/key"),
            # Path style by choice, and where a certificate's wildcard would not match.
            (
                *("mine", "eu-west-1", {"force_path_style": True}),
                *("s3.eu-west-1.amazonaws.com", "/mine/a/key"),
            ),
            ("my.own", "eu-west-1", {}, "s3.eu-west-1.amazonaws.com", "/my.own/a/key"),
            (
                *("arn:aws:s3:eu-west-1:123456789012:accesspoint/mine", "eu-west-1", {}),
                *("mine-123456789012.s3-accesspoint.eu-west-1.amazonaws.com", "/a/key"),
            ),
        ],
    )
    def test_by_region_and_bucket(
        self, aws: Aws, bucket: str, region: str, settings: dict[str, Any], host: str, path: str
    ) -> None:
        scripted = aws(body)
        assert get(bucket, region=region, **settings) == b"body"
        connect, request = scripted.requests
        assert (connect.method, connect.target) == ("CONNECT", f"{host}:443")
        assert (request.headers["host"], request.path) == (host, path)
        scope = f"/{region}/s3/aws4_request"
        assert "Credential=key-of-environment/" in request.headers["authorization"]
        assert scope in request.headers["authorization"]

    @pytest.mark.parametrize("region", [REGION, None])
    def test_a_multi_region_access_point(self, aws: Aws, region: str | None) -> None:
        """Signed for all regions at once (SigV4A), for which awscrt is there."""
        scripted = aws(body)
        arn = "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap"
        assert get(arn, region=region) == b"body"
        headers = scripted.requests[1].headers
        assert headers["host"] == "mfzwi23gnjvgw.mrap.accesspoint.s3-global.amazonaws.com"
        assert headers["authorization"].startswith("AWS4-ECDSA-P256-SHA256 ")
        assert headers["x-amz-region-set"] == "*"

    def test_dualstack_by_the_environment(self, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
        scripted = aws(body)
        assert get("mine") == b"body"
        assert scripted.requests[1].headers["host"] == "mine.s3.dualstack.eu-west-1.amazonaws.com"

    @pytest.mark.parametrize(
        ("status", "code"),
        [(301, "PermanentRedirect"), (307, "TemporaryRedirect")],
    )
    def test_without_a_region_it_is_the_buckets(self, aws: Aws, status: int, code: str) -> None:
        """It is asked for at the global address, and followed to its own; later ones go there."""

        def handler(request: Request) -> bytes:
            if request.headers["host"] == "mine.s3.amazonaws.com":
                return error(status, code, x_amz_bucket_region=REGION)
            return body(request)

        scripted = aws(handler)
        for _ in range(2):
            assert get("mine", region=None) == b"body"
        hosts = [each.headers["host"] for each in scripted.requests if each.method == "GET"]
        assert hosts == ["mine.s3.amazonaws.com", *["mine.s3.eu-west-1.amazonaws.com"] * 2]

    def test_a_bucket_is_not_followed_from_a_region_that_was_given(self, aws: Aws) -> None:
        """The user is told: requests across regions cost money, and there would be thousands."""
        headers = {"x_amz_bucket_region": "eu-central-1"}
        scripted = aws(lambda _: error(301, "PermanentRedirect", **headers))
        with pytest.raises(WrongRegionError, match="pass region='eu-central-1'"):
            get("mine")
        assert [request.method for request in scripted.requests] == ["CONNECT", "GET"]

    @pytest.mark.parametrize("region", ["eu-west-1", None])
    def test_the_region_by_the_environment(
        self, aws: Aws, monkeypatch: pytest.MonkeyPatch, region: str | None
    ) -> None:
        monkeypatch.setenv("AWS_REGION" if region else "AWS_DEFAULT_REGION", "eu-west-1")
        scripted = aws(body)
        assert get("mine", region=None) == b"body"
        assert scripted.requests[1].headers["host"] == "mine.s3.eu-west-1.amazonaws.com"

    def test_a_checkpoint(
        self,
        aws: Aws,
        moto: Server,
        boto: Any,
        bucket: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        credentials: None,
    ) -> None:
        """By virtual hosts and TLS; AWS honours conditions, so that there is no warning."""
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        host = f"{bucket}.s3.{REGION}.amazonaws.com"
        real = forward(moto.endpoint_url)

        async def handle(request: Request) -> bytes:
            assert request.headers["host"] == host
            headers = {**request.headers, "host": moto.endpoint_url.removeprefix("http://")}
            moved = replace(request, target=f"/{bucket}{request.target}", headers=headers)
            made = real(moved)
            return made if isinstance(made, bytes) else await made

        scripted = aws(handle)
        checkpoint(f"s3://{bucket}/run", region=REGION, size=3 * MiB)
        assert {r.tunnel for r in scripted.requests if r.method != "CONNECT"} == {f"{host}:443"}
        commits = [r for r in scripted.sent("PUT") if r.path.endswith(".metadata")]
        assert commits[0].headers["if-none-match"] == "*"
        assert commits[1].headers["if-match"].startswith('"')
        assert all("content-encoding" not in r.headers for r in scripted.sent("PUT"))
        assert warnings_of(caplog) == []


@dataclass
class Places:
    """A store for each of the settings."""

    config: Scripted
    s3: Scripted
    everything: Scripted
    profile: Scripted


class TestEndpoints:
    """Which of the settings wins."""

    @pytest.fixture
    def places(self, credentials: None) -> Iterator[Places]:
        with Scripted(body) as a, Scripted(body) as b, Scripted(body) as c, Scripted(body) as d:
            yield Places(a, b, c, d)

    def test_in_order(
        self, places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        config = tmp_path / "config"
        # A profile that was asked for brings its own credentials, whatever the environment has.
        keys = "aws_access_key_id = mine\naws_secret_access_key = secret\n"
        url = places.profile.endpoint_url
        config.write_text(f"[profile mine]\n{keys}endpoint_url = {url}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        assert get("bucket", profile="mine") == b"body"
        assert len(places.profile.requests) == 1
        monkeypatch.setenv("AWS_ENDPOINT_URL", places.everything.endpoint_url)
        assert get("bucket", profile="mine") == b"body"
        assert len(places.everything.requests) == 1
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", places.s3.endpoint_url)
        assert get("bucket", profile="mine") == b"body"
        assert len(places.s3.requests) == 1
        url = places.config.endpoint_url
        assert get("bucket", profile="mine", endpoint_url=url) == b"body"
        assert len(places.config.requests) == 1
        assert len(places.profile.requests) == 1

    def test_an_address_is_addressed_by_path(self, places: Places) -> None:
        assert get("bucket", endpoint_url=places.config.endpoint_url) == b"body"
        [request] = places.config.requests
        assert request.target == "/bucket/a/key"
        assert request.headers["host"] == places.config.endpoint_url.removeprefix("http://")

    @pytest.mark.parametrize(
        ("settings", "target"),
        [
            ({"force_path_style": True}, "http://store.example:9000/bucket/a/key"),
            # botocore's own choice for a store by name.
            ({}, "http://store.example:9000/bucket/a/key"),
        ],
    )
    def test_a_name(
        self, credentials: None, monkeypatch: pytest.MonkeyPatch, settings: Any, target: str
    ) -> None:
        with Scripted(body) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.endpoint_url)
            assert get("bucket", endpoint_url="http://store.example:9000", **settings) == b"body"
        assert [request.target for request in proxy.requests] == [target]

    def test_virtual_hosts_of_a_store(
        self, credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """By the profile, as botocore has it."""
        config = tmp_path / "config"
        config.write_text("[default]\ns3 =\n  addressing_style = virtual\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        with Scripted(body) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.endpoint_url)
            assert get("bucket", endpoint_url="http://store.example") == b"body"
        [request] = proxy.requests
        assert request.target == "http://bucket.store.example/a/key"
        assert request.headers["host"] == "bucket.store.example"

    @pytest.mark.parametrize("value", ["localhost:9000", "not a url"])
    def test_what_is_none(
        self, credentials: None, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", value)
        with pytest.raises(S3ConfigError, match=r"(?i)endpoint"):
            get("bucket")


class TestCredentials:
    """Each source that botocore knows, as far as it can be played."""

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
        with Scripted(body) as scripted:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", scripted.endpoint_url)
            yield scripted

    @staticmethod
    def key_of(store: Scripted) -> tuple[str, str | None]:
        [request] = store.requests
        signed = request.headers["authorization"]
        token = request.headers.get("x-amz-security-token")
        return signed.partition("Credential=")[2].partition("/")[0], token

    @staticmethod
    def write(path: Path, text: str) -> str:
        path.write_text(text)
        return str(path)

    def test_environment(self, store: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        assert get("bucket") == b"body"
        assert self.key_of(store) == ("mine", "token")

    @pytest.mark.parametrize("by", ["setting", "environment"])
    def test_profile(
        self, store: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
    ) -> None:
        text = """
[default]
aws_access_key_id = default
aws_secret_access_key = secret
[training]
aws_access_key_id = training
aws_secret_access_key = secret
"""
        path = self.write(tmp_path / "credentials", text)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", path)
        if by == "environment":
            monkeypatch.setenv("AWS_PROFILE", "training")
            assert get("bucket") == b"body"
        else:
            assert get("bucket", profile="training") == b"body"
        assert self.key_of(store) == ("training", None)

    def test_process(
        self, store: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        made = {"Version": 1, "AccessKeyId": "made", "SecretAccessKey": "s", "SessionToken": "t"}
        program = self.write(tmp_path / "make.py", f"print({json.dumps(made)!r})")
        text = f"[default]\ncredential_process = {sys.executable} {program}\n"
        monkeypatch.setenv("AWS_CONFIG_FILE", self.write(tmp_path / "config", text))
        assert get("bucket") == b"body"
        assert self.key_of(store) == ("made", "t")

    def test_container(self, store: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        made = {
            "AccessKeyId": "container",
            "SecretAccessKey": "s",
            "Token": "t",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        with Scripted(lambda _: answer(200, json.dumps(made).encode())) as agent:
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{agent.endpoint_url}/creds")
            monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "who-am-i")
            assert get("bucket") == b"body"
            assert agent.requests[0].headers["authorization"] == "who-am-i"
        assert self.key_of(store) == ("container", "t")

    def test_instance(self, store: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        made = {
            "Code": "Success",
            "AccessKeyId": "instance",
            "SecretAccessKey": "s",
            "Token": "t",
            "Expiration": "2099-01-01T00:00:00Z",
        }

        def handle(request: Request) -> bytes:
            if request.method == "PUT":
                return answer(200, b"session")
            assert request.headers["x-aws-ec2-metadata-token"] == "session"
            if request.path.endswith("/security-credentials/"):
                return answer(200, b"role")
            return answer(200, json.dumps(made).encode())

        with Scripted(handle) as service:
            monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
            monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{service.endpoint_url}/")
            assert get("bucket") == b"body"
        assert self.key_of(store) == ("instance", "t")

    def test_web_identity(
        self, store: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        made = (
            b"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
            b"<AccessKeyId>web</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
            b"<SessionToken>t</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>"
            b"</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        with Scripted(lambda _: answer(200, made, Content_Type="text/xml")) as sts:
            monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.endpoint_url)
            path = self.write(tmp_path / "token", "a-pods-token")
            monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", path)
            monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/training")
            assert get("bucket") == b"body"
            assert b"WebIdentityToken=a-pods-token" in sts.requests[0].body
        assert self.key_of(store) == ("web", "t")

    def test_anonymous(self, store: Scripted) -> None:
        """There are no credentials, and none are looked for."""
        assert get("bucket", unsigned=True) == b"body"
        [request] = store.requests
        assert "authorization" not in request.headers
        assert "x-amz-security-token" not in request.headers
        assert "Signature" not in request.target


Exchange = Callable[..., dict[str, list[Request]]]


class TestSettingsOnRequests:
    """On moto: rclone knows none of these headers."""

    @pytest.fixture
    def exchanged(self, moto: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Exchange:
        """Does one of everything, and returns the requests by S3's name for them."""

        async def everything(client: S3Client) -> None:
            await client.put_object(bucket, "small", b"body")
            await client.put_object(bucket, "large", bytes(9 * MiB))
            await client.copy_object(bucket, "small", bucket, "copy")
            await client.get_object(bucket, "small")
            assert [info.key async for info in client.list_objects(bucket)]
            await client.delete_object(bucket, "copy")

        def exchange(**settings: Any) -> dict[str, list[Request]]:
            with Scripted(forward(moto.endpoint_url)) as scripted:
                monkeypatch.setenv("AWS_ENDPOINT_URL", scripted.endpoint_url)
                asyncio.run(everything(S3Client(moto.region, S3ClientConfig(**settings))))
            found: dict[str, list[Request]] = {}
            for request in scripted.requests:
                found.setdefault(operation(request), []).append(request)
            assert set(found) == {*READS, *WRITES}
            return found

        return exchange

    def test_they_are_sent(self, exchanged: Exchange) -> None:
        found = exchanged(
            requester_pays=True,
            expected_bucket_owner="123456789012",
            storage_class="INTELLIGENT_TIERING",
            server_side_encryption="aws:kms",
            sse_kms_key_id="alias/mine",
        )
        for name, requests in found.items():
            for request in requests:
                headers = {h: v for h, v in request.headers.items() if h.endswith(SET)}
                expected = {
                    "x-amz-request-payer": "requester",
                    "x-amz-expected-bucket-owner": "123456789012",
                }
                if name in WRITES:
                    expected |= {
                        "x-amz-storage-class": "INTELLIGENT_TIERING",
                        "x-amz-server-side-encryption": "aws:kms",
                        "x-amz-server-side-encryption-aws-kms-key-id": "alias/mine",
                    }
                assert headers == expected, name

    def test_none_by_default(self, exchanged: Exchange) -> None:
        for requests in exchanged().values():
            for request in requests:
                assert not [name for name in request.headers if name.endswith(SET)]


SET = ("-payer", "-owner", "-class", "-encryption", "-key-id")
READS = (
    *("GetObject", "HeadObject", "ListObjectsV2", "UploadPart", "CompleteMultipartUpload"),
    "DeleteObject",
)
WRITES = ("PutObject", "CreateMultipartUpload", "CopyObject")


def operation(request: Request) -> str:
    """Return S3's name of a request."""
    match request.method:
        case "PUT" if "partNumber" in request.query:
            return "UploadPart"
        case "PUT" if "x-amz-copy-source" in request.headers:
            return "CopyObject"
        case "GET" if "list-type" in request.query:
            return "ListObjectsV2"
        case "POST" if "uploadId" in request.query:
            return "CompleteMultipartUpload"
        case "POST":
            return "CreateMultipartUpload"
    return {"HEAD": "HeadObject", "DELETE": "DeleteObject"}.get(
        request.method, f"{request.method.title()}Object"
    )


class TestTls:
    def test_an_authority_by_setting(
        self, bucket: str, tls_endpoint: TlsEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for ca_bundle in (tls_endpoint.ca_bundle, str(tls_endpoint.ca_bundle)):
            config = S3ClientConfig(endpoint_url=tls_endpoint.endpoint_url, ca_bundle=ca_bundle)
            checkpoint(f"s3://{bucket}/run", config, size=3 * MiB)

    def test_an_authority_by_the_environment(
        self, bucket: str, tls_endpoint: TlsEndpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", tls_endpoint.endpoint_url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tls_endpoint.ca_bundle))
        checkpoint(f"s3://{bucket}/run")

    def test_one_that_is_not_trusted(self, bucket: str, tls_endpoint: TlsEndpoint) -> None:
        """Told at once, not after ten attempts."""
        client = S3Client(REGION, S3ClientConfig(endpoint_url=tls_endpoint.endpoint_url))
        with pytest.raises(S3ConnectionError, match="ca_bundle") as caught:
            asyncio.run(client.get_object(bucket, "key"))
        assert caught.value.retryable is False

    def test_a_bundle_that_is_not_there(
        self, bucket: str, tls_endpoint: TlsEndpoint, tmp_path: Path
    ) -> None:
        (tmp_path / "empty.pem").write_text("")
        for path in (tmp_path / "missing.pem", tmp_path / "empty.pem"):
            config = S3ClientConfig(endpoint_url=tls_endpoint.endpoint_url, ca_bundle=path)
            with pytest.raises(S3ConfigError, match="ca_bundle"):
                asyncio.run(S3Client(REGION, config).get_object(bucket, "key"))


class TestProxies:
    def test_a_checkpoint_by_one(
        self, server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Scripted(forward(server.endpoint_url)) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.endpoint_url)
            checkpoint(f"s3://{bucket}/run", region=server.region)
        assert proxy.requests
        assert all(r.target.startswith(f"{server.endpoint_url}/") for r in proxy.requests)

    def test_one_that_is_not_there(
        self, server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        with pytest.raises(S3ConnectionError, match="check the endpoint's address"):
            get(bucket)

    def test_past_it(self, server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        checkpoint(f"s3://{bucket}/run", region=server.region)


def warnings_of(caplog: pytest.LogCaptureFixture, logger: str = "s3dcp.commits") -> list[str]:
    found = [r for r in caplog.records if r.levelno >= logging.WARNING]
    return [record.getMessage() for record in found if record.name == logger]


def without(names: str, handler: Handler, *, of_answers: bool) -> Handler:
    """Drop headers that start so, on their way to the store or back."""

    async def handle(request: Request) -> bytes:
        if not of_answers:
            kept = {k: v for k, v in request.headers.items() if not k.startswith(names)}
            request = replace(request, headers=kept)
        made = handler(request)
        made = made if isinstance(made, bytes) else await made
        if not of_answers:
            return made
        head, _, rest = made.partition(b"\r\n\r\n")
        lines = [
            line for line in head.split(b"\r\n") if not line.lower().startswith(names.encode())
        ]
        return b"\r\n".join(lines) + b"\r\n\r\n" + rest

    return handle


class TestStoresThatLackFeatures:
    """They save and load all the same, and say once what is missing."""

    @pytest.mark.parametrize("refusal", [(501, "NotImplemented"), (400, "InvalidArgument")])
    def test_conditions_are_refused(
        self,
        server: Server,
        boto: Any,
        bucket: str,
        caplog: pytest.LogCaptureFixture,
        refusal: tuple[int, str],
    ) -> None:
        real = forward(server.endpoint_url)

        def handle(request: Request) -> Any:
            if request.method == "PUT" and {"if-match", "if-none-match"} & set(request.headers):
                return error(*refusal)
            return real(request)

        with Scripted(handle) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url)
            checkpoint(f"s3://{bucket}/run", config)
            checkpoint(f"s3://{bucket}/other", config)
        [warning] = warnings_of(caplog)
        assert "not known to honour conditional writes" in warning
        assert "let one job at a time save to a path" in warning

    def test_conditions_are_ignored(
        self, server: Server, bucket: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As by rclone."""
        config = S3ClientConfig(endpoint_url=server.endpoint_url, max_attempts=9)
        checkpoint(f"s3://{bucket}/run", config)
        checkpoint(f"s3://{bucket}/other", config)
        [warning] = warnings_of(caplog)
        assert "not known to honour conditional writes" in warning

    def test_conditions_are_believed_by_configuration(
        self, moto: Server, bucket: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = S3ClientConfig(endpoint_url=moto.endpoint_url, conditional_writes=True)
        checkpoint(f"s3://{bucket}/run", config)
        assert warnings_of(caplog) == []

    def test_no_conditions_by_configuration(
        self, server: Server, bucket: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Scripted(forward(server.endpoint_url)) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url, conditional_writes=False)
            checkpoint(f"s3://{bucket}/run", config)
        for request in scripted.sent("PUT"):
            assert {"if-match", "if-none-match"}.isdisjoint(request.headers)
        assert len(warnings_of(caplog)) == 1

    def test_checksums_are_not_echoed(
        self, server: Server, bucket: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.check_no_checksum_is_named(
            bucket, without("x-amz-checksum", forward(server.endpoint_url), of_answers=True)
        )
        [warning] = warnings_of(caplog, "s3dcp.uploads")
        assert "does not verify CRC64NVME checksums" in warning

    def test_checksums_are_not_known(self, moto: Server, bucket: str) -> None:
        """On moto: to rclone the headers are a part of the signature."""
        deaf = without("x-amz-checksum", forward(moto.endpoint_url), of_answers=False)
        self.check_no_checksum_is_named(bucket, without("x-amz-checksum", deaf, of_answers=True))

    @staticmethod
    def check_no_checksum_is_named(bucket: str, handler: Handler) -> None:
        """A store that did not take the parts' checksums is not told them on completion."""
        with Scripted(handler) as scripted:
            config = S3ClientConfig(
                endpoint_url=scripted.endpoint_url, part_size=5 * MiB, max_connections=1
            )
            checkpoint(f"s3://{bucket}/run", config, size=10 * MiB // 4)
        completions = [r for r in scripted.sent("POST") if "uploadId" in r.query]
        assert completions
        for request in completions:
            assert b"Checksum" not in request.body
            assert not [name for name in request.headers if name.startswith("x-amz-checksum-crc")]

    def test_multipart_uploads_are_answered_oddly(self, server: Server, bucket: str) -> None:
        """By rclone: the root of its XML has another name."""
        with Scripted(forward(server.endpoint_url)) as scripted:
            config = S3ClientConfig(
                endpoint_url=scripted.endpoint_url, part_size=5 * MiB, max_connections=1
            )
            checkpoint(f"s3://{bucket}/run", config, size=10 * MiB // 4)
        assert any("uploadId" in request.query for request in scripted.sent("POST"))

    def test_no_etags(self, server: Server, bucket: str) -> None:
        handler = without("etag", forward(server.endpoint_url), of_answers=True)
        with Scripted(handler) as scripted:
            checkpoint(f"s3://{bucket}/run", S3ClientConfig(endpoint_url=scripted.endpoint_url))

    def test_weak_etags(self, server: Server, bucket: str) -> None:
        real = forward(server.endpoint_url)

        async def handle(request: Request) -> bytes:
            made = real(request)
            made = made if isinstance(made, bytes) else await made
            return made.replace(b'\r\nEtag: "', b'\r\nETag: W/"')

        with Scripted(handle) as scripted:
            checkpoint(f"s3://{bucket}/run", S3ClientConfig(endpoint_url=scripted.endpoint_url))
        for request in scripted.sent("PUT"):
            assert "if-match" not in request.headers
