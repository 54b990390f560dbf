"""Tensors of an accelerator: this machine's, or one that is simulated on the CPU.

In a process of its own: from here on, torch has an accelerator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

import s3dcp
from s3dcp import IntegrityError, S3ClientConfig, S3ReaderConstructor
from s3dcp.testing import FakeS3, FlipByte
from tests import _simulated
from tests._fakes import BUCKET, load, load_into, save, uri_of
from tests._hf import load as load_safetensors
from tests._hf import load_into as load_safetensors_into
from tests._hf import save as save_safetensors
from tests._states import (
    CutPlanner,
    MiB,
    StateDict,
    assert_same,
    blank_like,
    blank_turned,
    dtypes,
    fill,
    finite,
    layouts,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning"),
]

# Several parts and spans, and less memory than the tensors take.
CONFIG = S3ClientConfig(part_size=5 * MiB, memory_budget_bytes=16 * MiB)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    """The last device, not the one that a new thread has."""
    if not torch.accelerator.is_available():
        if not _simulated.can_be_built():
            pytest.skip("there is neither an accelerator nor a C++ compiler")
        _simulated.register(tmp_path_factory.mktemp("accelerator"))
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.device_count() - 1)


@pytest.fixture
def chosen(device: torch.device) -> Iterator[torch.device]:
    """The same, as this thread's current one."""
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(device)
    yield device
    torch.accelerator.set_device_index(before)


def on(device: torch.device, state: StateDict) -> StateDict:
    """Bring tensors to a device as they are: strides, shared storages and flags included."""
    storages: dict[int, torch.Tensor] = {}
    return {name: _moved(tensor, device, storages) for name, tensor in state.items()}


def _moved(
    tensor: torch.Tensor, device: torch.device, storages: dict[int, torch.Tensor]
) -> torch.Tensor:
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in storages:
        raw = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[storage.data_ptr()] = raw.to(device)
    raw = storages[storage.data_ptr()]
    dtype = tensor.dtype
    moved = raw[: raw.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
    moved = moved.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    if tensor.is_conj():
        moved = moved.conj()
    return torch._neg_view(moved) if tensor.is_neg() else moved


def off(state: StateDict) -> StateDict:
    """Bring tensors to the host."""
    return {name: tensor.cpu() for name, tensor in state.items()}


def blank_on(device: torch.device, state: StateDict) -> StateDict:
    return {name: blank_like(tensor).to(device) for name, tensor in state.items()}


STATES: dict[str, Callable[[], StateDict]] = {
    "large": lambda: {"large": fill((9 * MiB,), torch.uint8), "larger": fill((5000, 1023))},
    "small": lambda: {str(n): fill((n, 7), seed=n) for n in range(300)},
    "dtypes": lambda: dtypes((37, 5)),
    "layouts": lambda: layouts(300),
    "large layouts": lambda: layouts(2000),
}


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> StateDict:
    """Tensors on the host."""
    return STATES[request.param]()


@pytest.mark.usefixtures("fake")
class TestRoundTrips:
    def test_what_is_saved_from_the_device(self, device: torch.device, state: StateDict) -> None:
        save(on(device, state), "ck", CONFIG)
        assert_same(load(state, "ck", CONFIG), state)

    def test_what_is_loaded_onto_the_device(self, device: torch.device, state: StateDict) -> None:
        save(state, "ck", CONFIG)
        target = blank_on(device, state)
        load_into(target, "ck")
        assert_same(off(target), state)

    def test_a_stock_checkpoint(
        self, fake: FakeS3, device: torch.device, tmp_path: Path, state: StateDict
    ) -> None:
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
        for path in tmp_path.iterdir():
            fake.write(BUCKET, f"ck/{path.name}", path.read_bytes())
        target = blank_on(device, state)
        load_into(target, "ck")
        assert_same(off(target), state)

    @pytest.mark.parametrize("reader", ["sequential", "range_based"])
    def test_the_other_readers(self, device: torch.device, reader: str) -> None:
        state = STATES["large"]()
        save(state, "ck", CONFIG)
        target = blank_on(device, state)
        constructor = getattr(S3ReaderConstructor, reader)()
        s3dcp.load(target, uri_of("ck"), reader_constructor=constructor, no_dist=True)
        assert_same(off(target), state)

    def test_targets_of_other_strides_and_types(self, device: torch.device) -> None:
        state = {"turned": fill((3000, 1000), seed=1), "wider": finite((2000, 1500), seed=2)}
        save(state, "ck", CONFIG)
        target = on(
            device,
            {
                "turned": blank_turned(state["turned"]),
                "wider": blank_like(state["wider"].double()),
            },
        )
        load_into(target, "ck")
        assert_same(off(target), {**state, "wider": state["wider"].double()})

    def test_some_rows_and_columns(self, device: torch.device) -> None:
        state = {"rows": fill((3000, 2049), seed=1), "few": fill((5, MiB), seed=2)}
        save(on(device, state), "ck", CONFIG)
        for planner in (CutPlanner((0.2, 0.7)), CutPlanner((0.1, 0.6), (0.3, 0.9))):
            target = blank_on(device, state)
            load_into(target, "ck", planner=planner)
            for name, tensor in off(target).items():
                box = planner.box(tensor)
                assert_same(tensor[box], state[name][box])

    def test_devices_and_the_host_in_one(self, device: torch.device) -> None:
        count = torch.accelerator.device_count()
        places = [torch.device("cpu"), *(torch.device(device.type, n) for n in range(count))]
        state = {f"{place}": fill((1500, 1000), seed=n) for n, place in enumerate(places)}
        mixed = {name: tensor.to(name) for name, tensor in state.items()}
        save(mixed, "ck", CONFIG)
        target = {name: blank_like(tensor).to(name) for name, tensor in state.items()}
        load_into(target, "ck")
        assert_same(off(target), state)
        assert [str(tensor.device) for tensor in target.values()] == list(state)

    def test_safetensors(self, device: torch.device) -> None:
        state = {
            "large": fill((5000, 1000), seed=3),
            "turned": fill((1500, 2000), seed=4).t(),
            "small": fill((10, 7), torch.bfloat16, 5),
            "empty": torch.empty(0, 3),
        }
        save_safetensors(on(device, state), "ck", CONFIG)
        assert_same(load_safetensors(state, "ck", CONFIG), state)
        target = blank_on(device, state)
        load_safetensors_into(target, "ck")
        assert_same(off(target), state)


def test_what_arrives_damaged_is_noticed(fake: FakeS3, device: torch.device) -> None:
    state = {"w": fill((5000, 1000))}
    save(state, "ck", CONFIG)
    fake.inject(FlipByte(offset=1000), operation="GetObject", key="*.distcp", times=None)
    with pytest.raises(IntegrityError, match="w"):
        load_into(blank_on(device, state), "ck")


class TestThreads:
    """Calls that are awaited, which run on a thread of their own."""

    def test_the_callers_device(self, fake: FakeS3, chosen: torch.device) -> None:
        seen: list[int] = []

        class Saving(DefaultSavePlanner):
            def resolve_data(self, write_item: WriteItem) -> Any:
                seen.append(torch.accelerator.current_device_index())
                return super().resolve_data(write_item)

        class Loading(DefaultLoadPlanner):
            def resolve_tensor(self, read_item: ReadItem) -> Any:
                seen.append(torch.accelerator.current_device_index())
                return super().resolve_tensor(read_item)

        async def main() -> None:
            await s3dcp.asave(on(chosen, state), uri_of("ck"), planner=Saving(), no_dist=True)
            await s3dcp.aload(target, uri_of("ck"), planner=Loading(), no_dist=True)

        state = {"w": fill((5000, 1000))}
        target = blank_on(chosen, state)
        asyncio.run(main())
        assert_same(off(target), state)
        assert seen == [chosen.index] * 2

    def test_the_callers_stream(self, fake: FakeS3, chosen: torch.device) -> None:
        """What was queued there before the call is saved, and overwritten by the load."""
        state = {"w": fill((5000, 1000)), "small": fill((10, 10))}
        pinned = {name: tensor.pin_memory() for name, tensor in state.items()}
        tensors = blank_on(chosen, state)

        async def main() -> None:
            for name, tensor in tensors.items():
                tensor.copy_(pinned[name], non_blocking=True)
            await s3dcp.asave(tensors, uri_of("ck"), no_dist=True)
            zeros = {name: torch.zeros_like(tensor).pin_memory() for name, tensor in state.items()}
            for name, tensor in tensors.items():
                tensor.copy_(zeros[name], non_blocking=True)
            await s3dcp.aload(tensors, uri_of("ck"), no_dist=True)

        with torch.Stream(chosen):
            asyncio.run(main())
            assert_same(off(tensors), state)
        assert_same(load(state, "ck"), state)

    def test_an_async_save(self, fake: FakeS3, device: torch.device) -> None:
        state = {"w": fill((5000, 1000)), "small": fill((10, 10))}
        s3dcp.async_save(on(device, state), uri_of("ck"), no_dist=True).result()
        assert_same(load(state, "ck"), state)


def test_what_cannot_be_pinned_is_copied_all_the_same(
    fake: FakeS3, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return make(*args, **options)

    make = torch.empty
    state = STATES["large"]()
    tensors, target = on(device, state), blank_on(device, state)
    monkeypatch.setattr(torch, "empty", empty)
    save(tensors, "ck", CONFIG)
    load_into(target, "ck")
    assert_same(off(target), state)


def test_another_default_device(fake: FakeS3, device: torch.device) -> None:
    """Buffers are the host's, wherever the caller has new tensors made."""
    state = {**STATES["large"](), "turned": fill((500, 1000)).t(), "empty": torch.empty(0, 3)}
    target = {**blank_on(device, state), "turned": blank_like(state["turned"]).double()}
    with torch.device(device):
        save(state, "ck", CONFIG)
        load_into(target, "ck")
    assert_same(off(target), {**state, "turned": state["turned"].double()})


SIZES: dict[str, list[tuple[int, ...]]] = {
    "medium": [(264 << 10,)] * 100,
    "growing": [(n * MiB,) for n in range(1, 9)],
    "odd": [(int(1.5**n * MiB),) for n in range(8)],
    "rows larger than the budget": [(2, 36 * MiB)],
}


@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="what is counted only the simulated one tells"
)
@pytest.mark.usefixtures("fake", "device")
class TestMemory:
    @pytest.mark.parametrize("budget_bytes", [16 * MiB, 18 * MiB])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_copies_are_pinned_and_within_the_budget(
        self, device: torch.device, sizes: str, budget_bytes: int
    ) -> None:
        """Whatever the tensors' sizes: what has been sent is used again, or let go of."""
        config = replace(CONFIG, memory_budget_bytes=budget_bytes)
        state = {str(n): fill(shape, torch.uint8, n) for n, shape in enumerate(SIZES[sizes])}
        tensors, target = on(device, state), blank_on(device, state)
        torch.ops.simulated.forget()

        save(tensors, "ck", config, thread_count=2)
        assert 0 < torch.ops.simulated.most_pinned_bytes() <= budget_bytes
        torch.ops.simulated.forget()
        load_into(target, "ck", config)
        assert 0 < torch.ops.simulated.most_pinned_bytes() <= budget_bytes

        assert torch.ops.simulated.large_unpinned_copies() == 0
        assert_same(off(target), state)

    def test_nothing_is_pinned_for_the_host(self) -> None:
        state = {"large": fill((9 * MiB,), torch.uint8), "small": fill((100, 100))}
        target = {name: blank_like(tensor).double() for name, tensor in state.items()}
        torch.ops.simulated.forget()
        save(state, "ck", CONFIG)
        load_into(target, "ck")
        assert torch.ops.simulated.most_pinned_bytes() == 0
        assert_same(target, {name: tensor.double() for name, tensor in state.items()})
