"""`dcp.save` and `dcp.load` on 1, 2 and 4 ranks.

What runs on the ranks are module-level functions; their asserts are the tests' too.
"""

from __future__ import annotations

import copy
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from s3dcp import (
    BinaryPrefixStrategy,
    CheckpointExistsError,
    DefaultPrefixStrategy,
    HexPrefixStrategy,
    ObjectNotFoundError,
    RoundRobinPrefixStrategy,
    S3ClientConfig,
    S3CredentialsError,
    S3PrefixStrategyBase,
    S3StorageReader,
    S3StorageWriter,
)
from tests._states import (
    MiB,
    StateDict,
    assert_same,
    blank,
    blank_like,
    fill,
    finite,
    layouts,
    same_bits,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests._ranks import RankPool
    from tests._servers import Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

# A rank alone writes the large tensors in several parts.
SETTINGS = S3ClientConfig(part_size=5 * MiB)


def keys(boto: Any, bucket: str, prefix: str = "") -> set[str]:
    pages = boto.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {entry["Key"] for page in pages for entry in page.get("Contents", [])}


# Sharded tensors.


def full_tensors() -> dict[str, torch.Tensor]:
    return {
        "rows": fill((16, 24), seed=1),
        "columns": fill((16, 24), torch.bfloat16, 2),
        "uneven": fill((7, 5), torch.int64, 3),
        "fewer_than_ranks": fill((3, 4), torch.complex128, 4),
        "one_row": fill((1, 6), seed=5),
        "vector": fill((1001,), torch.float16, 6),
        "medium": fill((500, 1000), seed=7),
        "large_rows": fill((2200, 1000), seed=8),
        "large_columns": fill((1100, 1000), seed=9),
        "large_replicated": fill((1100, 500), torch.float64, 10),
    }


def saved_as(name: str) -> Placement:
    if "replicated" in name:
        return Replicate()
    return Shard(1) if "columns" in name else Shard(0)


def loaded_as(name: str) -> Placement:
    """Return how it is cut when it is cut otherwise than it was saved."""
    if "vector" in name:
        return Replicate()
    return Shard(0) if name.startswith(("columns", "large")) else Shard(1)


def whole_objects() -> StateDict:
    return {
        "plain": fill((5, 5), seed=20),
        "turned": fill((400, 300), seed=21).t(),
        # Nothing but the header says that the bytes are not the values.
        "large_neg": torch._neg_view(finite((1100, 500), torch.float64, 22)),
        "step": 12,
        "options": {"lr": 0.5, "betas": (0.9, 0.95), "names": ["a", "b"]},
    }


def sharded(
    tensors: dict[str, torch.Tensor], placement: Callable[[str], Placement], mesh: DeviceMesh
) -> dict[str, DTensor]:
    return {
        # No source rank: every rank has the whole tensor, and nothing needs to be sent.
        name: distribute_tensor(tensor, mesh, [placement(name)], src_data_rank=None)
        for name, tensor in tensors.items()
    }


def make_writer(path: str) -> StorageWriter:
    return S3StorageWriter(None, path, SETTINGS, HexPrefixStrategy(), thread_count=2)


def make_reader(path: str) -> StorageReader:
    return S3StorageReader(None, path, SETTINGS)


def save_sharded(path: str, writer: Callable[[str], StorageWriter] = make_writer) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = sharded(full_tensors(), saved_as, mesh)
    dcp.save({"model": state, **whole_objects()}, storage_writer=writer(path))


def load_sharded(path: str, reader: Callable[[str], StorageReader] = make_reader) -> None:
    """Load with the cuts of the save, and then with others."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (saved_as, loaded_as):
        tensors, whole = full_tensors(), whole_objects()
        if placement is loaded_as:  # what was saved whole
            tensors["large_neg"] = whole.pop("large_neg").resolve_neg()
        blanks = {name: blank_like(tensor) for name, tensor in tensors.items()}
        model = sharded(blanks, placement, mesh)
        target = {"model": model, **blank(whole)}
        if placement is loaded_as:
            target["large_neg"] = model.pop("large_neg")
        dcp.load(target, storage_reader=reader(path))
        found = target.pop("model")
        if placement is loaded_as:
            found["large_neg"] = target.pop("large_neg")
        for name, expected in sharded(tensors, placement, mesh).items():
            assert same_bits(found[name].to_local(), expected.to_local()), name
        assert_same(target, whole)


def load_whole(uri: str) -> None:
    state = {"model": full_tensors(), **whole_objects()}
    target = blank(state)
    dcp.load(target, storage_reader=S3StorageReader(None, uri), no_dist=True)
    assert_same(target, state)


def test_sharded_tensors_come_back(ranks: RankPool, bucket: str) -> None:
    ranks.run(save_sharded, f"s3://{bucket}/ck")
    ranks.run(load_sharded, f"s3://{bucket}/ck")


def test_four_ranks_save_and_fewer_load(
    ranks4: RankPool, ranks2: RankPool, ranks1: RankPool, bucket: str
) -> None:
    ranks4.run(save_sharded, f"s3://{bucket}/ck")
    ranks2.run(load_sharded, f"s3://{bucket}/ck")
    ranks1.run(load_sharded, f"s3://{bucket}/ck")
    load_whole(f"s3://{bucket}/ck")


def test_fewer_ranks_save_and_four_load(
    ranks4: RankPool, ranks2: RankPool, ranks1: RankPool, bucket: str
) -> None:
    ranks2.run(save_sharded, f"s3://{bucket}/2")
    ranks4.run(load_sharded, f"s3://{bucket}/2")
    ranks1.run(save_sharded, f"s3://{bucket}/1")
    ranks4.run(load_sharded, f"s3://{bucket}/1")


def save_and_load_on_a_plane(uri: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    turned: list[Placement] = [Shard(1), Shard(0)]
    cuts: list[list[Placement]] = [
        [Shard(0), Shard(1)],
        [Shard(0), Shard(0)],
        [Replicate(), Shard(0)],
    ]
    for number, placements in enumerate(cuts):
        full = fill((501, 1003), seed=number)
        tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
        path = f"{uri}/{number}"
        dcp.save({"tensor": tensor}, storage_writer=S3StorageWriter(None, path))
        for others in (placements, turned):
            target = distribute_tensor(blank_like(full), mesh, others, src_data_rank=None)
            dcp.load({"tensor": target}, storage_reader=S3StorageReader(None, path))
            expected = distribute_tensor(full, mesh, others, src_data_rank=None)
            assert same_bits(target.to_local(), expected.to_local())


def test_two_dimensions_of_ranks(ranks4: RankPool, bucket: str) -> None:
    ranks4.run(save_and_load_on_a_plane, f"s3://{bucket}/ck")


# FSDP2.


def trainer(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 7))
    for layer in (model[0], model[3], model):
        fully_shard(layer)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        model(torch.randn(5, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> StateDict:
    """Return everything, whole; nothing on other ranks than the first."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    # Copied, for some of it is what the next step changes.
    return copy.deepcopy({"model": dict(model_state), "optimizer": optimizer_state})


def train_and_save(uri: str) -> StateDict:
    model, optimizer = trainer(0)
    train(model, optimizer, 3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state, "step": 3},
        storage_writer=S3StorageWriter(None, uri, prefix_strategy=HexPrefixStrategy()),
    )
    return gathered(model, optimizer)


def resume(uri: str) -> StateDict:
    model, optimizer = trainer(1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, storage_reader=S3StorageReader(None, uri))
    assert state["step"] == 3
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    found = gathered(model, optimizer)
    train(model, optimizer, 1)  # and it goes on
    return found


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 2), (2, 4), (4, 1)])
def test_a_sharded_model_and_its_optimizer_resume(
    ranks4: RankPool, ranks2: RankPool, ranks1: RankPool, bucket: str, before: int, after: int
) -> None:
    pools = {4: ranks4, 2: ranks2, 1: ranks1}
    saved, *_ = pools[before].run(train_and_save, f"s3://{bucket}/ck")
    found, *_ = pools[after].run(resume, f"s3://{bucket}/ck")
    assert saved["optimizer"]["state"]["0.weight"]["exp_avg"].any()
    assert_same(found, saved)


# Prefix strategies.


class ByNode(S3PrefixStrategyBase):
    """A strategy of one's own: two ranks to a node."""

    def generate_prefix(self, rank: int) -> str:
        return f"node {rank // 2}/é+%/rank{rank}-"


STRATEGIES: dict[str, tuple[Callable[[], S3PrefixStrategyBase] | None, list[str]]] = {
    "none": (None, ["__0_", "__1_", "__2_", "__3_"]),
    "default": (DefaultPrefixStrategy, ["__0_", "__1_", "__2_", "__3_"]),
    "binary": (
        BinaryPrefixStrategy,
        ["0000000000/__0_", "1000000000/__1_", "0100000000/__2_", "1100000000/__3_"],
    ),
    "hex": (
        partial(HexPrefixStrategy, epoch_num=3, min_prefix_length=2),
        ["00/epoch_3/__0_", "10/epoch_3/__1_", "20/epoch_3/__2_", "30/epoch_3/__3_"],
    ),
    "fewer prefixes than ranks": (
        partial(BinaryPrefixStrategy, prefix_count=2, min_prefix_length=1),
        ["0/__0_", "1/__1_", "0/__2_", "1/__3_"],
    ),
    "round robin": (
        partial(RoundRobinPrefixStrategy, ["one", "two/three"], epoch_num=0),
        [
            "one/epoch_0/__0_",
            "two/three/epoch_0/__1_",
            "one/epoch_0/__2_",
            "two/three/epoch_0/__3_",
        ],
    ),
    "own": (
        ByNode,
        ["node 0/é+%/rank0-", "node 0/é+%/rank1-", "node 1/é+%/rank2-", "node 1/é+%/rank3-"],
    ),
}


def save_own_state(
    uri: str,
    strategy: Callable[[], S3PrefixStrategyBase] | None,
    use_collectives: bool,
    step: int = 0,
) -> None:
    rank = dist.get_rank()
    state = {f"of rank {rank}": fill((300, 300), seed=10 * step + rank), f"step {rank}": step}
    writer = S3StorageWriter(None, uri, prefix_strategy=strategy and strategy(), thread_count=2)
    dcp.save(state, storage_writer=writer, use_collectives=use_collectives)
    target = blank(state)
    dcp.load(target, storage_reader=S3StorageReader(None, uri))
    assert_same(target, state)


@pytest.mark.parametrize("use_collectives", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rank_writes_under_its_own_prefix(
    ranks4: RankPool, boto: Any, bucket: str, name: str, use_collectives: bool
) -> None:
    make, prefixes = STRATEGIES[name]
    ranks4.run(save_own_state, f"s3://{bucket}/ck", make, use_collectives)
    found = keys(boto, bucket)
    committed = {key for key in found if key.endswith(".metadata")}
    if use_collectives:
        assert committed == {"ck/.metadata"}
    else:
        assert committed == {f"ck/__{rank}.metadata" for rank in range(4)}
    for prefix in prefixes:
        own = {key for key in found if key.startswith(f"ck/{prefix}")} - committed
        assert len(own) == 2
        assert all(
            re.fullmatch(r"[01]\.[0-9a-f]{16}\.distcp", key.removeprefix(f"ck/{prefix}"))
            for key in own
        )
    assert len(found) == 8 + len(committed)


@pytest.mark.parametrize("use_collectives", [True, False])
def test_every_save_writes_objects_of_its_own(
    ranks2: RankPool, boto: Any, bucket: str, use_collectives: bool
) -> None:
    ranks2.run(save_own_state, f"s3://{bucket}/ck", None, use_collectives, step=0)
    before = keys(boto, bucket)
    ranks2.run(save_own_state, f"s3://{bucket}/ck", None, use_collectives, step=1)
    after = keys(boto, bucket)
    assert {key for key in before & after if not key.endswith(".metadata")} == set()
    assert len(before) == len(after) == (5 if use_collectives else 6)  # the old ones are gone


def test_ranks_share_moto(ranks2: RankPool, moto: Server, boto: Any, bucket: str) -> None:
    ranks2.run(save_own_state, f"s3://{bucket}/ck", HexPrefixStrategy, True)
    assert len(keys(boto, bucket, "ck/1000000000/__1_")) == 2


def test_a_rank_alone_takes_the_prefix_of_its_rank(
    ranks1: RankPool, boto: Any, bucket: str
) -> None:
    ranks1.run(save_own_state, f"s3://{bucket}/ck", HexPrefixStrategy, True)
    assert len(keys(boto, bucket, "ck/0000000000/__0_")) == 2


# Cached plans.


def save_with_cached_plans(uri: str) -> None:
    caches: list[dict[str, Any]] = [
        getattr(SavePlanner, f"_cached_{name}")
        for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata")
    ]
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        for step, rows in enumerate([9, 9, 700, 700, 9]):
            full = {"weight": fill((rows, 200), seed=step), "moment": fill((rows, 3), seed=-step)}
            state: StateDict = {
                **sharded(full, lambda _: Shard(0), mesh),
                f"of {rank}": fill((3 + rank * (step // 3), 5), seed=step),  # rank 0's never change
                "step": step,
            }
            path = f"{uri}/{step % 3}"  # the last two replace the first two
            writer = S3StorageWriter(None, path, prefix_strategy=HexPrefixStrategy())
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp.save(state, storage_writer=writer, planner=planner)
            blanks = {name: blank_like(tensor) for name, tensor in full.items()}
            target: StateDict = {
                **sharded(blanks, lambda _: Shard(0), mesh),
                f"of {rank}": blank_like(state[f"of {rank}"]),
                "step": -1,
            }
            dcp.load(target, storage_reader=S3StorageReader(None, path))
            assert_same(
                {k: v.to_local() if isinstance(v, DTensor) else v for k, v in target.items()},
                {k: v.to_local() if isinstance(v, DTensor) else v for k, v in state.items()},
            )
        assert SavePlanner._cached_final_save_plan
    finally:
        for cache in caches:
            cache.clear()


def test_plans_may_be_cached_on_ranks(ranks2: RankPool, boto: Any, bucket: str) -> None:
    ranks2.run(save_with_cached_plans, f"s3://{bucket}/ck")
    assert len(keys(boto, bucket)) == 3 * 3


# Failures.


def save_with_one_rank_refused(uri: str, use_collectives: bool) -> dict[int, BaseException] | None:
    if dist.get_rank() == 1:
        os.environ["AWS_SECRET_ACCESS_KEY"] = "wrong"
    try:
        dcp.save(
            {f"of rank {dist.get_rank()}": fill((300, 300), seed=1), "step": 1},
            storage_writer=S3StorageWriter(None, uri),
            use_collectives=use_collectives,
        )
    except dcp.CheckpointException as exc:
        return {rank: failure for rank, (failure, _) in exc.failures.items()}
    return None


# rclone alone checks signatures.
def test_an_error_on_one_rank_fails_the_save_on_all(
    ranks2: RankPool, boto: Any, bucket: str
) -> None:
    ranks2.run(save_own_state, f"s3://{bucket}/ck", None, True)
    before = keys(boto, bucket)
    for found in ranks2.run(save_with_one_rank_refused, f"s3://{bucket}/ck", True):
        assert found is not None
        assert list(found) == [1]
        assert isinstance(found[1], S3CredentialsError)
        assert "__1_0." in str(found[1])
    # Rank 0 was done with its part. It stays, unnamed, and so does the old checkpoint.
    after = keys(boto, bucket)
    assert before <= after
    assert all("/__0_" in key for key in after - before)
    state = {"of rank 1": fill((300, 300), seed=1), "step 1": 0}
    target = blank(state)
    dcp.load(target, storage_reader=S3StorageReader(None, f"s3://{bucket}/ck"), no_dist=True)
    assert_same(target, state)


def test_nothing_is_published_when_a_rank_failed(ranks2: RankPool, boto: Any, bucket: str) -> None:
    ranks2.run(save_with_one_rank_refused, f"s3://{bucket}/ck", True)
    assert "ck/.metadata" not in keys(boto, bucket)


def save_over_existing(uri: str) -> dict[int, BaseException]:
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save({"step": 2}, storage_writer=S3StorageWriter(None, uri, overwrite=False))
    return {rank: failure for rank, (failure, _) in caught.value.failures.items()}


def test_all_ranks_are_told_that_the_checkpoint_exists(
    ranks2: RankPool, boto: Any, bucket: str
) -> None:
    ranks2.run(save_own_state, f"s3://{bucket}/ck", None, True)
    before = keys(boto, bucket)
    for found in ranks2.run(save_over_existing, f"s3://{bucket}/ck"):
        assert list(found) == [0]
        assert isinstance(found[0], CheckpointExistsError)
    assert keys(boto, bucket) == before


def load_damaged(uri: str) -> dict[int, BaseException]:
    rank = dist.get_rank()
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(
            {f"of rank {rank}": torch.zeros(300, 300)}, storage_reader=S3StorageReader(None, uri)
        )
    return {rank: failure for rank, (failure, _) in caught.value.failures.items()}


def test_an_error_on_one_rank_fails_the_load_on_all(
    ranks2: RankPool, boto: Any, bucket: str
) -> None:
    ranks2.run(save_own_state, f"s3://{bucket}/ck", None, True)
    for key in keys(boto, bucket, "ck/__1_"):
        boto.delete_object(Bucket=bucket, Key=key)
    for found in ranks2.run(load_damaged, f"s3://{bucket}/ck"):
        assert list(found) == [1]
        assert isinstance(found[1], ObjectNotFoundError)
        assert "of rank 1" in str(found[1])


def load_missing(uri: str) -> BaseException:
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"step": 0}, storage_reader=S3StorageReader(None, uri))
    return caught.value


def test_ranks_are_told_that_there_is_no_checkpoint(ranks2: RankPool, bucket: str) -> None:
    for found in ranks2.run(load_missing, f"s3://{bucket}/ck"):
        assert isinstance(found, dcp.CheckpointException)
        assert sorted(found.failures) == [0, 1]
        # torch makes one text of it.
        assert f"No checkpoint at s3://{bucket}/ck" in str(found)


# Without collectives, every rank is on its own.


def save_and_load_alone(uri: str) -> None:
    rank = dist.get_rank()
    writer = S3StorageWriter(None, uri, prefix_strategy=RoundRobinPrefixStrategy(["a", "b"]))
    reader = S3StorageReader(None, uri)
    for step in range(2):
        state = {"same name": layouts(4 + rank), "rank": rank, "step": step}
        dcp.save(state, storage_writer=writer, use_collectives=False)
        target = blank(state)
        dcp.load(target, storage_reader=reader)
        assert_same(target, state)


def test_ranks_save_and_load_without_collectives(ranks2: RankPool, boto: Any, bucket: str) -> None:
    ranks2.run(save_and_load_alone, f"s3://{bucket}/ck")
    assert len(keys(boto, bucket)) == 4


def test_a_rank_without_collectives_fails_alone(ranks2: RankPool, boto: Any, bucket: str) -> None:
    first, second = ranks2.run(save_and_meet, f"s3://{bucket}/ck")
    assert first is None
    assert isinstance(second, S3CredentialsError)
    found = keys(boto, bucket)
    assert len(found) == 2
    assert "ck/__0.metadata" in found


def save_and_meet(uri: str) -> BaseException | None:
    rank = dist.get_rank()
    if rank == 1:
        os.environ["AWS_SECRET_ACCESS_KEY"] = "wrong"
    try:
        dcp.save(
            {"a": fill((3, 3), seed=rank)},
            storage_writer=S3StorageWriter(None, uri),
            use_collectives=False,
        )
    except Exception as exc:  # noqa: BLE001 - it is what is looked at
        dist.barrier()  # where a save ends that succeeds
        return exc
    return None
