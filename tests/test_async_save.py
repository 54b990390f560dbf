"""`dcp.async_save`, by a thread and by a process."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from s3dcp import (
    BucketNotFoundError,
    CheckpointExistsError,
    HexPrefixStrategy,
    S3ClientConfig,
    S3StorageReader,
    S3StorageWriter,
)
from tests._forked import Zygote, say
from tests._states import MiB, StateDict, assert_same, blank, fill, same_bits

if TYPE_CHECKING:
    from io import BytesIO

    from torch.distributed.checkpoint.metadata import StorageMeta

    from tests._ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")


def state_of(step: int) -> StateDict:
    return {
        "large": fill((2500, 1024), seed=step),
        "turned": fill((300, 400), seed=step + 10).t(),
        "small": fill((3,), torch.bfloat16, step),
        "nested": {"step": step, "names": ["a", "b"]},
    }


def overwrite_values(state: StateDict) -> None:
    """Go on training: all that a checkpoint in flight must not see."""
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    state["nested"]["step"] = -1
    state["nested"]["names"].append("c")


def loaded(uri: str, like: StateDict) -> StateDict:
    target: StateDict = blank(like)
    dcp.load(target, storage_reader=S3StorageReader(None, uri), no_dist=True)
    return target


class HeldPlanner(DefaultSavePlanner):
    """Gives no data out before it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        """Wait first."""
        assert self.released.wait(timeout=200)
        return super().resolve_data(write_item)


@pytest.fixture
def _pinnable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory be "pinned" without an accelerator."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)


@pytest.mark.usefixtures("_pinnable")
@pytest.mark.parametrize("cached", [False, True])
def test_what_is_saved_is_what_was_staged(bucket: str, cached: bool) -> None:
    writer = S3StorageWriter(None, f"s3://{bucket}/unused", cache_staged_state_dict=cached)
    live = state_of(0)
    for step in range(3):  # into the same tensors, as training does
        for name, tensor in state_of(step).items():
            if isinstance(tensor, torch.Tensor):
                live[name].copy_(tensor)
        live["nested"] = {"step": step, "names": ["a", "b"]}
        planner = HeldPlanner()
        future = dcp.async_save(
            live,
            checkpoint_id=f"s3://{bucket}/{step}",
            storage_writer=writer,
            planner=planner,
            no_dist=True,
        )
        assert isinstance(future, Future)
        overwrite_values(live)
        assert not future.done()
        planner.released.set()
        future.result(timeout=200)
    for step in range(3):
        assert_same(loaded(f"s3://{bucket}/{step}", state_of(step)), state_of(step))


def test_two_saves_at_once(bucket: str) -> None:
    futures = [
        dcp.async_save(
            state_of(step),
            storage_writer=S3StorageWriter(None, f"s3://{bucket}/{step}", thread_count=2),
            no_dist=True,
        )
        for step in range(2)
    ]
    for step, future in enumerate(futures):
        assert isinstance(future, Future)
        future.result(timeout=200)
        assert_same(loaded(f"s3://{bucket}/{step}", state_of(step)), state_of(step))


def test_a_stager_of_ones_own(bucket: str) -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False))
    state = state_of(1)
    planner = HeldPlanner()
    response = dcp.async_save(
        state,
        storage_writer=S3StorageWriter(None, f"s3://{bucket}/ck"),
        async_stager=stager,
        planner=planner,
        no_dist=True,
    )
    assert isinstance(response, AsyncSaveResponse)
    response.staging_completion.result()
    overwrite_values(state)
    planner.released.set()
    response.upload_completion.result()
    stager.close()
    assert_same(loaded(f"s3://{bucket}/ck", state_of(1)), state_of(1))


def test_errors_come_with_the_future(bucket: str) -> None:
    uri = f"s3://{bucket}/ck"
    dcp.save({"step": 0}, storage_writer=S3StorageWriter(None, uri), no_dist=True)
    for writer, expected in (
        (S3StorageWriter(None, uri, overwrite=False), CheckpointExistsError),
        (S3StorageWriter(None, "s3://no-such-bucket-4711/ck"), BucketNotFoundError),
    ):
        future = dcp.async_save(state_of(1), storage_writer=writer, no_dist=True)
        assert isinstance(future, Future)
        failure = future.exception(timeout=200)
        assert isinstance(failure, dcp.CheckpointException)
        [(error, _)] = failure.failures.values()
        assert isinstance(error, expected)
    assert loaded(uri, {"step": 0}) == {"step": 0}


def save_shards_in_the_background(uri: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = fill((1001, 300), seed=1)
    writer = S3StorageWriter(None, uri, prefix_strategy=HexPrefixStrategy())
    for step in range(2):
        live = distribute_tensor(full + step, mesh, [Shard(0)], src_data_rank=None)
        planner = HeldPlanner()
        future = dcp.async_save(
            {"model": {"weight": live}, "step": step}, storage_writer=writer, planner=planner
        )
        live.to_local().zero_()
        planner.released.set()
        assert isinstance(future, Future)
        future.result(timeout=200)
        target = distribute_tensor(torch.zeros(1001, 300), mesh, [Shard(1)], src_data_rank=None)
        dcp.load({"model": {"weight": target}}, storage_reader=S3StorageReader(None, uri))
        expected = distribute_tensor(full + step, mesh, [Shard(1)], src_data_rank=None)
        assert same_bits(target.to_local(), expected.to_local())


def test_ranks_save_in_the_background(ranks2: RankPool, boto: Any, bucket: str) -> None:
    ranks2.run(save_shards_in_the_background, f"s3://{bucket}/ck")
    assert len(boto.list_objects_v2(Bucket=bucket)["Contents"]) == 3


def save_by_a_process(uri: str) -> list[BaseException | None]:
    """Run on a rank, since the process checkpointer needs a process group."""

    def save(step: int, where: str, **kwargs: Any) -> BaseException | None:
        writer = S3StorageWriter(None, where, prefix_strategy=HexPrefixStrategy(), **kwargs)
        live = state_of(step)
        future = dcp.async_save(
            live, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS
        )
        overwrite_values(live)
        assert isinstance(future, Future)
        return future.exception(timeout=200)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
        failures = [
            save(0, f"{uri}/0"),
            save(1, f"{uri}/1"),
            save(2, f"{uri}/1", cache_staged_state_dict=True),  # over the last one
            save(3, f"{uri}/0", overwrite=False),
            save(4, "s3://no-such-bucket-4711/ck"),
        ]
    _async_process_executor._CHECKPOINT_PROCESS = None  # which ends it
    return failures


def test_a_process_saves(ranks1: RankPool, boto: Any, bucket: str) -> None:
    [failures] = ranks1.run(save_by_a_process, f"s3://{bucket}")
    assert failures[:3] == [None, None, None]
    for failure, expected in zip(
        failures[3:], (CheckpointExistsError, BucketNotFoundError), strict=True
    ):
        assert isinstance(failure, dcp.CheckpointException)
        [(error, _)] = failure.failures.values()
        assert isinstance(error, expected)
    assert_same(loaded(f"s3://{bucket}/0", state_of(0)), state_of(0))
    assert_same(loaded(f"s3://{bucket}/1", state_of(2)), state_of(2))
    listed = boto.list_objects_v2(Bucket=bucket)["Contents"]
    names = [entry["Key"].split("/", 1)[1] for entry in listed]
    assert sorted(name[:15] for name in names) == [".metadata"] * 2 + ["0000000000/__0_"] * 2


def test_a_writer_that_has_saved_can_be_used_by_a_process(bucket: str) -> None:
    import pickle

    writer = S3StorageWriter(None, f"s3://{bucket}/ck", S3ClientConfig(part_size=6 * MiB))
    dcp.save(state_of(0), storage_writer=writer, no_dist=True)
    writer.stage(state_of(1))
    writer.state_dict_cache = state_of(1)
    data = pickle.dumps(writer)
    assert len(data) < 10_000
    copied = pickle.loads(data)
    dcp.save(state_of(2), storage_writer=copied, no_dist=True)
    assert copied.fs.client.s3client_config == S3ClientConfig(part_size=6 * MiB)
    assert_same(loaded(f"s3://{bucket}/ck", state_of(2)), state_of(2))


class ExitPlanner(DefaultSavePlanner):
    """Gives no data out before the interpreter, in its last act, waits for the saving thread.

    Executors take no more work then, and Python 3.12 starts no more threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started, self._exiting = threading.Event(), threading.Event()

    def set_up_planner(
        self,
        state_dict: StateDict,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """See when this thread is waited for."""
        worker = threading.current_thread()
        join = worker.join

        def joined(timeout: float | None = None) -> None:
            self._exiting.set()
            join(timeout)

        worker.join = joined  # type: ignore[method-assign]
        self.started.set()
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        """Wait first."""
        assert self._exiting.wait(60)
        return super().resolve_data(write_item)


def rows() -> StateDict:
    return {str(n): torch.full((1000 * n, 1024), float(n)) for n in range(1, 6)} | {"step": 7}


def exit_with_saves(*uris: str) -> None:
    state = rows()
    for uri in uris:
        planner = ExitPlanner()
        writer = S3StorageWriter(None, uri, S3ClientConfig(part_size=5 * MiB), thread_count=2)
        dcp.async_save(state, storage_writer=writer, planner=planner, no_dist=True)
        assert planner.started.wait(60)
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    say("leaving")


def test_the_interpreter_exits_with_saves_in_flight(zygote: Zygote, boto: Any, bucket: str) -> None:
    uris = [f"s3://{bucket}/1", "s3://no-such-bucket-4711/ck", f"s3://{bucket}/2"]
    code, output = zygote.start(exit_with_saves, *uris).end()
    assert code == 0, output
    assert "leaving\n" in output
    assert "Traceback" not in output
    assert len(boto.list_objects_v2(Bucket=bucket)["Contents"]) == 6
    for uri in uris[::2]:
        assert_same(loaded(uri, rows()), rows())
