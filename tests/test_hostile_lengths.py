"""Lengths, offsets and shapes that a hostile `.metadata` states: a typed error, in little memory.

Each load runs in a process that may have 1 GiB more than it starts with, and seconds.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")

GiB = 1 << 30
MiB = 1 << 20

READERS: dict[str, Any] = {
    "dcp_optimized": S3ReaderConstructor.dcp_optimized,
    "sequential": S3ReaderConstructor.sequential,
    "range_based": S3ReaderConstructor.range_based,
}

#: What an item's place is changed to: offset and length, None for what they are; and by whom the
#: checksums are, which tell that no row may be left out: s3dcp, or another library (none).
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
#: What a chunk's sizes are changed to, with the tensor's own left as it is.
SIZES: dict[str, tuple[int, ...]] = {
    "2**62 rows": (2**62, 1000),
    "2**40 rows": (2**40, 1000),
    "2**62 columns": (2000, 2**62),
    "2**62 of each": (2**62, 2**62),
    "less than none": (-1, 1000),
    "another dimension": (2000, 1000, 1),
    "none": (),
}
#: What the checksums' offset, size and size of blocks are changed to, and how many blocks stay.
BLOCKS: dict[str, tuple[int | None, int | None, int | None, int]] = {
    "fewer blocks": (None, 2 * MiB, None, 2),
    "no blocks": (None, 0, None, 0),
    "blocks of a byte": (None, 7, 1, 7),
    "blocks of 2**62": (None, None, 2**62, 1),
}

CASES = {
    **{f"{reader}, {place}": (reader, "place", place) for reader in READERS for place in PLACES},
    **{f"dcp_optimized, {sizes}": ("dcp_optimized", "sizes", sizes) for sizes in SIZES},
    **{f"part, {blocks}": ("dcp_optimized", "blocks", blocks) for blocks in BLOCKS},
}


def loaded(case: bytes) -> str:
    """Load a checkpoint whose metadata was changed; tell what was raised."""
    reader, what, name, ours = pickle.loads(case)
    warnings.simplefilter("ignore")
    with FakeS3() as server:
        server.create_bucket("bucket")
        os.environ.update(server.environ())
        state = {"w": torch.ones(2000, 1000), "v": torch.ones(10)}
        uri = "s3://bucket/run"
        dcp.save(state, storage_writer=S3StorageWriter(None, uri), no_dist=True)
        metadata = load_metadata(server.read("bucket", "run/.metadata"), source="the test")
        for index, info in metadata.storage_data.items():
            if not ours:
                del vars(info)[_CRCS]
            if index.fqn == "w":
                _change(metadata, index, info, what, name)
        server.write("bucket", "run/.metadata", dump_metadata(metadata))
        config = S3ClientConfig(max_attempts=2)
        try:
            dcp.load(
                {"w": torch.zeros(2000, 1000)} if what != "blocks" else _rows(),
                storage_reader=S3StorageReader(None, uri, config, READERS[reader]()),
                no_dist=True,
                planner=_planner(what),
            )
        except CheckpointException as exc:
            [(error, _)] = exc.failures.values()
            kind = "typed" if isinstance(error, S3Exception) else "untyped"
            return f"{kind} {type(error).__name__}: {error}"
    return "loaded"


def _rows() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(2000, 1000)}


def _planner(what: str) -> Any:
    from tests._states import CutPlanner

    return CutPlanner((0.6, 0.7)) if what == "blocks" else None


def _change(metadata: Any, index: MetadataIndex, info: Any, what: str, name: str) -> None:
    if what == "place":
        offset, length = PLACES[name]
        info.offset = info.offset if offset is None else offset
        info.length = info.length if length is None else info.length - 1 if length == -1 else length
    elif what == "sizes":
        entry = metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        offsets = torch.Size([0] * len(SIZES[name]))
        entry.chunks[:] = [ChunkStorageMetadata(offsets, torch.Size(SIZES[name]))]
        metadata.storage_data[MetadataIndex(index.fqn, offsets, 0)] = info
    else:
        item, *old, blocks = vars(info)[_CRCS]
        *new, count = BLOCKS[name]
        merged = [b if a is None else a for a, b in zip(new, old, strict=True)]
        setattr(info, _CRCS, (item, *merged, blocks[: 8 * count]))


@pytest.fixture(scope="module", params=["ours", "another's"])
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    ours = request.param == "ours"
    cases = {
        label: pickle.dumps((*case, ours))
        for label, case in CASES.items()
        if ours or case[1] != "blocks"
    }
    return try_bounded("tests.test_hostile_lengths", "loaded", cases, memory_bytes=GiB)


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_typed_error(outcomes: dict[str, Outcome], case: str) -> None:
    if case in outcomes:
        found = outcomes[case]
        assert found.kind == "value", found
        assert "typed" in found.text.split()[0], found
        assert "untyped" not in found.text, found
        assert "w" in found.text or "run/" in found.text
