"""The garbage collector while DCP plans, and what a save or load leaves to it."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from s3dcp import (
    CheckpointExistsError,
    CorruptMetadataError,
    HexPrefixStrategy,
    PortalError,
    S3ClientConfig,
    S3ConfigError,
    S3HuggingFaceStorageReader,
    S3HuggingFaceStorageWriter,
    S3StorageReader,
    S3StorageWriter,
    _planning,
)
from s3dcp._collector import _NEVER, CollectorPause, _in_force
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

TENSORS = {"layer.weight": torch.arange(300_000.0), "layer.bias": torch.ones(3)}
STATE = {**TENSORS, "step": 7}
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
    saving, loading = WatchedSave(), WatchedLoad()
    dcp.save(TENSORS, storage_writer=writer(None, uri_of("ck")), planner=saving, no_dist=True)
    assert saving.seen == {"local": True, "global": True}
    assert not is_held_back()

    dcp.load(
        dict(TENSORS), storage_reader=reader(None, uri_of("ck")), planner=loading, no_dist=True
    )
    assert loading.seen == {"local": True, "global": True}
    assert not is_held_back()


def give_up() -> None:
    writer = S3StorageWriter(None, uri_of("ck"))
    with pytest.raises(ArithmeticError), unwrapped():
        dcp.save(STATE, storage_writer=writer, planner=Failing(), no_dist=True)


def test_what_dcp_gives_up_holds_it_back_for_seconds(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    lapses: list[tuple[float, Callable[[], object]]] = []

    def later(_: Portal, delay_s: float, function: Callable[[], object]) -> type[bool]:
        lapses.append((delay_s, function))
        return bool

    monkeypatch.setattr(Portal, "call_later", later)
    give_up()
    give_up()
    [(delay_s, lapse)] = lapses  # a second attempt does not prolong it
    assert delay_s == 5
    assert is_held_back()
    lapse()
    assert not is_held_back()


def test_the_portal_ends_it(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_planning, "_LONGEST_S", 0.001)
    ended = threading.Event()
    exit_ = CollectorPause.__exit__

    def noted(pause: CollectorPause, *exc_info: object) -> None:
        exit_(pause, *exc_info)
        ended.set()

    monkeypatch.setattr(CollectorPause, "__exit__", noted)
    give_up()
    assert ended.wait(60)
    assert not is_held_back()


class Refused(S3HuggingFaceStorageWriter):
    """One that DCP tells of a save without collectives."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, rank=0, use_collectives=False)


class Wrong(HexPrefixStrategy):
    """A strategy that fails."""

    def generate_prefix(self, rank: int) -> str:
        raise ArithmeticError


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        (partial(S3StorageWriter, overwrite=False), CheckpointExistsError),
        (partial(S3StorageWriter, prefix_strategy=Wrong(epoch_num=1)), ArithmeticError),
        (Refused, S3ConfigError),
    ],
)
def test_a_save_that_was_refused_holds_it_back_no_longer(
    fake: FakeS3, writer: Any, error: type[Exception]
) -> None:
    dcp.save(STATE, storage_writer=S3StorageWriter(None, uri_of("ck")), no_dist=True)
    with pytest.raises(error), unwrapped():
        dcp.save(STATE, storage_writer=writer(None, uri_of("ck")), no_dist=True)
    assert not is_held_back()


def test_a_load_that_was_refused_holds_it_back_no_longer(fake: FakeS3) -> None:
    dcp.save(STATE, storage_writer=S3StorageWriter(None, uri_of("ck")), no_dist=True)
    reader = S3StorageReader(None, uri_of("ck"))
    setup = reader.set_up_storage_reader

    def forget(metadata: Any, *args: Any, **kwargs: Any) -> None:
        setup(metadata, *args, **kwargs)
        reader.storage_data = {}

    reader.set_up_storage_reader = forget  # type: ignore[method-assign]
    with pytest.raises(CorruptMetadataError), unwrapped():
        dcp.load(dict(STATE), storage_reader=reader, no_dist=True)
    assert not is_held_back()


@pytest.mark.parametrize(("ranks", "held_back"), [(1, True), (2, False)])
def test_it_does_not_last_while_others_plan(
    monkeypatch: pytest.MonkeyPatch, ranks: int, *, held_back: bool
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    pause = PlanningPause()
    pause.begin()
    pause.end_if_others_plan()
    assert is_held_back() == held_back
    pause.end()


def test_there_is_one_at_a_time() -> None:
    pause, other = PlanningPause(), PlanningPause()
    pause.begin()
    other.begin()
    other.end()
    assert is_held_back()
    pause.end()
    assert not is_held_back()
    other.begin()
    assert is_held_back()
    other.end()


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

    def save() -> weakref.ref[Any]:
        planner = DefaultSavePlanner()
        dcp.save(TENSORS, storage_writer=writer(None, uri_of("ck")), planner=planner, no_dist=True)
        return weakref.ref(planner)

    def load() -> weakref.ref[Any]:
        planner = DefaultLoadPlanner()
        dcp.load(
            dict(TENSORS), storage_reader=reader(None, uri_of("ck")), planner=planner, no_dist=True
        )
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
