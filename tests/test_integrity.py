"""A flipped bit, anywhere between the tensor that is saved and the one that is loaded.

It is refused on its way up, or found on the way down: an error that names the tensor, the range
and the key. It is never a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from s3dcp import (
    CorruptMetadataError,
    IntegrityError,
    S3ClientConfig,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
    ServerError,
)
from s3dcp._metadata import ItemCrcs, crcs_of
from s3dcp.testing import FakeS3, FlipByte
from tests._fakes import BUCKET, addressed
from tests._states import CutPlanner, MiB, StateDict, assert_same, blank, blank_turned, fill

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")


#: One of each way that an item goes: in blocks, in one piece, copied, by torch.save, as a pickle.
STATE: StateDict = {
    "blocks": fill((5, MiB // 4), seed=1),
    "one_piece": fill((3, 100_000), torch.int8, seed=2),
    "turned": fill((700, 300), seed=3).t(),
    "small": fill((7, 5), torch.float64, seed=4),
    "torch_saved": fill((9, 16), torch.float4_e2m1fn_x2, seed=5),
    "torch_saved_large": fill((600, 512), torch.float4_e2m1fn_x2, seed=6),
    "pickled": {"step": 7, "text": "x" * 100},
}
NAMES = [*(name for name in STATE if name != "pickled"), "pickled.step", "pickled.text"]

READERS: dict[str, Callable[[], Any]] = {
    "dcp_optimized": S3ReaderConstructor.dcp_optimized,
    "sequential": S3ReaderConstructor.sequential,
    "range_based": S3ReaderConstructor.range_based,
    "range_based, no buffer": lambda: S3ReaderConstructor.range_based(0),
}


@pytest.fixture
def fake(fake: FakeS3) -> Iterator[FakeS3]:
    """The module's, on which no upload is left behind."""
    yield fake
    assert fake.uploads(BUCKET) == {}


def save(state: StateDict, config: S3ClientConfig | None = None, path: str = "run") -> None:
    writer = S3StorageWriter(None, f"s3://{BUCKET}/{path}", config)
    dcp.save(state, storage_writer=writer, no_dist=True)


def load(
    state: StateDict,
    constructor: Any = None,
    planner: DefaultLoadPlanner | None = None,
    path: str = "run",
) -> None:
    reader = S3StorageReader(None, f"s3://{BUCKET}/{path}", None, constructor)
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)


@dataclass(frozen=True)
class Item:
    """Where an item lies, and which of its bytes are edges of something."""

    name: str
    key: str
    offset: int
    length: int
    crcs: ItemCrcs

    def edges(self) -> list[int]:
        """Offsets into the item: the first and last byte of header, data, blocks and trailer."""
        crcs = self.crcs
        ends = {0, self.length // 2, self.length}
        if crcs.data_offset is not None and crcs.data_bytes is not None:
            ends |= {crcs.data_offset, crcs.data_offset + crcs.data_bytes}
            if crcs.block_bytes is not None:
                edges = range(0, crcs.data_bytes, crcs.block_bytes)
                ends |= {crcs.data_offset + edge for edge in edges}
        around = {edge - 1 for edge in ends} | ends
        return sorted(at for at in around if 0 <= at < self.length)


def items() -> dict[str, Item]:
    """Return the saved items by name."""
    reader = S3StorageReader(None, f"s3://{BUCKET}/run")
    found = {}
    for index, info in reader.read_metadata().storage_data.items():
        crcs = crcs_of(info)
        assert crcs is not None
        key = f"run/{info.relative_path}"
        found[index.fqn] = Item(index.fqn, key, info.offset, info.length, crcs)
    return found


class Flipped:
    """An object with one bit of one byte flipped, until the end of the block."""

    def __init__(self, fake: FakeS3, item: Item, at: int, bit: int = 0) -> None:
        self._fake, self._key = fake, item.key
        self._body = fake.read(BUCKET, item.key)
        damaged = bytearray(self._body)
        damaged[item.offset + at] ^= 1 << bit
        fake.write(BUCKET, item.key, bytes(damaged))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._fake.write(BUCKET, self._key, self._body)


def named(name: str, value: Any) -> StateDict:
    """Return the part of a state dict that an item is."""
    outer, _, inner = name.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


def value_of(name: str) -> Any:
    outer, _, inner = name.partition(".")
    return STATE[outer][inner] if inner else STATE[outer]


def integrity_error(call: Callable[[], Any]) -> IntegrityError:
    with pytest.raises(CheckpointException) as caught:
        call()
    [(error, _)] = caught.value.failures.values()
    assert isinstance(error, IntegrityError), repr(error)
    return error


def check_names(error: IntegrityError, item: Item, at: int) -> None:
    """Check that an error names the tensor, the key, and a range that holds the damaged byte."""
    text = str(error)
    name, _, rest = text.partition(": bytes [")
    first, last = (int(number) for number in rest.partition(")")[0].split(", "))
    assert name == item.name
    assert first <= item.offset + at < last
    assert f"s3://{BUCKET}/{item.key}" in text
    assert (error.bucket, error.key) == (BUCKET, item.key)


class TestAtRest:
    @pytest.fixture(autouse=True)
    def _saved(self, fake: FakeS3) -> None:
        save(STATE)
        assert set(items()) == set(NAMES)
        assert items()["blocks"].crcs.block_bytes == MiB

    @pytest.mark.parametrize("reader", READERS)
    def test_every_edge_of_every_item(self, fake: FakeS3, reader: str) -> None:
        for item in items().values():
            for number, at in enumerate(item.edges()):
                target = named(item.name, blank(value_of(item.name)))
                with Flipped(fake, item, at, bit=number % 8):
                    error = integrity_error(
                        lambda into=target: load(into, READERS[reader]())  # type: ignore[misc]
                    )
                check_names(error, item, at)
        found = blank(STATE)
        load(found, READERS[reader]())
        assert_same(found, STATE)

    @pytest.mark.parametrize("name", ["blocks", "one_piece", "turned", "small"])
    def test_into_targets_of_another_kind(self, fake: FakeS3, name: str) -> None:
        """Those whose bytes are not the stored ones: buffered, decoded and copied."""
        item, value = items()[name], value_of(name)
        targets = {
            "dtype": lambda: torch.zeros(value.shape, dtype=torch.float16),
            "strides": lambda: blank_turned(value),
        }
        for make in targets.values():
            for at in item.edges():
                with Flipped(fake, item, at, bit=5):
                    error = integrity_error(lambda make=make: load({name: make()}))  # type: ignore[misc]
                check_names(error, item, at)

    @pytest.mark.parametrize("reader", READERS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_parts(self, fake: FakeS3, reader: str, dtype: torch.dtype) -> None:
        """One row of five: its own damage is found, and that of others is not in the way."""
        item = items()["blocks"]
        crcs = item.crcs
        assert crcs.data_offset is not None
        row = range(crcs.data_offset + 2 * MiB, crcs.data_offset + 3 * MiB)
        expected = STATE["blocks"][2:3].to(dtype)
        for at in item.edges():
            target = {"blocks": torch.zeros(5, MiB // 4, dtype=dtype)}
            planner = CutPlanner((0.4, 0.6))
            with Flipped(fake, item, at, bit=7):
                if at in row or reader != "dcp_optimized":
                    error = integrity_error(
                        lambda into=target, planner=planner: load(  # type: ignore[misc]
                            into, READERS[reader](), planner
                        )
                    )
                    check_names(error, item, at)
                else:
                    load(target, READERS[reader](), planner)
                    assert_same(target["blocks"][2:3], expected)

    def test_every_byte_of_a_small_item(self, fake: FakeS3) -> None:
        """Its zip's header and directory are as much a part of it as its values."""
        item = items()["small"]
        for at in range(0, item.length, 41):
            with Flipped(fake, item, at, bit=at % 8):
                error = integrity_error(lambda: load({"small": blank(STATE["small"])}))
            check_names(error, item, at)

    @pytest.mark.parametrize("reader", READERS)
    def test_a_shorter_object(self, fake: FakeS3, reader: str) -> None:
        """What was cut off cannot be read, and that is an error too."""
        last = max(items().values(), key=lambda item: item.offset)
        body = fake.read(BUCKET, last.key)
        for cut in (1, last.length, len(body)):
            fake.write(BUCKET, last.key, body[:-cut])
            with pytest.raises(CheckpointException):
                load(named(last.name, blank(value_of(last.name))), READERS[reader]())

    def test_items_that_changed_places(self, fake: FakeS3) -> None:
        """Each is whole, and not the one that was saved there."""
        save({"a": fill((64,), seed=1), "b": fill((64,), seed=2)})
        places = items()
        a, b = places["a"], places["b"]
        assert (a.key, a.length) == (b.key, b.length)
        body = bytearray(fake.read(BUCKET, a.key))
        first, second = (slice(x.offset, x.offset + x.length) for x in (a, b))
        body[first], body[second] = body[second], body[first]
        fake.write(BUCKET, a.key, bytes(body))
        error = integrity_error(lambda: load({"a": torch.zeros(64)}))
        check_names(error, a, 0)


class TestOnTheWayDown:
    @pytest.mark.parametrize("reader", READERS)
    def test_it_is_an_error_and_the_next_load_is_right(self, fake: FakeS3, reader: str) -> None:
        save(STATE)
        for name in ("blocks", "small", "torch_saved", "pickled.step"):
            # The generic readers fetch the object, or a buffer's worth of it; whose byte comes
            # first is what the flip is in.
            lone = named(name, value_of(name))
            save(lone, path="lone")
            rule = fake.inject(FlipByte(10), operation="GetObject", key="lone/*.distcp")
            found = blank(lone)
            error = integrity_error(
                lambda found=found: load(found, READERS[reader](), path="lone")  # type: ignore[misc]
            )
            assert str(error).startswith(f"{name}: bytes [0, ")
            assert len(rule.struck) == 1
            load(found, READERS[reader](), path="lone")
            assert_same(found, lone)

    def test_in_the_metadata(self, fake: FakeS3) -> None:
        save({"w": torch.ones(3)})
        size = len(fake.read(BUCKET, "run/.metadata"))
        for at in (*range(0, size, 50), size - 24, size - 23, size - 9, size - 8, size - 1):
            fake.inject(FlipByte(at), operation="GetObject", key="run/.metadata")
            with pytest.raises(CorruptMetadataError, match=r"s3://bkt/run/\.metadata "):
                S3StorageReader(None, f"s3://{BUCKET}/run").read_metadata()

    def test_in_what_is_read_again(self, fake: FakeS3) -> None:
        """A tensor whose layout, with two rows, is not told by its checksums."""
        turned = {"turned": fill((100_000, 2), seed=5).t()}
        save(turned)
        rule = fake.inject(FlipByte(MiB // 2), operation="GetObject", key="*.distcp", skip=1)
        error = integrity_error(lambda: load(blank(turned)))
        assert str(error).startswith("turned: bytes [0, ")
        assert len(rule.struck) == 1

    def test_in_a_part(self, fake: FakeS3) -> None:
        save({"blocks": STATE["blocks"]})
        fake.inject(FlipByte(MiB // 2), operation="GetObject", key="*.distcp")
        target = {"blocks": torch.zeros(5, MiB // 4)}
        error = integrity_error(lambda: load(target, planner=CutPlanner((0.4, 0.6))))
        assert str(error).startswith("blocks: bytes [")


ALGORITHMS = ["CRC64NVME", "CRC32C", "CRC32"]


#: The one part of a small save, and a part of a large one.
REQUESTS = {
    "PutObject": {"w": fill((1000, 50), seed=1), "small": fill((3,), seed=2)},
    "UploadPart": {"w": fill((11, MiB // 4), seed=3)},
}


class TestOnTheWayUp:
    def config(self, checksum: Any, attempts: int = 10) -> S3ClientConfig:
        return S3ClientConfig(
            part_size=5 * MiB, checksum=checksum, max_attempts=attempts, max_connections=2
        )

    @pytest.mark.parametrize("operation", REQUESTS)
    @pytest.mark.parametrize("checksum", ALGORITHMS)
    def test_it_is_refused_and_sent_again(
        self, fake: FakeS3, checksum: Any, operation: str
    ) -> None:
        state = REQUESTS[operation]
        rule = fake.inject(
            FlipByte(1000, upload=True), operation=operation, key="*.distcp", times=2
        )
        save(state, self.config(checksum))
        assert [record.code for record in rule.struck] == ["BadDigest"] * 2
        found = blank(state)
        load(found)
        assert_same(found, state)

    @pytest.mark.parametrize("checksum", ALGORITHMS)
    @pytest.mark.parametrize("operation", REQUESTS)
    def test_one_that_stays_fails_the_save(
        self, fake: FakeS3, checksum: Any, operation: str
    ) -> None:
        fake.inject(FlipByte(1000, upload=True), operation=operation, key="*.distcp", times=None)
        with pytest.raises(CheckpointException) as caught:
            save(REQUESTS[operation], self.config(checksum, attempts=2))
        [(error, _)] = caught.value.failures.values()
        assert isinstance(error, ServerError)
        assert (error.code, error.operation) == ("BadDigest", operation)
        assert fake.keys(BUCKET) == []

    @pytest.mark.parametrize("checksum", ALGORITHMS)
    def test_in_the_commit(self, fake: FakeS3, checksum: Any) -> None:
        rule = fake.inject(FlipByte(100, upload=True), operation="PutObject", key="run/.metadata")
        save(REQUESTS["PutObject"], self.config(checksum))
        assert [record.code for record in rule.struck] == ["BadDigest"]
        found = blank(REQUESTS["PutObject"])
        load(found)
        assert_same(found, REQUESTS["PutObject"])

    def test_in_the_commit_without_a_checksum(self, fake: FakeS3) -> None:
        """What says where everything is has a checksum of its own."""
        fake.inject(FlipByte(100, upload=True), operation="PutObject", key="run/.metadata")
        save(REQUESTS["PutObject"], self.config(None))
        with pytest.raises(CorruptMetadataError, match=r"run/\.metadata differs from what was"):
            S3StorageReader(None, f"s3://{BUCKET}/run").read_metadata()

    @pytest.mark.parametrize("operation", REQUESTS)
    def test_without_a_checksum_it_is_found_on_load(self, fake: FakeS3, operation: str) -> None:
        rule = fake.inject(FlipByte(1000, upload=True), operation=operation, key="*.distcp")
        state = REQUESTS[operation]
        save(state, self.config(None))
        assert [record.code for record in rule.struck] == [None]
        error = integrity_error(lambda: load(blank(state)))
        assert str(error).startswith("w: bytes [0, ")


class TestStoresWithoutChecksums:
    @pytest.mark.parametrize("size", [100, 3 * MiB])
    @pytest.mark.parametrize("checksum", [*ALGORITHMS, None])
    def test_one_warning_and_the_items_own_hold(
        self, caplog: pytest.LogCaptureFixture, checksum: Any, size: int
    ) -> None:
        state = {"w": fill((size,), seed=1), "v": fill((10,), seed=2)}
        with FakeS3(checksums=False) as deaf, addressed(deaf):
            config = S3ClientConfig(
                part_size=5 * MiB, checksum=checksum, conditional_writes=True, max_connections=2
            )
            save(state, config)
            deaf.inject(
                FlipByte(1000, upload=True),
                key="*.distcp",
                where=lambda record: record.operation in {"PutObject", "UploadPart"},
            )
            save(state, config)
            error = integrity_error(lambda: load(blank(state)))
        assert str(error).startswith("w: bytes [0, ")
        ours = [r for r in caplog.records if r.name.startswith("s3dcp.")]
        warnings = [r for r in ours if r.levelno >= logging.WARNING]
        assert [r.name for r in warnings] == (["s3dcp.uploads"] if checksum else [])
        for record in warnings:
            assert f"does not verify {checksum} checksums" in record.getMessage()
            assert repr(BUCKET) in record.getMessage()
