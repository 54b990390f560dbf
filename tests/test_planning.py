"""The garbage collector while DCP plans, and what a save or load leaves to it."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from s3dcp import (
    CheckpointExistsError,
    PortalError,
    S3ClientConfig,
    S3HuggingFaceStorageReader,
    S3HuggingFaceStorageWriter,
    S3StorageReader,
    S3StorageWriter,
)
from s3dcp._collector import _NEVER, _in_force
from s3dcp._planning import PlanningPause
from s3dcp._portal import Portal
from s3dcp._saving import SavedItems
from s3dcp._staging import Memory
from tests._fakes import unwrapped, uri_of
from tests._states import MiB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s3dcp._staging import Buffer
    from s3dcp.testing import FakeS3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

STATE = {"layer.weight": torch.arange(300_000.0), "layer.bias": torch.ones(3), "step": 7}
PAIRS = [
    (S3StorageWriter, S3StorageReader),
    (S3HuggingFaceStorageWriter, S3HuggingFaceStorageReader),
]


@pytest.fixture(autouse=True)
def _nobody_else() -> Iterator[None]:
    """End what other tests have begun, and see that these leave nothing."""
    for pause in tuple(_in_force):
        pause.__exit__()
    yield
    assert not _in_force


def is_held_back() -> bool:
    return gc.get_threshold()[1] == _NEVER


class Watched:
    """A planner that notes whether the collector is held back where DCP calls it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: dict[str, bool] = {}

    def create_local_plan(self) -> Any:
        self.seen["local"] = is_held_back()
        return super().create_local_plan()  # type: ignore[misc]

    def create_global_plan(self, plans: list[Any]) -> Any:
        self.seen["global"] = is_held_back()
        return super().create_global_plan(plans)  # type: ignore[misc]


class WatchedSave(Watched, DefaultSavePlanner):
    """One of saves."""


class WatchedLoad(Watched, DefaultLoadPlanner):
    """One of loads."""


class Failing(DefaultSavePlanner):
    """One that fails, of which a writer is not told."""

    def create_local_plan(self) -> Any:
        raise ArithmeticError


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_it_is_held_back_while_dcp_plans(fake: FakeS3, writer: Any, reader: Any) -> None:
    state = {name: value for name, value in STATE.items() if isinstance(value, torch.Tensor)}
    saving, loading = WatchedSave(), WatchedLoad()
    dcp.save(state, storage_writer=writer(None, uri_of("ck")), planner=saving, no_dist=True)
    assert saving.seen == {"local": True, "global": True}
    assert not is_held_back()

    dcp.load(state, storage_reader=reader(None, uri_of("ck")), planner=loading, no_dist=True)
    assert loading.seen == {"local": True, "global": True}
    assert not is_held_back()


def test_a_save_that_dcp_gives_up_holds_it_back_no_longer_than_a_minute(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    lapses: list[tuple[float, Callable[[], object]]] = []

    def later(_: Portal, delay_s: float, function: Callable[[], object]) -> type[bool]:
        lapses.append((delay_s, function))
        return bool

    monkeypatch.setattr(Portal, "call_later", later)
    writer = S3StorageWriter(None, uri_of("ck"))
    with pytest.raises(ArithmeticError), unwrapped():
        dcp.save(STATE, storage_writer=writer, planner=Failing(), no_dist=True)
    [(delay_s, lapse)] = lapses
    assert delay_s == 60
    assert is_held_back()
    lapse()
    assert not is_held_back()


def test_a_save_that_was_refused_holds_it_back_no_longer(fake: FakeS3) -> None:
    dcp.save(STATE, storage_writer=S3StorageWriter(None, uri_of("ck")), no_dist=True)
    writer = S3StorageWriter(None, uri_of("ck"), overwrite=False)
    with pytest.raises(CheckpointExistsError), unwrapped():
        dcp.save(STATE, storage_writer=writer, no_dist=True)
    assert not is_held_back()


def test_it_begins_anew_and_ends_at_once() -> None:
    pause = PlanningPause()
    pause.end()
    pause.begin()
    pause.begin()
    assert is_held_back()
    pause.end()
    assert not is_held_back()


def test_without_a_portal_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PortalError("The I/O thread has ended")

    monkeypatch.setattr(Portal, "call_later", refuse)
    pause = PlanningPause()
    pause.begin()
    assert not is_held_back()
    pause.end()


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_nothing_of_a_save_or_load_waits_for_it(fake: FakeS3, writer: Any, reader: Any) -> None:
    state = {name: value for name, value in STATE.items() if isinstance(value, torch.Tensor)}

    def save() -> weakref.ref[Any]:
        planner = DefaultSavePlanner()
        dcp.save(state, storage_writer=writer(None, uri_of("ck")), planner=planner, no_dist=True)
        return weakref.ref(planner)

    def load() -> weakref.ref[Any]:
        planner = DefaultLoadPlanner()
        dcp.load(state, storage_reader=reader(None, uri_of("ck")), planner=planner, no_dist=True)
        return weakref.ref(planner)

    gc.disable()
    try:
        assert save()() is None  # which held the state dict
        assert load()() is None
    finally:
        gc.enable()


def test_buffers_come_back_while_there_is_more_to_copy(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"{number:03}": torch.full((25 << 10,), float(number)) for number in range(250)}
    seen: set[int] = set()
    borrow, send = Memory.borrow, SavedItems._send_held

    def noted(memory: Memory, size_bytes: int, *, pinned: bool) -> Buffer:
        buffer = borrow(memory, size_bytes, pinned=pinned)
        seen.add(buffer.tensor.data_ptr())
        return buffer

    def sent(saving: SavedItems, file: Any) -> None:
        send(saving, file)
        for call in saving._sending:
            call.wait()

    monkeypatch.setattr(Memory, "borrow", noted)
    monkeypatch.setattr(SavedItems, "_send_held", sent)
    config = S3ClientConfig(part_size=5 * MiB)
    writer = S3StorageWriter(None, uri_of("ck"), config)
    dcp.save(state, storage_writer=writer, no_dist=True)
    # Of 25 MiB: a part that is being filled, one that is held, and the one that was sent.
    assert len(seen) <= 3 * 5 + 1

    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(into, storage_reader=S3StorageReader(None, uri_of("ck")), no_dist=True)
    assert all(torch.equal(into[name], tensor) for name, tensor in state.items())
