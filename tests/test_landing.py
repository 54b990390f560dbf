"""Where the bytes of a load land, and which are fetched, over a store in memory."""

from __future__ import annotations

import asyncio
import io
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

import s3dcp._landing
import s3dcp._saving
from s3dcp import IntegrityError, S3ClientConfig
from s3dcp._budget import Share, budget
from s3dcp._errors import CorruptMetadataError
from s3dcp._framing import frame_for, memory_of
from s3dcp._items import Stored, needed_ranges
from s3dcp._keys import S3Uri
from s3dcp._loading import LoadedItems
from s3dcp._metadata import ItemCrcs
from s3dcp._portal import portal
from s3dcp._saving import SavedItems
from s3dcp._staging import Buffer, Memory
from s3dcp._store import ObjectInfo, Scatter
from s3dcp._torch_internals import _StorageReaderTransforms
from tests._stores import MemoryStore, channel_of

# torch says so even when it is told with no_dist=True.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

MiB = 1 << 20
BASE = S3Uri("bucket", "run")
CONFIG = S3ClientConfig(part_size=5 * MiB, memory_budget_bytes=10 * MiB)


class CountingStore(MemoryStore):
    """Counts the bytes that were fetched."""

    fetched_bytes = 0

    async def get_range(
        self, uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> ObjectInfo:
        self.fetched_bytes += into.remaining
        return await super().get_range(uri, start, into, if_match=if_match)


class Targets:
    """A planner of which only the tensors are asked."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self.committed = 0
        self.loaded: list[bytes] = []

    def resolve_tensor(self, request: ReadItem) -> torch.Tensor:
        return self._tensors[int(request.dest_index.fqn)]

    def commit_tensor(self, request: ReadItem, tensor: torch.Tensor) -> None:
        self.committed += 1

    def load_bytes(self, request: ReadItem, value: io.BytesIO) -> None:
        self.loaded.append(value.getvalue())


def save(store: MemoryStore, state: dict[str, Any], *, config: S3ClientConfig = CONFIG) -> Metadata:
    """Write a state dict with the engine; return its metadata."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    [plan], metadata = planner.create_global_plan([planner.create_local_plan()])
    saved = SavedItems(
        portal(), channel_of(store), config, planner, _StorageWriterTransforms()
    ).write([(S3Uri("bucket", "run/__0_0.distcp"), "__0_0.distcp", plan.items)])
    metadata.storage_data = {result.index: result.storage_data for result in saved}
    return metadata


def save_stock(store: MemoryStore, state: dict[str, Any], folder: Any) -> Metadata:
    """Write a state dict with torch's own writer; return its metadata."""
    import torch.distributed.checkpoint as dcp

    writer = FileSystemWriter(folder, sync_files=False)
    metadata: Metadata = dcp.save(state, storage_writer=writer, no_dist=True)
    for path in folder.iterdir():
        store.write(S3Uri("bucket", f"run/{path.name}"), path.read_bytes())
    return metadata


def request(name: str, target: int, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> ReadItem:
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(str(target)),
        dest_offsets=torch.Size([0] * len(lengths)),
        storage_index=MetadataIndex(name, [0] * len(lengths)),
        storage_offsets=torch.Size(offsets),
        lengths=torch.Size(lengths),
    )


def load(
    store: MemoryStore, metadata: Metadata, requests: list[ReadItem], targets: list[torch.Tensor]
) -> Targets:
    planner = Targets(targets)
    LoadedItems(
        portal(),
        channel_of(store),
        CONFIG,
        planner,  # type: ignore[arg-type]  # the part of a planner that is asked
        _StorageReaderTransforms(),
        max_gap_bytes=32 * MiB,
    ).read(requests, metadata, BASE)
    return planner


@pytest.fixture(params=["ours", "stock"])
def saved(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    """Saves with either writer."""
    if request.param == "ours":
        return save
    return lambda store, state: save_stock(store, state, tmp_path / "checkpoint")


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CPU tensors as they are, and taken for a device's: the same copies, without a GPU."""
    if request.param == "device":
        monkeypatch.setattr(s3dcp._landing, "is_host", lambda _: False)
        monkeypatch.setattr(s3dcp._saving, "is_host", lambda _: False)
    return str(request.param)


class Borrowed(NamedTuple):
    """A buffer's size, and what its save or load held with it."""

    size_bytes: int
    held_bytes: int


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> list[Borrowed]:
    """The buffers that are borrowed from here on."""
    found: list[Borrowed] = []
    borrow = Memory.borrow

    def noted(memory: Memory, size_bytes: int, *, pinned: bool) -> Buffer:
        buffer = borrow(memory, size_bytes, pinned=pinned)
        found.append(Borrowed(size_bytes, memory.held_bytes))
        return buffer

    monkeypatch.setattr(Memory, "borrow", noted)
    return found


@pytest.mark.usefixtures("place")
def test_whole_tensors(saved: Any) -> None:
    store = CountingStore()
    state = {
        "large": torch.randn(3 * MiB),
        "odd": torch.randint(0, 255, (1237, 3001), dtype=torch.uint8),
        "small": torch.randn(10, 7),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
    }
    metadata = saved(store, state)
    targets = [torch.zeros_like(tensor) for tensor in state.values()]
    requests = [
        request(name, n, (0,) * tensor.ndim, tuple(tensor.shape))
        for n, (name, tensor) in enumerate(state.items())
    ]
    planner = load(store, metadata, requests, targets)
    assert planner.committed == len(targets)
    for target, tensor in zip(targets, state.values(), strict=True):
        assert torch.equal(target, tensor)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("first", "count"), [(0, 1000), (1000, 500), (2500, 500), (1, 1), (2999, 1), (123, 2500)]
)
def test_some_rows(saved: Any, first: int, count: int) -> None:
    store = CountingStore()
    state = {"rows": torch.randn(3000, 2049)}
    metadata = saved(store, state)
    [target] = targets = [torch.zeros(count, 2049)]
    load(store, metadata, [request("rows", 0, (first, 0), (count, 2049))], targets)
    assert torch.equal(target, state["rows"][first : first + count])
    row = 2049 * 4
    assert store.fetched_bytes <= count * row + 2 * (MiB + row) + 4096


def test_what_lies_around_some_rows_is_charged(saved: Any, borrowed: list[Borrowed]) -> None:
    """Blocks are read whole to be verified: up to two of them for each item."""
    store = CountingStore()
    state = {"rows": torch.randn(3000, 2049)}
    metadata = saved(store, state)
    borrowed.clear()
    [target] = targets = [torch.zeros(500, 2049)]
    load(store, metadata, [request("rows", 0, (1003, 0), (500, 2049))], targets)
    assert torch.equal(target, state["rows"][1003:1503])
    around = store.fetched_bytes - target.nbytes
    assert around - 64 * 1024 <= sum(each.size_bytes for each in borrowed) <= around


@pytest.mark.usefixtures("place")
def test_rows_into_other_layouts_and_types(saved: Any) -> None:
    store = CountingStore()
    state = {"rows": torch.randn(2000, 1500)}
    metadata = saved(store, state)
    targets = [
        torch.zeros(1500, 100).t(),  # strided
        torch.zeros(100, 700, dtype=torch.float64),  # another type, some columns
        torch.zeros(50, 1500),
    ]
    requests = [
        request("rows", 0, (100, 0), (100, 1500)),
        request("rows", 1, (150, 300), (100, 700)),
        request("rows", 2, (260, 0), (50, 1500)),
    ]
    load(store, metadata, requests, targets)
    rows = state["rows"]
    assert torch.equal(targets[0], rows[100:200])
    assert torch.equal(targets[1], rows[150:250, 300:1000].double())
    assert torch.equal(targets[2], rows[260:310])
    assert store.fetched_bytes < 4 * MiB  # of 12


def test_a_stored_tensor_is_fetched_once_for_all_who_want_it(saved: Any) -> None:
    store = CountingStore()
    state = {"w": torch.randn(2 * MiB)}
    metadata = saved(store, state)
    targets = [torch.zeros(2 * MiB), torch.zeros(2 * MiB), torch.zeros(MiB)]
    requests = [
        request("w", 0, (0,), (2 * MiB,)),
        request("w", 1, (0,), (2 * MiB,)),
        request("w", 2, (MiB,), (MiB,)),
    ]
    load(store, metadata, requests, targets)
    assert all(torch.equal(t, state["w"][-t.numel() :]) for t in targets)
    assert store.fetched_bytes <= 8 * MiB + 4096


@pytest.mark.usefixtures("place")
def test_a_transposed_tensor(saved: Any) -> None:
    """Its header is as long as a contiguous one's: what landed is found out by what it says."""
    store = CountingStore()
    state = {"t": torch.randn(900, 1700).t(), "channels": torch.randn(4, 64, 64, 64)}
    state["channels"] = state["channels"].to(memory_format=torch.channels_last)
    metadata = saved(store, state)
    targets = [torch.zeros(1700, 900), torch.zeros(4, 64, 64, 64), torch.zeros(100, 900)]
    requests = [
        request("t", 0, (0, 0), (1700, 900)),
        request("channels", 1, (0, 0, 0, 0), (4, 64, 64, 64)),
        request("t", 2, (300, 0), (100, 900)),
    ]
    load(store, metadata, requests[:2], targets)
    load(store, metadata, requests[2:], targets)
    assert torch.equal(targets[0], state["t"])
    assert torch.equal(targets[1], state["channels"])
    assert torch.equal(targets[2], state["t"][300:400])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("rows", [None, (1000, 500)])
@pytest.mark.parametrize("where", [0.34, 0.5])
def test_a_flipped_bit_is_an_error_that_names_the_tensor(
    rows: tuple[int, int] | None, where: float
) -> None:
    store = CountingStore()
    metadata = save(store, {"rows": torch.randn(3000, 2049)})
    [(uri, (body, etag))] = store.objects.items()
    damaged = bytearray(body)
    damaged[int(len(body) * (where if rows is None else 0.4))] ^= 1
    store.objects[uri] = bytes(damaged), etag
    first, count = rows or (0, 3000)
    with pytest.raises(IntegrityError, match=r"rows: bytes \[\d+, \d+\) of s3://bucket/run/__0_0"):
        load(
            store,
            metadata,
            [request("rows", 0, (first, 0), (count, 2049))],
            [torch.zeros(count, 2049)],
        )


def test_a_flipped_bit_in_rows_that_nobody_asked_for_is_not_seen() -> None:
    store = CountingStore()
    metadata = save(store, {"rows": torch.randn(3000, 2049)})
    [(uri, (body, etag))] = store.objects.items()
    damaged = bytearray(body)
    damaged[len(body) - 2000] ^= 1
    store.objects[uri] = bytes(damaged), etag
    load(store, metadata, [request("rows", 0, (0, 0), (100, 2049))], [torch.zeros(100, 2049)])


@pytest.mark.parametrize("size", [100, 100_000, 2 * MiB])
def test_a_small_flip_anywhere_in_a_whole_item(size: int) -> None:
    store = CountingStore()
    metadata = save(store, {"w": torch.ones(size)})
    [(uri, (body, etag))] = store.objects.items()
    for position in (0, len(body) // 2, len(body) - 1):
        damaged = bytearray(body)
        damaged[position] ^= 0x10
        store.objects[uri] = bytes(damaged), etag
        with pytest.raises(IntegrityError):
            load(store, metadata, [request("w", 0, (0,), (size,))], [torch.zeros(size)])


@pytest.mark.parametrize("kib", [257, 1000, 4095, 4096, 9000])
def test_a_plain_tensor_needs_no_buffer(borrowed: list[Borrowed], kib: int) -> None:
    """However many blocks it has. One of other strides does, and has none."""
    store = CountingStore()
    state = {"plain": torch.randn(kib, 256), "turned": torch.randn(256, kib).t()}
    metadata = save(store, state)
    borrowed.clear()
    for number, (name, tensor) in enumerate(state.items()):
        targets = [torch.zeros(kib, 256), torch.zeros(kib, 256)]
        load(store, metadata, [request(name, number, (0, 0), (kib, 256))], targets)
        assert torch.equal(targets[number], tensor)
        assert bool(borrowed) == (name == "turned")


def test_memory_is_bounded_by_the_budget(borrowed: list[Borrowed]) -> None:
    """Targets of another type go through buffers: their sum must stay within the budget."""
    store = CountingStore()
    state = {f"w{n}": torch.full((MiB,), float(n)) for n in range(12)}
    metadata = save(store, state)
    targets = [torch.zeros(MiB, dtype=torch.float64) for _ in state]
    requests = [request(name, n, (0,), (MiB,)) for n, name in enumerate(state)]
    load(store, metadata, requests, targets)
    assert all(torch.equal(t, torch.full_like(t, n)) for n, t in enumerate(targets))
    assert max(each.held_bytes for each in borrowed) <= 10 * MiB


def test_metadata_that_describes_another_tensor() -> None:
    store = CountingStore()
    metadata = save(store, {"w": torch.randn(10, 10)})
    metadata.state_dict_metadata["w"] = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32),
        torch.Size([20, 10]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([20, 10]))],
    )
    with pytest.raises(CorruptMetadataError, match="w: asked for"):
        load(store, metadata, [request("w", 0, (0, 0), (20, 10))], [torch.zeros(20, 10)])


def test_an_item_that_is_placed_nowhere() -> None:
    store = CountingStore()
    metadata = save(store, {"w": torch.randn(10)})
    with pytest.raises(CorruptMetadataError, match="does not say where"):
        load(store, metadata, [request("v", 0, (0,), (10,))], [torch.zeros(10)])


def stored(rows: int, row: int) -> Stored:
    frame = frame_for(torch.uint8, (rows, row))
    assert frame is not None
    return Stored(torch.uint8, (rows, row), frame)


@pytest.mark.parametrize(
    ("first", "count", "block", "expected"),
    [
        (0, 8192, MiB, None),  # all of it
        (0, 1024, MiB, (0, 1)),
        (1023, 2, MiB, (0, 2)),  # widened to both blocks
        (1024, 1024, MiB, (1, 2)),
        (8000, 192, MiB, (7, 8)),
        (0, 7169, MiB, None),  # too little to leave out
        (0, 1024, None, None),  # without blocks it could not be verified
    ],
)
def test_needed_ranges(
    first: int, count: int, block: int | None, expected: tuple[int, int] | None
) -> None:
    item = stored(8192, 1024)
    at = len(item.frame.header)
    crcs = ItemCrcs(
        item=0,
        data_offset=at,
        data_bytes=8 * MiB,
        block_bytes=block,
        blocks=(0,) * (8 if block else 0),
    )
    ranges = needed_ranges(
        [request("w", 0, (first, 0), (count, 1024))], item, crcs, item.frame.length
    )
    if expected is None:
        assert ranges == [(0, item.frame.length)]
    else:
        assert ranges == [(at + expected[0] * MiB, at + expected[1] * MiB)]


def test_needed_ranges_of_a_foreign_item_have_its_header() -> None:
    item = stored(8192, 1024)
    at = len(item.frame.header)
    ranges = needed_ranges([request("w", 0, (5, 0), (1, 1024))], item, None, item.frame.length)
    assert ranges == [(0, at), (at + 5 * 1024, at + 6 * 1024)]


def test_memory_is_shared_not_copied() -> None:
    tensor = torch.zeros(100)
    memory_of(tensor)[:4] = b"\0\0\x80\x3f"
    assert tensor[0] == 1


def test_a_wrong_place_cannot_be_told_from_a_header(saved: Any) -> None:
    """An item whose metadata points into another's bytes is refused, or not taken for it."""
    store = CountingStore()
    state = {"a": torch.zeros(200_000), "b": torch.ones(200_000)}
    metadata = saved(store, state)
    places = metadata.storage_data
    a, b = (places[MetadataIndex(n, [0])] for n in "ab")
    places[MetadataIndex("a", [0])] = _StorageInfo(a.relative_path, a.offset + 8, a.length)
    del b
    with pytest.raises(Exception, match=r".") as caught:
        load(store, metadata, [request("a", 0, (0,), (200_000,))], [torch.zeros(200_000)])
    assert not isinstance(caught.value, AssertionError)


def test_items_of_several_spans_stay_within_the_budget(borrowed: list[Borrowed]) -> None:
    """Spans of equal items must not all be begun before one item is done."""
    config = S3ClientConfig(part_size=5 * MiB, memory_budget_bytes=30 * MiB)
    store = CountingStore()
    state = {f"w{n}": torch.full((3 * MiB + n,), float(n)) for n in range(6)}
    metadata = save(store, state)
    planner = Targets([torch.zeros(3 * MiB + n, dtype=torch.float16) for n in range(6)])
    loading = LoadedItems(
        portal(),
        channel_of(store),
        config,
        planner,  # type: ignore[arg-type]
        _StorageReaderTransforms(),
        max_gap_bytes=0,
    )
    requests = [request(f"w{n}", n, (0,), (3 * MiB + n,)) for n in range(6)]
    loading.read(requests, metadata, BASE)
    assert all(bool((t == n).all()) for n, t in enumerate(planner._tensors))
    assert max(each.held_bytes for each in borrowed) <= 30 * MiB


@pytest.mark.parametrize("rows", [100, 700], ids=["small items", "copies of large ones"])
def test_a_save_of_many_copies_stays_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """What was sent is given back while there is more. What makes one part may come on top."""
    most = 0
    change = Share._change

    def watch(share: Share, size_bytes: int) -> None:
        nonlocal most
        change(share, size_bytes)
        most = max(most, budget().held_bytes)

    monkeypatch.setattr(Share, "_change", watch)
    config = S3ClientConfig(part_size=5 * MiB, memory_budget_bytes=20 * MiB)
    gapped = torch.zeros(rows, 1000)[:, ::2]
    count = 60 * MiB // gapped.nbytes
    save(MemoryStore(), {f"w{n}": gapped for n in range(count)}, config=config)
    assert 10 * MiB < most <= 30 * MiB
    assert budget().held_bytes == 0


def test_a_submission_that_is_interrupted_is_cancelled_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupt comes after the loop has the call, and before the caller has its future."""
    store = CountingStore()
    metadata = save(store, {"w": torch.randn(2 * MiB)})
    here = portal()
    begun, ended = 0, 0

    async def never(*_: object, **__: object) -> ObjectInfo:
        nonlocal begun, ended
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1
        raise AssertionError

    monkeypatch.setattr(store, "get_range", never)
    submit = here._thread.call_soon
    interrupts = iter([KeyboardInterrupt()])

    def interrupted(function: Any) -> None:
        submit(function)
        if (interrupt := next(interrupts, None)) is not None:
            raise interrupt

    monkeypatch.setattr(here._thread, "call_soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(store, metadata, [request("w", 0, (0,), (2 * MiB,))], [torch.zeros(2 * MiB)])
    assert begun == ended
