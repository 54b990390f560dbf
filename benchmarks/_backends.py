"""The backends, made in the worker's process from what its environment says of the server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from benchmarks import _raw
from benchmarks._planning import IdleReader, IdleWriter, PickledReader, PickledWriter
from benchmarks._states import State
from benchmarks._values import BUCKET, DISCARDED, KEPT


class Backend(Protocol):
    """Saves and loads state dicts by name; one that is not kept may be dropped on arrival."""

    def saving(self, state: Any, name: str, *, keep: bool) -> Callable[[], object]:
        """Return what saves."""

    def loading(self, state: Any, name: str) -> Callable[[], object]:
        """Return what loads a kept state dict."""

    def tidy(self, name: str) -> None:
        """Remove what a save that is not kept has left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dcp:
    """DCP with a storage writer and a storage reader, made anew for every save and load."""

    writer: Callable[[str], Any]
    reader: Callable[[str], Any]
    root: str = f"s3://{BUCKET}"

    def saving(self, state: Any, name: str, *, keep: bool) -> Callable[[], object]:
        """Return what saves."""
        writer = self.writer(self.path(name, keep=keep))
        return lambda: dcp.save(state, storage_writer=writer, no_dist=True)

    def saving_soon(self, state: Any, name: str) -> Any:
        """Start an `async_save` on a thread, to be dropped, and return its future."""
        writer = self.writer(self.path(name, keep=False))
        return dcp.async_save(state, storage_writer=writer, no_dist=True)

    def loading(self, state: Any, name: str) -> Callable[[], object]:
        """Return what loads a kept state dict."""
        reader = self.reader(self.path(name, keep=True))
        return lambda: dcp.load(state, storage_reader=reader, no_dist=True)

    def tidy(self, name: str) -> None:
        """Remove what a save that is not kept has left on this machine's disk."""
        if not self.root.startswith("s3:"):
            shutil.rmtree(self.path(name, keep=False), ignore_errors=True)

    def path(self, name: str, *, keep: bool) -> str:
        """Return where a checkpoint of that name is."""
        return f"{self.root}/{KEPT if keep else DISCARDED}/{name}"


class Raw:
    """An object a tensor, and no client."""

    def saving(self, state: State, name: str, *, keep: bool) -> Callable[[], object]:
        """Return what puts every tensor."""
        return lambda: _raw.put(state, f"/{BUCKET}/{KEPT if keep else DISCARDED}/{name}")

    def loading(self, state: State, name: str) -> Callable[[], object]:
        """Return what gets every tensor."""
        return lambda: _raw.get(state, f"/{BUCKET}/{KEPT}/{name}")

    def tidy(self, name: str) -> None:
        """Leave it to the server."""


def _s3dcp(reader: Callable[[Any], Any] = lambda _: None) -> Dcp:
    import s3dcp

    config = s3dcp.S3ClientConfig(force_path_style=True)
    region = os.environ["AWS_REGION"]
    return Dcp(
        writer=lambda path: s3dcp.S3StorageWriter(region, path, s3client_config=config),
        reader=lambda path: s3dcp.S3StorageReader(
            region,
            path,
            s3client_config=config,
            reader_constructor=reader(s3dcp.S3ReaderConstructor),
        ),
    )


def _s3torchconnector() -> Dcp:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

    config = S3ClientConfig(force_path_style=True)
    region = os.environ["AWS_REGION"]
    return Dcp(
        writer=lambda path: S3StorageWriter(region, path, s3client_config=config),
        reader=lambda path: S3StorageReader(region, path, s3client_config=config),
    )


def _s3fs() -> Dcp:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    options: dict[str, Any] = {
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
        "client_kwargs": {"region_name": os.environ["AWS_REGION"]},
        "config_kwargs": {
            "s3": {"addressing_style": "path"},
            # botocore's default is a CRC32 for every part, which a strict server refuses in an
            # upload that was begun without a checksum algorithm, as s3fs does.
            "request_checksum_calculation": "when_required",
        },
    }
    return Dcp(
        writer=lambda path: FsspecWriter(path, sync_files=False, **options),
        reader=lambda path: FsspecReader(path, **options),
    )


def _disk() -> Dcp:
    root = os.environ["BENCH_RAM_DISK"]
    Path(root).mkdir(parents=True, exist_ok=True)
    return Dcp(
        writer=lambda path: FileSystemWriter(path, sync_files=False),
        reader=FileSystemReader,
        root=root,
    )


_MAKERS: dict[str, Callable[[], Backend]] = {
    "s3dcp": _s3dcp,
    "whole": lambda: _s3dcp(lambda readers: readers.sequential()),
    "each": lambda: _s3dcp(lambda readers: readers.dcp_optimized(max_gap_size=0)),
    "s3torchconnector": _s3torchconnector,
    "s3fs": _s3fs,
    "disk": _disk,
    "planning": lambda: Dcp(writer=IdleWriter, reader=IdleReader),
    "metadata": lambda: Dcp(writer=PickledWriter, reader=PickledReader),
    "raw": Raw,
}


def make(name: str) -> Backend:
    """Return a backend for the server that the environment names now."""
    return _MAKERS[name]()
