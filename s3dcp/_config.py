"""What a user can set, checked where it is written down."""

from __future__ import annotations

import math
import os
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal, get_args

from s3dcp._errors import S3ConfigError
from s3dcp._node import local_cores, local_world_size

MiB = 1 << 20

ChecksumName = Literal["CRC64NVME", "CRC32C", "CRC32"]
EncryptionName = Literal["AES256", "aws:kms", "aws:kms:dsse"]

# What one connection to S3 is counted on for. AWS's guide says 85 to 90 MB/s a request; links with
# 60 are seen, and a third of a request's time may pass before its first byte. Too many connections
# cost little, too few cost the link.
_CONNECTION_BYTES_PER_S = 25_000_000
# What one loop thread moves over TLS, at most: its core is busy with ciphers then. With more than a
# few threads, they would wait for the GIL instead.
_TLS_LOOP_BYTES_PER_S = 1_250_000_000
_MAX_LOOPS = 4
_NODE_MEMORY_BYTES = 512 * MiB
_MAX_MEMORY_BYTES = 64 * MiB
_MIN_MEMORY_BYTES = 16 * MiB
_MIN_CONNECTIONS = 8
_MAX_CONNECTIONS = 256


def check_thread_count(value: object) -> None:
    """Refuse what is no number of objects that a rank moves at once.

    Raises:
        S3ConfigError: it is not.
    """
    if type(value) is not int or value < 1:
        raise S3ConfigError(f"thread_count must be a positive whole number, got {value!r}")


def check_callable(name: str, value: object) -> None:
    """Refuse what is neither None nor called with something.

    Raises:
        S3ConfigError: it is neither.
    """
    if value is not None and not callable(value):
        raise S3ConfigError(f"{name} must be a callable, got {value!r}")


@dataclass(frozen=True)
class S3ClientConfig:
    """Settings of a client. The first six are the reference library's, in its order.

    Args:
        throughput_target_gbps: The link's speed in gigabits per second, for a whole node; the
            number of connections follows from it, and over TLS that of loop threads: one for each
            10 of a rank's share, four at the most, and at most half of its share of the cores.
        part_size: Least bytes per part of an upload and per request of a download; the engine may
            go larger. What S3 refuses (under 5 MiB, over 5 GiB) is an error at the first
            multipart upload.
        unsigned: Send requests without a signature (anonymous access to public buckets).
        force_path_style: Address buckets as `endpoint/bucket` instead of `bucket.endpoint`.
        max_attempts: How often one request is tried at most, the first time included; see
            `retry_timeout_s`. Where it is the default, `AWS_MAX_ATTEMPTS` or the profile's
            `max_attempts` counts instead.
        profile: A profile of the AWS configuration file.
        requester_pays: Accept the cost of requests to requester-pays buckets.
        endpoint_url: An S3-compatible store. Default: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`,
            the profile's, or AWS.
        ca_bundle: A file of CA certificates to trust instead of botocore's; default:
            `AWS_CA_BUNDLE` or the profile's.
        storage_class: The storage class of new objects, such as `INTELLIGENT_TIERING`.
        server_side_encryption: `AES256` (SSE-S3), `aws:kms` or `aws:kms:dsse`.
        sse_kms_key_id: The KMS key for `aws:kms`; default: the bucket's.
        expected_bucket_owner: An account number; requests to another owner's bucket fail.
        checksum: The S3 checksum sent with uploads, or `None` for none. The CRCs in the
            checkpoint's own metadata are written in any case.
        conditional_writes: Whether the store honours `If-None-Match` and `If-Match` on PUT.
            `None`: AWS does; others are believed once they have refused a request with 412.
        connect_timeout_s: Seconds to wait for a connection.
        read_timeout_s: Seconds without progress after which a peer is given up.
        retry_timeout_s: Seconds from a request's first attempt on after which it is not tried
            again, whatever `max_attempts` allows. Against a store that makes no progress it fails
            `retry_timeout_s + connect_timeout_s + read_timeout_s` after its first attempt began,
            at the latest, however many requests wait; and with it the save or load, which then
            takes 20 s at the most to tidy up. The default, 5 minutes, outlasts a store's short
            outage, and ends before the other ranks' collectives time out (10 minutes with NCCL),
            so that the error is S3's.
        max_connections: Connections of this process with a request on them; several loops may keep
            as many again that are idle. Default: from `throughput_target_gbps`.
        memory_budget_bytes: Bytes of host memory that all saves and loads of this process may hold
            in buffers, beyond the tensors; a single item that is larger passes alone. Default: a
            node's 512 MiB, at most 64 MiB for a process.

    `throughput_target_gbps` and the defaults of the last two are a node's, and are divided by
    `LOCAL_WORLD_SIZE` where torchrun has set it.

    Raises:
        S3ConfigError: a value, or a combination, that cannot work.
    """

    throughput_target_gbps: float = 10.0
    part_size: int = 8 * MiB
    unsigned: bool = False
    force_path_style: bool = False
    max_attempts: int = 10
    profile: str | None = None
    requester_pays: bool = False
    _: KW_ONLY
    endpoint_url: str | None = None
    ca_bundle: str | os.PathLike[str] | None = None
    storage_class: str | None = None
    server_side_encryption: EncryptionName | None = None
    sse_kms_key_id: str | None = None
    expected_bucket_owner: str | None = None
    checksum: ChecksumName | None = "CRC64NVME"
    conditional_writes: bool | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    retry_timeout_s: float = 300.0
    max_connections: int | None = None
    memory_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        for name in (
            *("throughput_target_gbps", "connect_timeout_s"),
            *("read_timeout_s", "retry_timeout_s"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise S3ConfigError(f"{name} must be a positive number, got {value!r}")
        for name in ("max_attempts", "max_connections", "memory_budget_bytes", "part_size"):
            value = getattr(self, name)
            if value is None and name.startswith(("max_connections", "memory")):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise S3ConfigError(f"{name} must be a positive whole number, got {value!r}")

    def _check_choices(self) -> None:
        if self.unsigned and self.requester_pays:
            raise S3ConfigError("requester_pays needs signed requests: unset unsigned")
        if self.checksum is not None and self.checksum not in get_args(ChecksumName):
            raise S3ConfigError(
                f"checksum must be one of {', '.join(get_args(ChecksumName))} or None, "
                f"got {self.checksum!r}"
            )
        if self.server_side_encryption not in (None, *get_args(EncryptionName)):
            raise S3ConfigError(
                f"server_side_encryption must be one of {', '.join(get_args(EncryptionName))}, "
                f"got {self.server_side_encryption!r}"
            )
        if self.sse_kms_key_id and self.server_side_encryption in (None, "AES256"):
            raise S3ConfigError("sse_kms_key_id needs server_side_encryption='aws:kms'")
        if self.endpoint_url is not None and not str(self.endpoint_url).lower().startswith(
            ("http://", "https://")
        ):
            raise S3ConfigError(
                f"endpoint_url must start with http:// or https://, got {self.endpoint_url!r}"
            )

    def connections(self) -> int:
        """Connections that this process may hold open."""
        if self.max_connections is not None:
            return self.max_connections
        wanted = round(self._target_bytes_per_s() / _CONNECTION_BYTES_PER_S)
        return max(_MIN_CONNECTIONS, min(wanted, _MAX_CONNECTIONS))

    def loops(self) -> int:
        """Event loops, each on a thread, that this process may spread TLS over."""
        wanted = math.ceil(self._target_bytes_per_s() / _TLS_LOOP_BYTES_PER_S)
        return max(1, min(wanted, _MAX_LOOPS, local_cores() // 2))

    def _target_bytes_per_s(self) -> float:
        return self.throughput_target_gbps * 1e9 / 8 / local_world_size()

    def attempts(self, found: int | None) -> int:
        """How often one request is tried at most.

        Args:
            found: What the environment or the profile has for it.

        Raises:
            S3ConfigError: that cannot work.
        """
        if found is None or self.max_attempts != S3ClientConfig.max_attempts:
            return self.max_attempts
        return replace(self, max_attempts=found).max_attempts

    def memory_bytes(self) -> int:
        """Bytes of host memory for buffers of this process."""
        if self.memory_budget_bytes is not None:
            return self.memory_budget_bytes
        share = _NODE_MEMORY_BYTES // local_world_size()
        return max(min(share, _MAX_MEMORY_BYTES), _MIN_MEMORY_BYTES)
