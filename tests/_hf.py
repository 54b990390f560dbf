"""Saves and loads of safetensors checkpoints, and what a bucket holds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from s3dcp import S3ClientConfig, S3HuggingFaceStorageReader, S3HuggingFaceStorageWriter
from s3dcp.testing import FakeS3
from tests._fakes import BUCKET, unwrapped, uri_of
from tests._states import StateDict, blank, fill

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.checkpoint.planner import LoadPlanner

INDEX = "model.safetensors.index.json"
MANIFEST = "model.safetensors.manifest.json"


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """One of each way that a tensor goes: copied, in one piece, in blocks, made contiguous."""
    return {
        "small": fill((7, 5), torch.float64, seed),
        "scalar": fill((), torch.int64, seed + 1),
        "empty": torch.empty(3, 0, dtype=torch.bfloat16),
        "flags": fill((3, 5), torch.bool, seed + 2),
        "medium": fill((300, 1000), torch.int8, seed + 3),
        "large": fill((1100, 1000), torch.float32, seed + 4),
        "turned": fill((700, 300), torch.bfloat16, seed + 5).t(),
    }


#: Which file each of them is in.
TWO_FILES = dict(
    zip(
        ("small", "scalar", "empty", "flags", "medium", "large", "turned"),
        (1, 1, 2, 2, 2, 1, 2),
        strict=True,
    )
)


def save(state: StateDict, path: str, config: S3ClientConfig | None = None, **options: Any) -> None:
    """Save, raising the error itself and not torch's wrapping of it."""
    writer = S3HuggingFaceStorageWriter(None, uri_of(path), config, **options)
    with unwrapped():
        dcp.save(state, storage_writer=writer, no_dist=True)


def load(
    state: StateDict,
    path: str,
    config: S3ClientConfig | None = None,
    planner: LoadPlanner | None = None,
) -> StateDict:
    """Load into blanks of a state dict's structure, and return them."""
    target = blank(state)
    load_into(target, path, config, planner)
    return dict(target)


def load_into(
    target: StateDict,
    path: str,
    config: S3ClientConfig | None = None,
    planner: LoadPlanner | None = None,
) -> None:
    reader = S3HuggingFaceStorageReader(None, uri_of(path), config)
    with unwrapped():
        dcp.load(target, storage_reader=reader, planner=planner, no_dist=True)


def names(server: FakeS3, path: str) -> list[str]:
    """Return what lies below a path."""
    return [key.removeprefix(f"{path}/") for key in server.keys(BUCKET, f"{path}/")]


def download(server: FakeS3, path: str, folder: Path) -> Path:
    """Copy what lies below a path into a folder."""
    for name in names(server, path):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(server.read(BUCKET, f"{path}/{name}"))
    return folder


def upload(server: FakeS3, folder: Path, path: str) -> None:
    """Copy a folder's files to a path."""
    for file in folder.iterdir():
        server.write(BUCKET, f"{path}/{file.name}", file.read_bytes())


def loaded_by_the_library(folder: Path) -> dict[str, torch.Tensor]:
    """Load every file of a folder with the `safetensors` library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safetensors.torch.load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found
