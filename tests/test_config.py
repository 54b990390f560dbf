"""S3ClientConfig: its defaults, every check, and what follows from it."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import s3torchconnector

from s3dcp import S3ClientConfig, S3ConfigError, S3Exception
from s3dcp._loop_thread import worker_count

MiB = 1 << 20
GiB = 1 << 30

# Of the reference library's fields, in its order; `requester_pays` came after its 1.5.
REFERENCE = [
    "throughput_target_gbps",
    "part_size",
    "unsigned",
    "force_path_style",
    "max_attempts",
    "profile",
    "requester_pays",
]


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def defaults(config: type[Any]) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(config)}


class TestTheReferencesFields:
    def test_names_and_order(self) -> None:
        ours = dataclasses.fields(S3ClientConfig)
        assert [field.name for field in ours if not field.kw_only] == REFERENCE

    def test_defaults(self) -> None:
        theirs = defaults(s3torchconnector.S3ClientConfig)
        ours = defaults(S3ClientConfig)
        assert list(theirs) == REFERENCE[: len(theirs)]
        assert {name: ours[name] for name in theirs} == theirs

    def test_positions(self) -> None:
        arguments = (25.0, 16 * MiB, True, True, 3, "training")
        theirs = s3torchconnector.S3ClientConfig(*arguments)
        ours = S3ClientConfig(*arguments)
        assert {name: getattr(ours, name) for name in vars(theirs)} == vars(theirs)

    def test_what_is_ours_is_by_name(self) -> None:
        with pytest.raises(TypeError, match="positional"):
            S3ClientConfig(10.0, 8 * MiB, False, False, 10, None, False, "http://x")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"throughput_target_gbps": 0}, "throughput_target_gbps must be a positive number, got 0"),
        ({"throughput_target_gbps": -1.0}, "throughput_target_gbps must be a positive number"),
        ({"throughput_target_gbps": float("inf")}, "throughput_target_gbps"),
        ({"throughput_target_gbps": float("nan")}, "throughput_target_gbps"),
        ({"throughput_target_gbps": "10"}, "throughput_target_gbps"),
        ({"connect_timeout_s": 0}, "connect_timeout_s must be a positive number"),
        ({"read_timeout_s": -0.5}, "read_timeout_s must be a positive number"),
        ({"read_timeout_s": None}, "read_timeout_s must be a positive number"),
        ({"retry_timeout_s": 0}, "retry_timeout_s must be a positive number"),
        ({"retry_timeout_s": float("inf")}, "retry_timeout_s must be a positive number"),
        ({"part_size": 0}, "part_size must be a positive whole number"),
        ({"part_size": 8.5 * MiB}, "part_size must be a positive whole number"),
        ({"part_size": None}, "part_size must be a positive whole number"),
        ({"max_attempts": 0}, "max_attempts must be a positive whole number"),
        ({"max_attempts": True}, "max_attempts must be a positive whole number"),
        ({"max_attempts": None}, "max_attempts must be a positive whole number"),
        ({"max_connections": 0}, "max_connections must be a positive whole number"),
        ({"max_connections": 1.5}, "max_connections must be a positive whole number"),
        ({"memory_budget_bytes": -1}, "memory_budget_bytes must be a positive whole number"),
        ({"unsigned": True, "requester_pays": True}, "unset unsigned"),
        ({"checksum": "MD5"}, "CRC64NVME, CRC32C, CRC32 or None"),
        ({"checksum": "crc32c"}, "CRC64NVME, CRC32C, CRC32 or None"),
        ({"server_side_encryption": "SSE-S3"}, "AES256, aws:kms, aws:kms:dsse"),
        ({"sse_kms_key_id": "key"}, "server_side_encryption='aws:kms'"),
        ({"sse_kms_key_id": "key", "server_side_encryption": "AES256"}, "'aws:kms'"),
        ({"endpoint_url": "localhost:9000"}, "must start with http:// or https://"),
        ({"endpoint_url": "ftp://localhost"}, "must start with http:// or https://"),
        ({"endpoint_url": 9000}, "must start with http:// or https://, got 9000"),
        ({"endpoint_url": ""}, "must start with http:// or https://"),
    ],
)
def test_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(S3ConfigError, match=complaint) as caught:
        S3ClientConfig(**settings)

    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, S3Exception)


@pytest.mark.parametrize(
    "settings",
    [
        # What S3 refuses of a part is known when there is one: small objects need none.
        {"part_size": 1},
        {"part_size": 6 * GiB},
        {"throughput_target_gbps": 400},
        {"max_attempts": 1},
        {"max_connections": 1, "memory_budget_bytes": 1},
        {"checksum": None},
        {"checksum": "CRC32"},
        {"server_side_encryption": "AES256"},
        {"server_side_encryption": "aws:kms", "sse_kms_key_id": "alias/mine"},
        {"server_side_encryption": "aws:kms:dsse", "sse_kms_key_id": "alias/mine"},
        {"requester_pays": True},
        {"unsigned": True},
        {"endpoint_url": "https://s3.example.com/base"},
        {"endpoint_url": "HTTP://localhost:9000"},
        {"conditional_writes": False},
        {"ca_bundle": Path("ca.pem")},
    ],
)
def test_accepted(settings: dict[str, Any]) -> None:
    config = S3ClientConfig(**settings)

    assert {name: getattr(config, name) for name in settings} == settings
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again == config
        assert hash(again) == hash(config)
    assert config != S3ClientConfig()


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        S3ClientConfig().part_size = 1  # type: ignore[misc]


def test_a_replacement_is_checked_too() -> None:
    with pytest.raises(S3ConfigError, match="unset unsigned"):
        dataclasses.replace(S3ClientConfig(unsigned=True), requester_pays=True)


class TestShares:
    """Defaults are a node's, and each of its ranks has its part; what was given is a process's."""

    @pytest.mark.parametrize(
        ("ranks", "connections", "memory", "workers"),
        [
            (None, 50, 64 * MiB, 4),  # 1.25 GB/s, at 25 MB/s each
            ("1", 50, 64 * MiB, 4),
            ("2", 25, 64 * MiB, 4),
            ("4", 12, 64 * MiB, 4),
            ("8", 8, 64 * MiB, 2),
            ("16", 8, 32 * MiB, 1),
            ("64", 8, 16 * MiB, 1),  # never less
            ("many", 50, 64 * MiB, 4),
            ("0", 50, 64 * MiB, 4),
        ],
    )
    def test_by_default(
        self,
        monkeypatch: pytest.MonkeyPatch,
        ranks: str | None,
        connections: int,
        memory: int,
        workers: int,
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        config = S3ClientConfig()

        assert (config.connections(), config.memory_bytes()) == (connections, memory)
        assert worker_count() == workers
        given = S3ClientConfig(max_connections=3, memory_budget_bytes=MiB)
        assert (given.connections(), given.memory_bytes()) == (3, MiB)

    @pytest.mark.parametrize(
        ("gbps", "ranks", "connections"),
        [
            (50.0, "2", 125),
            (100.0, "8", 62),
            (0.1, "1", 8),  # never less
            (400.0, "1", 256),  # never more
        ],
    )
    def test_connections_follow_the_link(
        self, monkeypatch: pytest.MonkeyPatch, gbps: float, ranks: str, connections: int
    ) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert S3ClientConfig(throughput_target_gbps=gbps).connections() == connections

    @pytest.mark.parametrize(
        ("gbps", "ranks", "cores", "loops"),
        [
            (10.0, "1", 16, 1),  # the default: one core is enough
            (10.1, "1", 16, 2),
            (25.0, "1", 16, 3),
            (100.0, "1", 16, 4),  # never more
            (100.0, "4", 16, 2),  # half of a rank's cores
            (400.0, "8", 192, 4),
            (100.0, "1", 2, 1),
            (100.0, "1", None, 1),
        ],
    )
    def test_loops_follow_the_link_and_the_cores(
        self, monkeypatch: pytest.MonkeyPatch, gbps: float, ranks: str, cores: int, loops: int
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert S3ClientConfig(throughput_target_gbps=gbps).loops() == loops

    @pytest.mark.parametrize(("cores", "workers"), [(None, 1), (1, 1), (2, 2), (96, 4)])
    def test_workers_follow_the_cores(
        self, monkeypatch: pytest.MonkeyPatch, cores: int | None, workers: int
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert worker_count() == workers


def test_every_setting_is_documented() -> None:
    for field in dataclasses.fields(S3ClientConfig):
        assert f"        {field.name}: " in (S3ClientConfig.__doc__ or "")
