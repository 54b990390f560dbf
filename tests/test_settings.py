"""Which setting wins: what was given, then the environment, then the AWS files, then the default.

A client is made and asked what it has come to; no request is sent.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from s3dcp import S3Client, S3ClientConfig, S3ConfigError, ServerError
from s3dcp._client import S3Store
from s3dcp.testing import FakeS3, internal_error
from tests._fakes import BUCKET, addressed
from tests._scripted import Scripted, answer

CONFIG = """
[default]
region = eu-south-1
aws_access_key_id = key-default
aws_secret_access_key = secret
[profile training]
region = eu-north-1
endpoint_url = http://profile
ca_bundle = {folder}/profile.pem
max_attempts = 4
aws_access_key_id = key-training
aws_secret_access_key = secret
[profile serving]
region = sa-east-1
endpoint_url = http://profile
services = ours
[services ours]
s3 =
  endpoint_url = http://services
sts =
  endpoint_url = http://sts
"""
KEYS = {"AWS_ACCESS_KEY_ID": "key-environment", "AWS_SECRET_ACCESS_KEY": "secret"}
AWS = "https://s3.eu-south-1.amazonaws.com"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a client has come to."""

    region: str
    endpoint_url: str
    access_key: str | None
    ca_bundle: str | None
    max_attempts: int


async def _resolve(region: str | None, config: S3ClientConfig) -> Resolved:
    store = S3Store(region, config)
    await store.open()
    try:
        client: Any = store._client
        credentials = client._get_credentials()
        found = await credentials.get_frozen_credentials() if credentials else None
        verify = client._endpoint.http_session._verify
        return Resolved(
            region=client.meta.region_name,
            endpoint_url=client.meta.endpoint_url,
            access_key=found and found.access_key,
            ca_bundle=Path(verify).name if isinstance(verify, str) else None,
            max_attempts=store.max_attempts,
        )
    finally:
        await store.close()


def resolve(region: str | None = None, **settings: Any) -> Resolved:
    return asyncio.run(_resolve(region, S3ClientConfig(**settings)))


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The AWS configuration file, and certificates for it to name."""
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)  # botocore's last resort
    (tmp_path / "config").write_text(CONFIG.format(folder=tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("given", "environment", "profile"):
        trustme.CA().cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "settings", "name", "found"),
    [
        # Profiles.
        ({}, {}, "access_key", "key-default"),
        ({"AWS_PROFILE": "training"}, {}, "access_key", "key-training"),
        ({"AWS_DEFAULT_PROFILE": "training"}, {}, "access_key", "key-training"),
        ({"AWS_PROFILE": "serving"}, {"profile": "training"}, "access_key", "key-training"),
        # A profile of the environment's does not stand before its keys; one that was given does.
        (KEYS, {}, "access_key", "key-environment"),
        (KEYS | {"AWS_PROFILE": "training"}, {}, "access_key", "key-environment"),
        (KEYS, {"profile": "training"}, "access_key", "key-training"),
        # Regions.
        ({}, {}, "region", "eu-south-1"),
        ({}, {"profile": "training"}, "region", "eu-north-1"),
        ({"AWS_DEFAULT_REGION": "us-west-1"}, {"profile": "training"}, "region", "us-west-1"),
        (
            *({"AWS_DEFAULT_REGION": "us-west-1", "AWS_REGION": "us-west-2"}, {}),
            *("region", "us-west-2"),
        ),
        ({"AWS_REGION": "us-west-2"}, {"region": "ca-west-1"}, "region", "ca-west-1"),
        # Endpoints.
        ({}, {}, "endpoint_url", AWS),
        ({}, {"profile": "training"}, "endpoint_url", "http://profile"),
        ({}, {"profile": "serving"}, "endpoint_url", "http://services"),
        (
            *({"AWS_ENDPOINT_URL": "http://all"}, {"profile": "serving"}),
            *("endpoint_url", "http://all"),
        ),
        (
            *({"AWS_ENDPOINT_URL": "http://all", "AWS_ENDPOINT_URL_S3": "http://s3"}, {}),
            *("endpoint_url", "http://s3"),
        ),
        ({"AWS_ENDPOINT_URL_STS": "http://sts"}, {}, "endpoint_url", AWS),
        (
            *({"AWS_ENDPOINT_URL_S3": "http://s3"}, {"endpoint_url": "http://given"}),
            *("endpoint_url", "http://given"),
        ),
        (
            {"AWS_ENDPOINT_URL": "http://all", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
            *({}, "endpoint_url", AWS),
        ),
        # Authorities.
        ({}, {}, "ca_bundle", None),
        ({}, {"profile": "training"}, "ca_bundle", "profile.pem"),
        (
            *({"AWS_CA_BUNDLE": "environment.pem"}, {"profile": "training"}),
            *("ca_bundle", "environment.pem"),
        ),
        (
            *({"AWS_CA_BUNDLE": "environment.pem"}, {"ca_bundle": "given.pem"}),
            *("ca_bundle", "given.pem"),
        ),
        # Attempts.
        ({}, {}, "max_attempts", 10),
        ({}, {"profile": "training"}, "max_attempts", 4),
        ({"AWS_MAX_ATTEMPTS": "3"}, {"profile": "training"}, "max_attempts", 3),
        ({"AWS_MAX_ATTEMPTS": "3"}, {"max_attempts": 5}, "max_attempts", 5),
    ],
)
def test_the_nearest_wins(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    settings: dict[str, Any],
    name: str,
    found: str | int | None,
) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, str(files / value) if value.endswith(".pem") else value)
    if bundle := settings.get("ca_bundle"):
        settings = settings | {"ca_bundle": files / bundle}

    assert getattr(resolve(**settings), name) == found


def test_without_any_region_the_global_endpoint_is_asked() -> None:
    found = resolve(unsigned=True)
    assert found.endpoint_url == "https://s3.amazonaws.com"
    assert found.access_key is None


def test_a_profile_that_is_not_there(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(S3ConfigError, match="nobodys"):
        resolve()


@pytest.mark.parametrize(
    "setting", ["AWS_MAX_ATTEMPTS=2", "AWS_RETRY_MODE=adaptive", "AWS_REQUEST_CHECKSUM_CALCULATION"]
)
def test_what_the_engine_does_is_not_the_files_to_set(
    files: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """The engine retries and sums: what botocore did would come on top."""
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value or "when_supported")

    async def made() -> Any:
        store = S3Store(None, S3ClientConfig())
        await store.open()
        try:
            client: Any = store._client
            return client.meta.config
        finally:
            await store.close()

    config = asyncio.run(made())
    assert config.retries["total_max_attempts"] == 1
    assert config.request_checksum_calculation == "when_required"
    assert config.response_checksum_validation == "when_required"


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_attempts_that_cannot_be(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", value)
    with pytest.raises(S3ConfigError, match=f"{value}.*AWS_"):
        resolve()


def test_the_engine_goes_by_the_attempts_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with FakeS3() as server, addressed(server):
        server.inject(internal_error(), times=None)
        with pytest.raises(ServerError, match="given up after 2 attempts"):
            asyncio.run(S3Client().head_object(BUCKET, "key"))
        assert len(server.requests) == 2


def test_a_role_by_its_profile(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STS is asked, at its own endpoint, as the source profile."""
    made = (
        b"<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>key-role</AccessKeyId>"
        b"<SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
        b"<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult>"
        b"</AssumeRoleResponse>"
    )
    role = "arn:aws:iam::123456789012:role/training"
    with Scripted(lambda _: answer(200, made, Content_Type="text/xml")) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.endpoint_url)
        with (files / "config").open("a") as file:
            file.write(f"[profile role]\nrole_arn = {role}\nsource_profile = training\n")
            file.write("region = eu-west-1\n")
        assert resolve(profile="role").access_key == "key-role"
    [request] = sts.requests
    assert "Credential=key-training/" in request.headers["authorization"]
    assert b"Action=AssumeRole" in request.body
