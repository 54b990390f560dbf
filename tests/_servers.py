"""The S3 servers that the tests speak to, and a plain client to look into their buckets.

What each of them lacks decides which one a test asks for:

=====================  ==========================  ====================================
behaviour              rclone                      moto
=====================  ==========================  ====================================
signatures             checked                     ignored
If-Match, If-None-     ignored on PUT and GET      checked: 412 (and 404 for If-Match on
Match                  (If-None-Match on GET: 304) a key that is not there)
checksum values        ignored; whole-object ones  ignored, stored
                       come back on ranges too
ETag of a multipart    MD5-N when completed, the   MD5-N
object                 plain MD5 ever after
keys                   file paths: no `a//b`, no   any
                       `./`, no `a` beside `a/b`
speed                  fast                        slow, and in memory
=====================  ==========================  ====================================
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import boto3
from botocore.config import Config

from s3dcp.testing import LocalS3
from s3dcp.testing._process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

_MOTO_LISTENING = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")


class Addressed(Protocol):
    """Any server: FakeS3, one in a process of its own, or one of these."""

    def environ(self) -> dict[str, str]:
        """What a process needs in its environment to use this server by default."""


def use(server: Addressed, patch: pytest.MonkeyPatch) -> None:
    """Let the environment point to a server."""
    for name, value in server.environ().items():
        patch.setenv(name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """An S3 endpoint and the credentials that it takes.

    Attributes:
        name: "rclone" or "moto".
    """

    name: str
    endpoint_url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def environ(self) -> dict[str, str]:
        """What a process needs in its environment to use this server by default."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
        }

    def boto(self) -> Any:
        """A boto3 S3 client that adds nothing of its own: no checksums, no retries."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )


@contextmanager
def serve_rclone() -> Iterator[Server]:
    """Serve S3 by rclone, from a temporary folder."""
    with LocalS3() as server:
        yield Server(
            name="rclone",
            endpoint_url=server.endpoint_url,
            access_key=server.access_key,
            secret_key=server.secret_key,
            region=server.region,
        )


@contextmanager
def serve_moto() -> Iterator[Server]:
    """Serve S3 by moto: a process of its own, so that it shares neither state nor the GIL."""
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with ServerProcess(
        "moto", argv, listening=_MOTO_LISTENING, env=os.environ, start_timeout_s=200.0
    ) as process:
        yield Server(
            name="moto",
            endpoint_url=f"http://127.0.0.1:{process.port}",
            access_key="testing",
            secret_key=secrets.token_hex(20),
        )


def empty_bucket(client: Any, bucket: str) -> None:
    """Delete a bucket's objects, so that a session's data does not pile up.

    The bucket stays: rclone keeps its folders (see LocalS3), and so does not find it empty.
    """
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
        if keys:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
