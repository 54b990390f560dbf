"""Safetensors checkpoints of several ranks: shards, full files of them, and other cuts on load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from s3dcp import S3ClientConfig, S3HuggingFaceStorageReader, S3HuggingFaceStorageWriter
from tests._states import MiB, assert_same, blank, blank_like, fill, same_bits

if TYPE_CHECKING:
    from tests._ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

CONFIG = S3ClientConfig(part_size=5 * MiB)


def whole() -> dict[str, torch.Tensor]:
    return {
        "rows": fill((16, 24), seed=1),
        "columns": fill((17, 24), torch.bfloat16, 2),
        "uneven": fill((7, 5), torch.int64, 3),
        "one_row": fill((1, 6), seed=4),
        "large_rows": fill((2200, 1000), seed=5),
        "large_columns": fill((1100, 1000), seed=6),
        "replicated": fill((30, 30), torch.float64, 7),
    }


def saved_as(name: str) -> Placement:
    if "replicated" in name:
        return Replicate()
    return Shard(1) if "columns" in name else Shard(0)


def loaded_as(name: str) -> Placement:
    return Shard(0) if "columns" in name else Shard(1)


def cut(state: dict[str, torch.Tensor], placement: Any) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(tensor, mesh, [placement(name)], src_data_rank=None)
        for name, tensor in state.items()
    }


def save_shards(uri: str, **options: Any) -> None:
    writer = S3HuggingFaceStorageWriter(None, uri, CONFIG, save_distributed=True, **options)
    dcp.save({**cut(whole(), saved_as), "plain": fill((3,))}, storage_writer=writer)


def load_shards(uri: str) -> None:
    for placement in (saved_as, loaded_as):
        expected = cut(whole(), placement)
        blanks = {name: blank_like(tensor) for name, tensor in whole().items()}
        target: dict[str, Any] = {**cut(blanks, placement), "plain": torch.zeros(3)}
        dcp.load(target, storage_reader=S3HuggingFaceStorageReader(None, uri, CONFIG))
        assert same_bits(target["plain"], fill((3,)))
        for name, tensor in expected.items():
            assert same_bits(target[name].to_local(), tensor.to_local()), name


def keys(boto: Any, bucket: str, prefix: str) -> list[str]:
    listed = boto.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return [entry["Key"].removeprefix(prefix) for entry in listed]


def test_shards_are_loaded_with_other_cuts(
    ranks2: RankPool, boto: Any, bucket: str, tmp_path: Path
) -> None:
    uri = f"s3://{bucket}/ck"
    ranks2.run(save_shards, uri)
    shards = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert keys(boto, bucket, "ck/") == ["model.safetensors.manifest.json", *shards]
    ranks2.run(load_shards, uri)

    # torch's own reader, of the same shards in a folder.
    for name in shards:
        boto.download_file(bucket, f"ck/{name}", str(tmp_path / name))
    target = blank(whole())
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same(target, whole())


def test_ranks_consolidate(ranks2: RankPool, boto: Any, bucket: str, tmp_path: Path) -> None:
    mapping = {name: number for number, name in enumerate([*whole(), "plain"], start=1)}
    mapping |= {"rows": 2, "large_rows": 2}
    uri = f"s3://{bucket}/ck"
    ranks2.run(save_shards, uri, fqn_to_index_mapping=mapping, enable_consolidation=True)
    ranks2.run(load_shards, uri)
    ranks2.run(load_shards, f"{uri}/sharded")
    found: dict[str, torch.Tensor] = {}
    for name in keys(boto, bucket, "ck/model-"):
        boto.download_file(bucket, f"ck/model-{name}", str(tmp_path / name))
        found |= safetensors.torch.load_file(tmp_path / name)
    assert_same({name: found[name] for name in whole()}, whole())


def refuse_shards_of_one_file(uri: str) -> str:
    writer = S3HuggingFaceStorageWriter(None, uri)
    try:
        dcp.save(dict(cut(whole(), saved_as)), storage_writer=writer)
    except dcp.CheckpointException as exc:
        return str(exc)
    return "saved"


def test_ranks_that_would_overwrite_each_other(ranks2: RankPool, boto: Any, bucket: str) -> None:
    """Torch's writer lets them."""
    for text in ranks2.run(refuse_shards_of_one_file, f"s3://{bucket}/ck"):
        assert "pass save_distributed=True" in text
    assert keys(boto, bucket, "ck/") == []


def fine_tune(base: str, uri: str) -> None:
    """Load what a library wrote into an FSDP2 model, in another dtype, and save it again."""
    model = nn.Sequential(nn.Linear(33, 65), nn.LayerNorm(65), nn.Linear(65, 7))
    fully_shard(model)
    state = get_model_state_dict(model)
    dcp.load(state, storage_reader=S3HuggingFaceStorageReader(None, base))
    set_model_state_dict(model, state)
    writer = S3HuggingFaceStorageWriter(None, uri, None, None, 1, True, True)
    dcp.save(get_model_state_dict(model), storage_writer=writer)


def test_a_sharded_model_from_a_single_file(
    ranks2: RankPool, boto: Any, bucket: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(33, 65), nn.LayerNorm(65), nn.Linear(65, 7)).bfloat16()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base")
    boto.upload_file(str(tmp_path / "base"), bucket, "base/model.safetensors")
    ranks2.run(fine_tune, f"s3://{bucket}/base", f"s3://{bucket}/tuned")
    name = "model-00001-of-00001.safetensors"
    boto.download_file(bucket, f"tuned/{name}", str(tmp_path / name))
    found = safetensors.torch.load_file(tmp_path / name)
    assert_same({n: found[n] for n in model.state_dict()}, dict(model.float().state_dict()))
