"""Lengths, offsets and shapes that a hostile `.metadata` states: a typed error, in little memory.

Each load runs in a process that may have 1 GiB more than it starts with, and seconds.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import s3dcp._client  # noqa: F401 - so that no process under a limit has to
from s3dcp import (
    S3ClientConfig,
    S3Exception,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
)
from s3dcp._metadata import _CRCS, dump_metadata, load_metadata
from s3dcp.testing import FakeS3
from tests._bounded import Outcome, try_bounded
from tests._states import CutPlanner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")

GiB = 1 << 30
MiB = 1 << 20

READERS: dict[str, Any] = {
    "dcp_optimized": S3ReaderConstructor.dcp_optimized,
    "sequential": S3ReaderConstructor.sequential,
    "range_based": S3ReaderConstructor.range_based,
}

#: What an item's place is changed to: offset and length; None for what they are.
PLACES: dict[str, tuple[int | None, int | None]] = {
    "length 2**62": (None, 2**62),
    "length 2**45": (None, 2**45),
    "length 3 GiB": (None, 3 * GiB),
    "a little too long": (None, 10_000_000),
    "offset 2**62": (2**62, None),
    "offset behind the end": (10_000_000, None),
    "the last byte is missing": (None, -1),
    "offset and length 2**62": (2**62, 2**62),
    "length 0": (None, 0),
    "length 1": (None, 1),
}
#: What the checksums' offset, size and size of blocks are changed to, and how many blocks stay.
BLOCKS: dict[str, tuple[int | None, int | None, int | None, int]] = {
    "fewer blocks": (None, 2 * MiB, None, 2),
    "no blocks": (None, 0, None, 0),
    "blocks of a byte": (None, 7, 1, 7),
    "blocks of 2**62": (None, None, 2**62, 1),
}

CASES = {
    **{f"{reader}, {place}": (reader, place, True) for reader in READERS for place in PLACES},
    **{f"without checksums, {place}": ("dcp_optimized", place, False) for place in PLACES},
    **{f"part, {blocks}": ("dcp_optimized", blocks, True) for blocks in BLOCKS},
}
URI = "s3://bucket/run"


@functools.cache
def saved() -> tuple[FakeS3, bytes]:
    """Save a checkpoint; return the server, which is never stopped, and the metadata."""
    server = FakeS3()
    server.start()
    server.create_bucket("bucket")
    os.environ.update(server.environ())
    state = {"w": torch.ones(2000, 1000), "v": torch.ones(10)}
    dcp.save(state, storage_writer=S3StorageWriter(None, URI), no_dist=True)
    return server, server.read("bucket", "run/.metadata")


def loaded(case: bytes) -> str:
    """Load a checkpoint whose metadata was changed; tell what was raised."""
    reader, name, ours = pickle.loads(case)
    warnings.simplefilter("ignore")
    server, body = saved()
    metadata = load_metadata(body, source="the test")
    for index, info in metadata.storage_data.items():
        if not ours:
            del vars(info)[_CRCS]
        if index.fqn == "w":
            _change(info, name)
    server.write("bucket", "run/.metadata", dump_metadata(metadata))
    try:
        dcp.load(
            {"w": torch.zeros(2000, 1000)},
            storage_reader=S3StorageReader(
                None, URI, S3ClientConfig(max_attempts=2), READERS[reader]()
            ),
            no_dist=True,
            planner=CutPlanner((0.6, 0.7)) if name in BLOCKS else None,
        )
    except CheckpointException as exc:
        [(error, _)] = exc.failures.values()
        kind = "typed" if isinstance(error, S3Exception) else "untyped"
        return f"{kind} {type(error).__name__}: {error}"
    return "loaded"


def _change(info: Any, name: str) -> None:
    if name in PLACES:
        offset, length = PLACES[name]
        info.offset = info.offset if offset is None else offset
        if length is not None:
            info.length = info.length - 1 if length == -1 else length
    else:
        item, *old, blocks = vars(info)[_CRCS]
        *new, count = BLOCKS[name]
        merged = [b if a is None else a for a, b in zip(new, old, strict=True)]
        setattr(info, _CRCS, (item, *merged, blocks[: 8 * count]))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    cases = {label: ("loaded", pickle.dumps(case)) for label, case in CASES.items()}
    return try_bounded("tests.test_hostile_lengths", cases, memory_bytes=1024 * MiB)


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_typed_error_in_little_memory(outcomes: dict[str, Outcome], case: str) -> None:
    found = outcomes[case]
    assert found.kind == "value", found
    assert "untyped" not in found.text, found
