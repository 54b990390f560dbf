"""As the storage of a trainer in torchtitan's style: its Stateful wrappers, its async saves."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import s3dcp
from s3dcp import S3StorageReader, S3StorageWriter
from s3dcp.testing import FakeS3
from tests._fakes import uri_of
from tests._ranks import RankPool

RUN = uri_of("titan/run")
KEEP = 2


class ModelWrapper(Stateful):
    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self._model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self._model, state_dict, options=StateDictOptions(strict=False))


class OptimizersContainer(Stateful):
    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self._model, self._optimizer, options=self._options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(
            self._model, self._optimizer, optim_state_dict=state_dict, options=self._options
        )


class TrainState(Stateful):
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


class Trainer:
    """What a trainer holds, sharded by FSDP2, and one pair of writer and reader for all of it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.train_state = TrainState()
        self.states: dict[str, Any] = {
            "model": ModelWrapper(self.model),
            "optimizer": OptimizersContainer(self.model, self.optimizer),
            "train_state": self.train_state,
        }
        self.writer, self.reader = S3StorageWriter(None, RUN), S3StorageReader(None, RUN)
        # Pinned where there is something to pin for.
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=torch.cuda.is_available(),
            )
        )

    def train(self) -> None:
        self.model(torch.ones(4, 6) + self.train_state.step).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.train_state.step += 1

    def save(self) -> AsyncSaveResponse:
        response = dcp.async_save(
            self.states,
            checkpoint_id=f"{RUN}/step-{self.train_state.step}",
            storage_writer=self.writer,
            async_stager=self.stager,
        )
        assert isinstance(response, AsyncSaveResponse)
        response.staging_completion.result()  # before the weights change
        return response

    def values(self) -> list[Any]:
        state = {name: each.state_dict() for name, each in self.states.items()}
        tensors = [*state["model"].values(), *state["optimizer"].values()]
        local = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
        return [each.tolist() if isinstance(each, torch.Tensor) else each for each in local]


def train_and_resume() -> tuple[list[str], int]:
    """Save every step while training, keep the newest, and go on from it in another trainer."""
    trainer = Trainer(seed=1)
    for _ in range(4):
        trainer.train()
        trainer.save().upload_completion.result()
        if dist.get_rank() == 0:
            s3dcp.gc(RUN, keep=KEEP, dry_run=False)
    trainer.stager.close()
    dist.barrier()
    left = [found.uri for found in s3dcp.list_checkpoints(RUN)]
    newest = s3dcp.latest(RUN)
    assert newest is not None

    resumed = Trainer(seed=2)
    dcp.load(resumed.states, checkpoint_id=newest.uri, storage_reader=resumed.reader)
    resumed.stager.close()
    assert resumed.values() == trainer.values()
    for each in (trainer, resumed):
        each.train()
    assert resumed.values() == trainer.values()

    once_more = Trainer(seed=3)
    s3dcp.load(once_more.states, newest.uri)
    once_more.stager.close()
    return left, once_more.train_state.step


def test_it_saves_purges_and_resumes(ranks2: RankPool, fake: FakeS3) -> None:
    left = [f"{RUN}/step-3", f"{RUN}/step-4"]

    assert ranks2.run(train_and_resume) == [(left, 4)] * 2
    assert len({key.split("/")[2] for key in fake.keys("bkt")}) == KEEP
