"""Forks, spawns, other people's event loops, threads, exits: where a save or a load may find itself."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from s3dcp import (
    BinaryPrefixStrategy,
    CheckpointExistsError,
    PortalError,
    RoundRobinPrefixStrategy,
    S3ClientConfig,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
)
from s3dcp._portal import portal
from s3dcp.testing import FakeS3, Stall
from tests._states import MiB, StateDict, assert_same, blank, fill
from tests._zygote import Zygote, say

if TYPE_CHECKING:
    from io import BytesIO

    from tests._ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True)
OLD, NEW = "s3://life/old", "s3://life/new"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as made:
        yield made


@pytest.fixture(scope="module")
def _server() -> Iterator[FakeS3]:
    with FakeS3() as server:
        yield server


@pytest.fixture
def server(_server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """A server with an empty bucket, on which no client does anything wrong."""
    for name, value in _server.environ().items():
        monkeypatch.setenv(name, value)
    _server.create_bucket("life")
    for key in _server.keys("life"):
        _server.delete("life", key)
    yield _server
    _server.check()
    _server.forget()


def state_of(step: int) -> StateDict:
    return {"large": fill((2200, 1024), seed=step), "small": fill((3,), seed=step), "step": step}


def save(uri: str, step: int, **kwargs: Any) -> None:
    planner = kwargs.pop("planner", None)
    writer = S3StorageWriter(None, uri, CONFIG, **kwargs)
    dcp.save(state_of(step), storage_writer=writer, planner=planner, no_dist=True)


def check(uri: str, step: int) -> None:
    """Load a checkpoint, and compare it."""
    state = blank(state_of(step))
    dcp.load(state, storage_reader=S3StorageReader(None, uri, CONFIG), no_dist=True)
    assert_same(state, state_of(step))


def failure_of(call: Callable[[], object]) -> BaseException:
    """What DCP carries of the error that a call raises."""
    with pytest.raises(dcp.CheckpointException) as caught:
        call()
    [(error, _)] = caught.value.failures.values()
    return error


# Forks.


class ForkingPlanner(DefaultSavePlanner):
    """Forks in the middle of the save, where the portal is sending the first part.

    Args:
        server_url: Not used here: the child inherits the environment.
    """

    def __init__(self, in_child: Callable[[], None]) -> None:
        super().__init__()
        self._in_child = in_child
        self.child = 0

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        """Fork before the last item."""
        if write_item.index.fqn == "small":
            self.child = os.fork()
            if not self.child:
                self._in_child()
        return super().resolve_data(write_item)


def leave() -> None:
    sys.exit(7)


def use_and_leave() -> None:
    check(OLD, 0)
    save("s3://life/child", 2)
    check("s3://life/child", 2)
    sys.exit(7)


def fork_in_a_save(in_child: Callable[[], None], child_first: bool) -> None:
    planner = ForkingPlanner(in_child)
    try:
        save(NEW, 1, planner=planner)
    except dcp.CheckpointException as exc:
        # In the child, whose exit passes through the parent's save and leaves it alone.
        [(error, _)] = exc.failures.values()
        assert not planner.child
        assert isinstance(error, SystemExit)
        sys.exit(error.code)
    if not child_first:
        check(NEW, 1)
    _, status = os.waitpid(planner.child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    check(NEW, 1)
    save(OLD, 3)


@pytest.mark.parametrize("in_child", [leave, use_and_leave])
def test_a_fork_in_the_middle_of_a_save(
    server: FakeS3, zygote: Zygote, in_child: Callable[[], None]
) -> None:
    """Parent and child go on, each with a portal of its own, and do not wait for each other."""
    save(OLD, 0)
    child = zygote.start(fork_in_a_save, in_child)
    assert child.end() == (0, "")
    check(NEW, 1)
    check(OLD, 3)
    if in_child is use_and_leave:
        check("s3://life/child", 2)
    assert server.uploads("life") == {}
