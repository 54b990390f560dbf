"""Checkpoints go between s3dcp, torch's own storage and the reference library, both ways."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import s3torchconnector
import torch
import torch.distributed.checkpoint as dcp
from s3torchconnector import dcp as reference
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.utils.serialization import config

from s3dcp import (
    BinaryPrefixStrategy,
    S3ClientConfig,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
)
from tests._states import (
    CutPlanner,
    MiB,
    StateDict,
    assert_same,
    blank,
    blank_turned,
    dtypes,
    fill,
    finite,
    layouts,
    objects,
    same_bits,
)
from tests.test_ranks import load_sharded, load_whole, save_sharded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests._ranks import RankPool
    from tests._servers import Server

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]


def download(boto: Any, bucket: str, prefix: str, folder: Path) -> Path:
    """Copy a checkpoint to a disk."""
    pages = boto.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    for page in pages:
        for entry in page["Contents"]:
            path = folder / entry["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            boto.download_file(bucket, entry["Key"], str(path))
    return folder / prefix


def upload(boto: Any, bucket: str, prefix: str, folder: Path) -> str:
    """Copy a checkpoint from a disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            boto.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://{bucket}/{prefix}"


def save(state: StateDict, writer: StorageWriter, **kwargs: Any) -> Metadata:
    saved: Metadata = dcp.save(state, storage_writer=writer, no_dist=True, **kwargs)
    return saved


def load(state: StateDict, reader: StorageReader, planner: CutPlanner | None = None) -> StateDict:
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def large() -> StateDict:
    """Return tensors whose layout is guessed, over 256 KiB and over 4 MiB."""
    return {
        "medium": fill((300, 300), seed=1),
        "medium_turned": fill((300, 300), seed=2).t(),
        "large": fill((1100, 1000), seed=3),
        "large_turned": fill((1000, 1100), seed=4).t(),
        "large_neg": torch._neg_view(finite((1100, 1000), seed=5)),
        "large_conj": finite((1100, 500), torch.complex64, 6).conj(),
        "large_overlapping": fill((1_100_000,), seed=7).as_strided((1100, 1000), (1, 1)),
        "large_channels_last": fill((4, 64, 65, 66), seed=8).contiguous(
            memory_format=torch.channels_last
        ),
    }


def huge() -> StateDict:
    """Return tensors of over 32 MiB."""
    return {"huge": fill((8500, 1000), seed=9), "turned": fill((1000, 8500), seed=10).t()}


STATES: dict[str, Callable[[], StateDict]] = {
    "dtypes": partial(dtypes, (3, 5)),
    "larger dtypes": partial(dtypes, (300, 301)),
    "layouts": partial(layouts, 4),
    "larger layouts": partial(layouts, 300),
    "objects": objects,
    "large": large,
    "huge": huge,
}

# One of each kind: of threads, of objects, of prefixes, of extensions.
OPTIONS: dict[str, dict[str, Any]] = {
    "threads": {"thread_count": 3},
    "objects": {"single_file_per_rank": False},
    "compressed": {"_extensions": [ZStandard()], "thread_count": 2},
}


def mixed() -> StateDict:
    return {
        "small": fill((3, 3), torch.complex128, 1),
        "turned": fill((300, 300), seed=2).t(),
        "large": fill((1500, 1000), seed=3),
        "nested": {"lr": 0.5, "names": ["a", "b"], "table": fill((4,), torch.float8_e5m2, 4)},
        "step": 3,
    }


# torch's own storage.


@pytest.mark.parametrize("name", STATES)
def test_torch_reads_what_s3dcp_writes(boto: Any, bucket: str, tmp_path: Path, name: str) -> None:
    state = STATES[name]()
    save(state, S3StorageWriter(None, f"s3://{bucket}/ck", S3ClientConfig(part_size=5 * MiB)))
    folder = download(boto, bucket, "ck", tmp_path)
    assert_same(load(blank(state), FileSystemReader(folder)), state)


@pytest.mark.parametrize("name", STATES)
def test_s3dcp_reads_what_torch_writes(boto: Any, bucket: str, tmp_path: Path, name: str) -> None:
    state = STATES[name]()
    save(state, FileSystemWriter(tmp_path, sync_files=False))
    uri = upload(boto, bucket, "ck", tmp_path)
    assert_same(load(blank(state), S3StorageReader(None, uri)), state)
    sequential = S3ReaderConstructor.sequential()
    assert_same(load(blank(state), S3StorageReader(None, uri, None, sequential)), state)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_both_ways_with_options(
    boto: Any, bucket: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    state = mixed()
    strategy = BinaryPrefixStrategy(epoch_num=1)
    writer = S3StorageWriter(None, f"s3://{bucket}/a", prefix_strategy=strategy, **options)
    save(state, writer)
    folder = download(boto, bucket, "a", tmp_path)
    assert_same(load(blank(state), FileSystemReader(folder)), state)

    save(state, FileSystemWriter(tmp_path / "b", sync_files=False, **options))
    uri = upload(boto, bucket, "b", tmp_path / "b")
    assert_same(load(blank(state), S3StorageReader(None, uri)), state)


def test_both_ways_without_collectives(boto: Any, bucket: str, tmp_path: Path) -> None:
    state = mixed()
    save(state, S3StorageWriter(None, f"s3://{bucket}/a"), use_collectives=False)
    folder = download(boto, bucket, "a", tmp_path)
    assert_same(load(blank(state), FileSystemReader(folder)), state)

    save(state, FileSystemWriter(tmp_path / "b", sync_files=False), use_collectives=False)
    uri = upload(boto, bucket, "b", tmp_path / "b")
    assert_same(load(blank(state), S3StorageReader(None, uri)), state)


@pytest.mark.parametrize("name", ["larger layouts", "larger dtypes", "objects"])
def test_items_are_what_torch_would_have_written(
    boto: Any, bucket: str, tmp_path: Path, name: str
) -> None:
    state = STATES[name]()
    # The one difference: torch stores elements that repeat within a storage as they lie there.
    state.pop("overlapping_in_full", None)
    ours = save(state, S3StorageWriter(None, f"s3://{bucket}/ck"))
    folder = download(boto, bucket, "ck", tmp_path)
    theirs = save(state, FileSystemWriter(tmp_path / "torch", sync_files=False))

    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for index in theirs.storage_data:
        mine = stored(folder, ours, index)
        other = stored(tmp_path / "torch", theirs, index)
        assert len(mine) == len(other), index
        if index.fqn in state and isinstance(state[index.fqn], torch.Tensor):
            left, right = (
                torch.load(io.BytesIO(item), weights_only=True) for item in (mine, other)
            )
            assert left.stride() == right.stride(), index
            assert (left.is_conj(), left.is_neg()) == (right.is_conj(), right.is_neg()), index
            assert left.untyped_storage().nbytes() == right.untyped_storage().nbytes(), index
            assert same_bits(left, right), index


def stored(folder: Path, metadata: Metadata, index: MetadataIndex) -> bytes:
    info = metadata.storage_data[index]
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        data: bytes = file.read(info.length)
    return data


@pytest.mark.parametrize("alignment", [1, 4096])
def test_frames_that_torch_aligned_otherwise(
    boto: Any, bucket: str, tmp_path: Path, alignment: int
) -> None:
    state = large()
    with config.patch("save.storage_alignment", alignment):  # type: ignore[attr-defined]
        save(state, FileSystemWriter(tmp_path, sync_files=False))
    uri = upload(boto, bucket, "ck", tmp_path)
    assert_same(load(blank(state), S3StorageReader(None, uri)), state)


def test_guessed_layouts_into_other_targets(boto: Any, bucket: str, tmp_path: Path) -> None:
    state = large()
    save(state, FileSystemWriter(tmp_path, sync_files=False))
    uri = upload(boto, bucket, "ck", tmp_path)

    turned = {name: blank_turned(tensor) for name, tensor in state.items()}
    assert_same(load(turned, S3StorageReader(None, uri)), state)

    for planner in (
        CutPlanner((0.5, 0.6)),
        CutPlanner((0.0, 0.2)),
        CutPlanner((0.4, 0.9), (0, 0.5)),
    ):
        targets = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()
        }
        load(targets, S3StorageReader(None, uri), planner)
        for name, target in targets.items():
            box = planner.box(target)
            assert same_bits(target[box], state[name][box]), name
            target[box] = 0
            assert not target.any(), name


def torch_writer(path: str) -> StorageWriter:
    return FileSystemWriter(path, sync_files=False)


def torch_reader(path: str) -> StorageReader:
    return FileSystemReader(path)


def test_ranks_of_torch_and_s3dcp(
    ranks2: RankPool, ranks4: RankPool, boto: Any, bucket: str, tmp_path: Path
) -> None:
    ranks2.run(save_sharded, f"s3://{bucket}/ours")
    folder = download(boto, bucket, "ours", tmp_path)
    ranks4.run(load_sharded, str(folder), torch_reader)

    ranks2.run(save_sharded, str(tmp_path / "theirs"), torch_writer)
    uri = upload(boto, bucket, "theirs", tmp_path / "theirs")
    ranks4.run(load_sharded, uri)
    load_whole(uri)


# The reference library, on moto: its multipart uploads fail on what rclone answers.

PATH_STYLE = s3torchconnector.S3ClientConfig(force_path_style=True)


def reference_writer(path: str, **kwargs: Any) -> StorageWriter:
    return reference.S3StorageWriter("us-east-1", path, s3client_config=PATH_STYLE, **kwargs)


def reference_reader(path: str, **kwargs: Any) -> StorageReader:
    return reference.S3StorageReader("us-east-1", path, s3client_config=PATH_STYLE, **kwargs)


@pytest.mark.parametrize("name", ["dtypes", "larger layouts", "objects", "large", "huge"])
def test_the_reference_library_reads_what_s3dcp_writes(
    moto: Server, bucket: str, name: str
) -> None:
    state = STATES[name]()
    save(state, S3StorageWriter(None, f"s3://{bucket}/ck", S3ClientConfig(part_size=5 * MiB)))
    assert_same(load(blank(state), reference_reader(f"s3://{bucket}/ck")), state)


@pytest.mark.parametrize("name", ["dtypes", "larger layouts", "objects", "large", "huge"])
def test_s3dcp_reads_what_the_reference_library_writes(
    moto: Server, bucket: str, name: str
) -> None:
    state = STATES[name]()
    save(state, reference_writer(f"s3://{bucket}/ck"))
    assert_same(load(blank(state), S3StorageReader(None, f"s3://{bucket}/ck")), state)


def test_the_reference_library_with_options(moto: Server, bucket: str) -> None:
    from s3torchconnector.s3reader import S3ReaderConstructor as ReferenceConstructor

    state = mixed()
    writer = S3StorageWriter(
        None,
        f"s3://{bucket}/ours",
        prefix_strategy=BinaryPrefixStrategy(epoch_num=2),
        thread_count=3,
    )
    save(state, writer)
    for constructor in (ReferenceConstructor.range_based(), ReferenceConstructor.dcp_optimized()):
        reader = reference_reader(f"s3://{bucket}/ours", reader_constructor=constructor)
        assert_same(load(blank(state), reader), state)

    strategy = reference.HexPrefixStrategy(epoch_num=2)
    save(state, reference_writer(f"s3://{bucket}/theirs", prefix_strategy=strategy, thread_count=2))
    assert_same(load(blank(state), S3StorageReader(None, f"s3://{bucket}/theirs")), state)


def test_either_library_replaces_the_other_s_checkpoint(
    moto: Server, boto: Any, bucket: str
) -> None:
    uri = f"s3://{bucket}/ck"
    strategy = reference.HexPrefixStrategy()
    save(mixed(), reference_writer(uri, prefix_strategy=strategy))
    state = {**mixed(), "step": 4}
    save(state, S3StorageWriter(None, uri))
    assert_same(load(blank(state), reference_reader(uri)), state)
    # What theirs alone used is gone.
    assert len(boto.list_objects_v2(Bucket=bucket)["Contents"]) == 2

    with pytest.warns(UserWarning, match="Detected an existing checkpoint"):
        save(mixed(), reference_writer(uri, prefix_strategy=strategy))
    assert_same(load(blank(mixed()), S3StorageReader(None, uri)), mixed())


def test_ranks_of_both_libraries(
    ranks2: RankPool, ranks4: RankPool, moto: Server, bucket: str
) -> None:
    ranks2.run(save_sharded, f"s3://{bucket}/ours")
    ranks4.run(load_sharded, f"s3://{bucket}/ours", reference_reader)
    ranks2.run(save_sharded, f"s3://{bucket}/theirs", reference_writer)
    ranks4.run(load_sharded, f"s3://{bucket}/theirs")
