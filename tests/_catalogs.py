"""Checkpoints put into a FakeS3 without saving them, at any age."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from s3dcp._metadata import dump_metadata
from s3dcp._torch_internals import _StorageInfo
from tests._fakes import BUCKET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s3dcp.testing import FakeS3


def days_ago(days: float) -> datetime:
    """Return a moment in the past, to the second."""
    return datetime.now(UTC).replace(microsecond=0) - timedelta(days=days)


def metadata_of(sizes: Mapping[str, int]) -> bytes:
    """Return a `.metadata` that names objects of these sizes, a tensor each."""
    size = torch.Size([1])
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=size)
    entry = TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])
    return dump_metadata(
        Metadata(
            state_dict_metadata={f"tensor of {name}": entry for name in sizes},
            storage_data={
                MetadataIndex(f"tensor of {name}"): _StorageInfo(name, 0, length)
                for name, length in sizes.items()
            },
        )
    )


def put_data(server: FakeS3, folder: str, *names: str, days: float = 2) -> None:
    """Put data objects of 10 bytes into a folder."""
    for name in names:
        server.write(BUCKET, folder + name, bytes(10), modified=days_ago(days))


def put_checkpoint(
    server: FakeS3, folder: str, *names: str, days: float = 2, commit: str = ".metadata"
) -> None:
    """Put a checkpoint, whose data objects have 10 bytes each, into a folder."""
    put_data(server, folder, *names, days=days)
    body = metadata_of(dict.fromkeys(names, 10))
    server.write(BUCKET, folder + commit, body, modified=days_ago(days))
