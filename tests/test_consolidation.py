"""Shards made into full files: any cut, in bounded memory, verified, all or nothing."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from s3dcp import (
    CheckpointChangedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    IntegrityError,
    S3ClientConfig,
    S3ConfigError,
    S3Exception,
    consolidate_safetensors_files,
)
from s3dcp._boxes import Box
from s3dcp.testing import Call, FakeS3, Refuse
from tests._boxes import cuts
from tests._fakes import BUCKET, addressed, uri_of
from tests._hf import (
    INDEX,
    MANIFEST,
    TWO_FILES,
    download,
    load,
    loaded_by_the_library,
    names,
    save,
    state_of,
    upload,
)
from tests._states import MiB, assert_same, fill

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

STATE = state_of(1)
CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True, memory_budget_bytes=24 * MiB)
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def consolidate(source: str = "shards", target: str = "full", **options: Any) -> None:
    options = {"s3client_config": CONFIG, **options}
    consolidate_safetensors_files(uri_of(source), uri_of(target), **options)


def write_shards(server: FakeS3, whole: dict[str, tuple[torch.Tensor, list[Box]]]) -> None:
    """Write tensors as ranks of torch's would: the n-th box of each in the n-th file."""
    for rank in range(max(len(boxes) for _, boxes in whole.values())):
        parts, offsets = {}, {}
        for name, (tensor, boxes) in whole.items():
            if rank < len(boxes):
                box = boxes[rank]
                inside = tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))
                parts[name] = tensor[inside].clone(memory_format=torch.contiguous_format)
                offsets[name] = {"saved_offsets": list(box.offsets)}
        body = safetensors.torch.save(parts, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        key = f"shards/shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        server.write(BUCKET, key, body)


def columns(shape: tuple[int, int], count: int) -> list[Box]:
    width = shape[1] // count
    return [Box((0, n * width), (shape[0], width)) for n in range(count)]


def test_full_files_of_shards(fake: FakeS3, tmp_path: Path) -> None:
    save(STATE, "shards", CONFIG, fqn_to_index_mapping=TWO_FILES, save_distributed=True)
    before = names(fake, "shards")
    consolidate(fqn_to_index_mapping=TWO_FILES)
    assert names(fake, "shards") == before
    assert names(fake, "full") == [*FILES, INDEX]
    folder = download(fake, "full", tmp_path)
    found = loaded_by_the_library(folder)
    assert_same(dict(sorted(found.items())), dict(sorted(STATE.items())))
    index = json.loads((folder / INDEX).read_text())
    assert index["weight_map"] == {name: FILES[n - 1] for name, n in TWO_FILES.items()}
    assert_same(load(STATE, "full"), STATE)


def test_the_writer_consolidates(fake: FakeS3) -> None:
    save(STATE, "ck", CONFIG, save_distributed=True, enable_consolidation=True)
    assert names(fake, "ck") == [
        "model-00001-of-00001.safetensors",
        INDEX,
        f"sharded/{MANIFEST}",
        "sharded/shard-00001-model-00001-of-00001.safetensors",
    ]
    assert_same(load(STATE, "ck"), STATE)
    assert_same(load(STATE, "ck/sharded"), STATE)


def test_checksums_are_those_of_a_save(fake: FakeS3) -> None:
    """Blocks included, by which parts are verified."""
    state = {**STATE, "huge": fill((4000, 1000), seed=9)}
    save(state, "direct", CONFIG)
    save(state, "shards", CONFIG, save_distributed=True)
    consolidate()
    name = "model-00001-of-00001.safetensors"
    sums = [
        json.loads(fake.read(BUCKET, f"{path}/{INDEX}"))["metadata"]["s3dcp"][name]["crc64nvme"]
        for path in ("direct", "full")
    ]
    assert sums[0] == sums[1]


@settings(max_examples=25)
@given(
    data=st.data(),
    described=st.lists(
        st.tuples(cuts(), st.sampled_from([torch.float32, torch.int8, torch.float64, torch.bool])),
        min_size=1,
        max_size=4,
    ),
)
def test_any_cut_of_any_shape(
    shared_fake: FakeS3, data: st.DataObject, described: list[Any]
) -> None:
    whole = {
        f"t{number}": (fill(shape, dtype, number), boxes)
        for number, ((shape, boxes), dtype) in enumerate(described)
    }
    mapping = {name: data.draw(st.integers(1, 2)) for name in whole}
    with addressed(shared_fake) as fake:
        write_shards(fake, whole)
        consolidate(fqn_to_index_mapping=mapping)
        found: dict[str, torch.Tensor] = {}
        for key in fake.keys(BUCKET, "full/model-"):
            found |= safetensors.torch.load(fake.read(BUCKET, key))
        assert_same({n: found[n] for n in whole}, {n: tensor for n, (tensor, _) in whole.items()})


@pytest.mark.parametrize("part_bytes", [5 * MiB, 5 * MiB + 3])
def test_columns_over_several_parts(fake: FakeS3, part_bytes: int) -> None:
    """Part edges in the middle of rows, and of a tensor of one huge row."""
    shape, row = (1031, 4000), (1, 3_000_000)
    whole = {
        "columns": (fill(shape, torch.float32, 1), columns(shape, 4)),
        "row": (fill(row, torch.int16, 2), columns(row, 4)),
        "rows": (
            fill((999, 1000), torch.float64, 3),
            [Box((0, 0), (500, 1000)), Box((500, 0), (499, 1000))],
        ),
    }
    write_shards(fake, whole)
    consolidate(s3client_config=replace(CONFIG, part_size=part_bytes))
    assert sum(each.operation == "UploadPart" for each in fake.requests) >= 5
    found = safetensors.torch.load(fake.read(BUCKET, "full/model-00001-of-00001.safetensors"))
    assert_same({n: found[n] for n in whole}, {n: tensor for n, (tensor, _) in whole.items()})


def test_shards_of_torchs_writer(fake: FakeS3, tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in STATE.items()}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
    upload(fake, tmp_path, "shards")
    consolidate()
    assert_same(load(state, "full"), state)


def test_memory_is_bounded(shared_fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors six times the budget, which land next to where they belong."""
    held = peak = 0

    class Counted(bytearray):
        def __init__(self, size: int) -> None:
            nonlocal held, peak
            super().__init__(size)
            held += size
            peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            held -= len(self)

    shape = (4096, 2048)
    whole = {f"w{n}": (fill(shape, seed=n), columns(shape, 2)) for n in range(4)}
    with addressed(shared_fake) as fake:
        write_shards(fake, whole)
        monkeypatch.setattr("s3dcp._consolidation.bytearray", Counted, raising=False)
        consolidate()
        monkeypatch.undo()
        found = safetensors.torch.load(fake.read(BUCKET, "full/model-00001-of-00001.safetensors"))
        assert_same({n: found[n] for n in whole}, {n: tensor for n, (tensor, _) in whole.items()})
    assert 10 * MiB <= peak <= CONFIG.memory_bytes()


@pytest.mark.parametrize("name", ["small", "medium", "large", "turned"])
def test_a_damaged_shard(fake: FakeS3, name: str) -> None:
    save(STATE, "shards", CONFIG, save_distributed=True)
    key = "shards/shard-00001-model-00001-of-00001.safetensors"
    body = bytearray(fake.read(BUCKET, key))
    [length] = struct.unpack_from("<Q", body)
    place = json.loads(body[8 : 8 + length])[name]["data_offsets"][0]
    body[8 + length + place + 5] ^= 4
    fake.write(BUCKET, key, bytes(body))
    with pytest.raises(IntegrityError, match=rf"{name}: bytes .* of .*{key}"):
        consolidate()
    assert names(fake, "full") == []
    assert fake.uploads(BUCKET) == {}


def test_a_shard_that_is_replaced_meanwhile(fake: FakeS3) -> None:
    save(STATE, "shards", CONFIG, save_distributed=True)
    key = "shards/shard-00001-model-00001-of-00001.safetensors"

    def change(_: object) -> None:
        objects = fake._s3.buckets[BUCKET].objects
        objects[key] = replace(objects[key], etag='"another"')

    fake.inject(Call(before=change), operation="GetObject", key=key, skip=1)
    with pytest.raises(CheckpointChangedError):
        consolidate()
    assert names(fake, "full") == []


def test_a_failure_at_any_request(fake: FakeS3, subtests: pytest.Subtests) -> None:
    save(STATE, "shards", CONFIG, save_distributed=True, fqn_to_index_mapping=TWO_FILES)
    fake.forget()
    consolidate(fqn_to_index_mapping=TWO_FILES)
    for number in range(len(fake.requests)):
        with subtests.test(str(number)):
            fake.forget()
            fake.inject(Refuse("AccessDenied"), skip=number)
            with pytest.raises(S3Exception):
                consolidate(fqn_to_index_mapping=TWO_FILES)
            fake.forget()
            if INDEX in names(fake, "full"):
                assert_same(load(STATE, "full"), STATE)
            assert fake.uploads(BUCKET) == {}
            consolidate(fqn_to_index_mapping=TWO_FILES)
            assert_same(load(STATE, "full"), STATE)


def test_refusals(fake: FakeS3) -> None:
    with pytest.raises(CheckpointNotFoundError):
        consolidate()
    save(STATE, "shards", CONFIG, save_distributed=True)
    with pytest.raises(S3ConfigError, match="cannot replace"):
        consolidate("shards", "shards/")
    with pytest.raises(S3ConfigError, match="no file for"):
        consolidate(fqn_to_index_mapping={"small": 1})
    consolidate()
    with pytest.raises(CheckpointExistsError):
        consolidate(overwrite=False)


def test_shards_of_a_save_that_did_not_finish(fake: FakeS3) -> None:
    save(STATE, "shards", CONFIG, save_distributed=True)
    fake.delete(BUCKET, f"shards/{MANIFEST}")
    with pytest.raises(CheckpointNotFoundError, match="has not finished"):
        consolidate()
