"""Readers and the writer, over an in-memory object that records its requests."""

from __future__ import annotations

import gc
import io
import logging
import pickle
import random
import threading
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view

from s3dcp._calls import Call
from s3dcp._constructors import (
    DCPOptimizedConstructor,
    DCPS3ReaderConstructorProtocol,
    S3ReaderConstructor,
    S3ReaderConstructorProtocol,
)
from s3dcp._dcp_reader import DCPOptimizedS3Reader, ItemRange
from s3dcp._errors import IncompleteSaveError, IntegrityError, S3ConfigError, S3ProtocolError
from s3dcp._ranged_reader import RangedS3Reader
from s3dcp._readers import S3Reader, SequentialS3Reader
from s3dcp._streams import S3Writer

MB = 1_000_000
DATA = random.Random(0).randbytes(200)


class Chunks:
    """The plain kind of stream: an iterator of chunks, each in the same memory as the last."""

    def __init__(self, data: memoryview, chunk_bytes: int, fail_at: int | None) -> None:
        self.data = data
        self.position = 0
        self.chunk_bytes = chunk_bytes
        self.fail_at = fail_at
        self.closed = False
        self._chunk = bytearray(chunk_bytes)

    def __iter__(self) -> Iterator[memoryview]:
        return self

    def __next__(self) -> memoryview:
        step = self._step(self.chunk_bytes)
        if not step.nbytes:
            raise StopIteration
        self._chunk[: step.nbytes] = step
        return memoryview(self._chunk)[: step.nbytes]

    def close(self) -> None:
        self.closed = True

    def _step(self, size: int) -> memoryview:
        assert not self.closed
        if self.fail_at is not None and self.position + size > self.fail_at:
            # Like a generator: an error first, and then a plain end.
            self.data = self.data[:0]
            self.fail_at = None
            raise S3ProtocolError("scripted")
        step = self.data[self.position :][:size]
        self.position += step.nbytes
        return step


class Direct(Chunks):
    """The better kind: fills the caller's memory, here only half of it at a time."""

    def __next__(self) -> memoryview:
        raise AssertionError("readinto is there to be used")

    def readinto(self, buffer: memoryview) -> int:
        step = self._step(-(-buffer.nbytes // 2))
        buffer[: step.nbytes] = step
        return step.nbytes


class Info:
    def __init__(self, size: int) -> None:
        self.size = size
        self.etag = '"etag"'


class FakeObject:
    """An object in memory."""

    def __init__(
        self, data: bytes | memoryview = DATA, *, chunk_bytes: int = 7, direct: bool = False
    ) -> None:
        self.data = memoryview(data)
        self.chunk_bytes = chunk_bytes
        self.kind = Direct if direct else Chunks
        self.requests: list[tuple[int | None, int | None]] = []
        self.streams: list[Chunks] = []
        self.info_requests = 0
        self.fail_at: list[int | None] = []

    def info(self) -> Info:
        self.info_requests += 1
        return Info(self.data.nbytes)

    def get_stream(self, start: int | None = None, end: int | None = None) -> Chunks:
        self.requests.append((start, end))
        fail_at = self.fail_at.pop(0) if self.fail_at else None
        self.streams.append(self.kind(self.data[start:end], self.chunk_bytes, fail_at))
        return self.streams[-1]

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "bucket": "b",
            "key": "k",
            "get_object_info": self.info,
            "get_stream": self.get_stream,
        }


def sequential(fake: FakeObject) -> SequentialS3Reader:
    # Its chunks are all that it takes: what it reads, it keeps.
    fake.kind = Chunks
    return SequentialS3Reader(**fake.arguments)


def ranged(fake: FakeObject, buffer_size: int | None = None) -> RangedS3Reader:
    return RangedS3Reader(**fake.arguments, buffer_size=buffer_size)


def dcp(
    fake: FakeObject, *ranges: tuple[int, int], max_gap_size: float = 32 << 20
) -> DCPOptimizedS3Reader:
    item_ranges = [ItemRange(*span) for span in ranges]
    return DCPOptimizedS3Reader(
        **fake.arguments, item_ranges=item_ranges, max_gap_size=max_gap_size
    )


def whole_dcp(fake: FakeObject) -> DCPOptimizedS3Reader:
    return dcp(fake, (0, fake.data.nbytes))


READERS: dict[str, Callable[[FakeObject], S3Reader]] = {
    "sequential": sequential,
    "ranged": ranged,
    "ranged, small buffer": partial(ranged, buffer_size=16),
    "ranged, no buffer": partial(ranged, buffer_size=0),
}
every_reader = pytest.mark.parametrize("make", READERS.values(), ids=READERS.keys())
every_kind = pytest.mark.parametrize("direct", [False, True], ids=["chunks", "direct"])


# Readers of whole objects, against io.BytesIO and the reference library.

Operation = tuple[str, Any]

operations = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.none() | st.integers(-1, 60)),
        st.tuples(st.just("readinto"), st.integers(0, 60)),
        st.tuples(st.just("seek"), st.tuples(st.integers(-60, 260), st.just(io.SEEK_SET))),
        st.tuples(st.just("seek"), st.tuples(st.integers(-60, 60), st.just(io.SEEK_CUR))),
        st.tuples(st.just("seek"), st.tuples(st.integers(-260, 60), st.just(io.SEEK_END))),
    ),
    max_size=25,
)


class Clamped(io.BytesIO):
    """The model: a BytesIO that never stands beyond its end."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = (0, self.tell(), self.getbuffer().nbytes)[whence]
        if base + offset < 0:
            raise ValueError
        return super().seek(min(base + offset, self.getbuffer().nbytes))


def perform(stream: Any, operation: Operation) -> object:
    """Return an operation's result and the position after it, or the error's type."""
    name, argument = operation
    try:
        if name == "read":
            return stream.read(argument), stream.tell()
        if name == "readinto":
            buffer = bytearray(argument)
            return stream.readinto(buffer), buffer, stream.tell()
        return stream.seek(*argument), stream.tell()
    except ValueError:
        return ValueError, stream.tell()


@every_reader
@settings(deadline=None)
@given(operations, st.binary(max_size=120), st.integers(1, 30), st.booleans())
def test_a_reader_behaves_like_bytesio(
    make: Callable[[FakeObject], S3Reader],
    sequence: list[Operation],
    data: bytes,
    chunk_bytes: int,
    direct: bool,
) -> None:
    fake = FakeObject(data, chunk_bytes=chunk_bytes, direct=direct)
    model = Clamped(data)
    with make(fake) as reader:
        for operation in sequence:
            assert perform(reader, operation) == perform(model, operation), operation
    assert all(stream.closed for stream in fake.streams)
    assert fake.info_requests <= 1


REFERENCES: dict[str, tuple[Callable[[FakeObject], S3Reader], dict[str, Any]]] = {
    "sequential": (sequential, {}),
    "ranged": (ranged, {"buffer_size": None}),
    "ranged, small buffer": (partial(ranged, buffer_size=16), {"buffer_size": 16}),
    "ranged, no buffer": (partial(ranged, buffer_size=0), {"buffer_size": 0}),
}


@pytest.mark.parametrize("name", REFERENCES)
@settings(deadline=None)
@given(operations, st.binary(max_size=120))
def test_a_reader_behaves_like_the_reference(
    name: str, sequence: list[Operation], data: bytes
) -> None:
    library = pytest.importorskip("s3torchconnector.s3reader")
    make, arguments = REFERENCES[name]
    theirs = library.RangedS3Reader if "ranged" in name else library.SequentialS3Reader
    fake, other = FakeObject(data), FakeObject(data)
    mine, reference = make(fake), theirs(**other.arguments, **arguments)
    for operation in sequence:
        assert perform(mine, operation) == perform(reference, operation), operation
    # Never more requests than theirs, and for the ranged reader the very same.
    assert fake.info_requests <= other.info_requests
    assert len(fake.requests) <= len(other.requests)
    if "ranged" in name:
        assert fake.requests == other.requests


@every_reader
def test_wrong_arguments(make: Callable[[FakeObject], S3Reader]) -> None:
    reader = make(FakeObject())
    with pytest.raises(TypeError):
        reader.read("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.read(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.seek(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.seek(0, "start")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whence"):
        reader.seek(0, 3)
    with pytest.raises(ValueError, match="before"):
        reader.seek(-1)
    with pytest.raises(TypeError):
        reader.readinto(b"abc")
    with pytest.raises(TypeError):
        reader.readinto("abc")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.readinto(memoryview(bytearray(10))[::2])
    assert reader.tell() == 0


@pytest.mark.parametrize("make", [*READERS.values(), whole_dcp])
@every_kind
def test_the_stream_interface(make: Callable[[FakeObject], S3Reader], direct: bool) -> None:
    fake = FakeObject(direct=direct)
    reader = make(fake)
    assert (reader.bucket, reader.key) == ("b", "k")
    assert (reader.readable(), reader.seekable(), reader.writable()) == (True, True, False)
    numbers = array("I", [0] * 10)
    assert reader.readinto(numbers) == 40
    assert numbers.tobytes() == DATA[:40]
    assert reader.readinto(memoryview(bytearray(6)).cast("B", (2, 3))[:0]) == 0
    assert reader.read(0) == b""
    reader.close()
    reader.close()
    assert reader.closed
    for use in (partial(reader.read, 1), partial(reader.readinto, bytearray(1))):
        with pytest.raises(ValueError, match="closed"):
            use()
    with pytest.raises(ValueError, match="closed"):
        reader.seek(0)
    assert all(stream.closed for stream in fake.streams)


@pytest.mark.parametrize("kind", [SequentialS3Reader, RangedS3Reader])
def test_a_reader_needs_a_bucket(kind: type[S3Reader]) -> None:
    arguments = FakeObject().arguments | {"bucket": ""}
    with pytest.raises(S3ConfigError, match="bucket"):
        kind(**arguments)
    gc.collect()


def test_sequential_asks_for_the_object_once_and_for_its_size_only_from_the_end() -> None:
    fake = FakeObject()
    reader = sequential(fake)
    reader.prefetch()
    reader.prefetch()
    assert reader.read() == DATA
    reader.seek(10)
    assert reader.read(5) == DATA[10:15]
    reader.seek(1000)
    assert reader.tell() == 200
    assert fake.info_requests == 0
    assert fake.requests == [(None, None)]
    reader.prefetch()
    assert fake.requests == [(None, None)]


def test_sequential_fetches_no_further_than_it_is_read() -> None:
    fake = FakeObject(chunk_bytes=10)
    reader = sequential(fake)
    reader.read(15)
    assert fake.streams[0].position == 20
    reader.seek(-1, io.SEEK_END)
    reader.seek(30)
    assert fake.streams[0].position == 20


def test_sequential_starts_over_after_an_error() -> None:
    fake = FakeObject(chunk_bytes=10)
    fake.fail_at = [55]
    reader = sequential(fake)
    reader.seek(40)
    with pytest.raises(S3ProtocolError):
        reader.read()
    assert reader.tell() == 40
    assert fake.streams[0].closed
    assert reader.read() == DATA[40:]


def test_sequential_takes_any_iterator() -> None:
    arguments = FakeObject().arguments | {"get_stream": lambda: iter([b"ab", b"", b"c"])}
    with SequentialS3Reader(**arguments) as reader:
        assert reader.read(1) == b"a"
        assert reader.read() == b"bc"


@every_kind
def test_ranged_serves_small_reads_from_one_request(direct: bool) -> None:
    fake = FakeObject(direct=direct)
    reader = ranged(fake, 50)
    reader.seek(20)
    assert [reader.read(10) for _ in range(6)] == [DATA[n : n + 10] for n in range(20, 80, 10)]
    assert fake.requests == [(20, 70), (70, 120)]
    reader.seek(115)
    assert reader.read(70) == DATA[115:185]
    assert fake.requests[2:] == [(120, 185)]


@every_kind
@pytest.mark.parametrize("size", [10, 100])
def test_ranged_never_invents_bytes(size: int, direct: bool) -> None:
    fake = FakeObject(direct=direct)
    arguments = fake.arguments | {"get_object_info": lambda: Info(300)}
    reader = RangedS3Reader(**arguments, buffer_size=64)
    reader.seek(195)
    for _ in range(2):
        with pytest.raises(S3ProtocolError, match="s3://b/k has 300 bytes"):
            reader.read(size)
        assert reader.tell() == 195
    assert all(stream.closed for stream in fake.streams)


# The DCP reader.


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 200)).map(sorted).map(tuple), min_size=1
    ),
    st.sampled_from([0, 1, 10, float("inf")]),
    st.booleans(),
    st.data(),
)
def test_dcp_serves_every_injected_range_in_any_order(
    ranges: list[tuple[int, int]], max_gap_size: float, direct: bool, draw: st.DataObject
) -> None:
    fake = FakeObject(direct=direct)
    injected = {byte for start, end in ranges for byte in range(start, end)}
    with dcp(fake, *ranges, max_gap_size=max_gap_size) as reader:
        for start, end in draw.draw(st.lists(st.sampled_from(ranges), max_size=12)):
            for offset in draw.draw(st.lists(st.integers(start, end), max_size=3)):
                assert reader.seek(offset) == offset
                buffer = bytearray(end - offset)
                assert reader.readinto(buffer) == end - offset
                assert buffer == DATA[offset:end]
            reader.seek(start)
            assert reader.read(end - start) == DATA[start:end]
            assert reader.tell() == end
        start, end = sorted(draw.draw(st.tuples(st.integers(0, 210), st.integers(0, 210))))
        reader.seek(start)
        if injected.issuperset(range(start, end)):
            assert reader.read(end - start) == DATA[start:end]
        else:
            with pytest.raises(ValueError, match=f"Bytes {start}-{end} are not in the injected"):
                reader.read(end - start)
            assert reader.tell() == start
    assert all(stream.closed for stream in fake.streams)
    starts, ends = {start for start, _ in ranges}, {end for _, end in ranges}
    for first, last in fake.requests:
        assert first in starts
        assert last in ends
        assert first is not None
        assert last is not None
        gap = 0
        for byte in range(first, last):
            gap = 0 if byte in injected else gap + 1
            assert gap <= max_gap_size


@pytest.mark.parametrize(
    ("ranges", "max_gap_size", "requests"),
    [
        ([(0, 10)], 0, [(0, 10)]),
        ([(0, 10), (10, 20)], 0, [(0, 20)]),
        ([(0, 10), (11, 20)], 0, [(0, 10), (11, 20)]),
        ([(0, 10), (15, 20), (26, 30)], 5, [(0, 20), (26, 30)]),
        ([(0, 10), (15, 20), (26, 30)], 6, [(0, 30)]),
        ([(0, 10), (0, 10), (5, 12), (40, 40)], 0, [(0, 12)]),
        ([(2, 3), (0, 2), (3, 5)], 1, [(2, 5), (0, 5)]),
        ([(0, 1), (2 * MB, 3 * MB), (6 * MB, 7 * MB)], 1 * MB, None),
        ([(0, 1), (2 * MB, 3 * MB), (6 * MB, 7 * MB)], 32 * MB, [(0, 3 * MB), (6 * MB, 7 * MB)]),
        ([(0, 1), (2 * MB, 3 * MB), (6 * MB, 7 * MB)], float("inf"), [(0, 3 * MB)]),
    ],
)
@every_kind
def test_dcp_merges_ranges_where_the_gap_costs_less_than_a_request(
    ranges: list[tuple[int, int]],
    max_gap_size: float,
    requests: list[tuple[int, int]] | None,
    direct: bool,
) -> None:
    fake = FakeObject(bytes(8 * MB), chunk_bytes=MB, direct=direct)
    reader = dcp(fake, *ranges, max_gap_size=max_gap_size)
    for start, end in ranges:
        reader.seek(start)
        assert len(reader.read(end - start)) == end - start
    expected = ranges if requests is None else requests
    assert fake.requests[: len(expected)] == expected


def test_dcp_fetches_once_what_is_used_again_and_again() -> None:
    fake = FakeObject()
    order = [(150, 160), (0, 50), (150, 160), (60, 70), (0, 50), (60, 70)]
    reader = dcp(fake, *order)
    for start, end in order:
        reader.seek(start)
        assert reader.read(end - start) == DATA[start:end]
    assert fake.requests == [(0, 160)]


def test_dcp_reads_on_past_the_plan() -> None:
    fake = FakeObject()
    reader = dcp(fake, (0, 10), (20, 30), max_gap_size=0)
    for _ in range(2):
        for start in (0, 20):
            reader.seek(start)
            assert reader.read(10) == DATA[start : start + 10]
    assert fake.requests == [(0, 10), (20, 30)] * 2


def test_dcp_goes_on_with_what_it_skipped() -> None:
    fake = FakeObject(bytes(10 * MB), chunk_bytes=MB)
    ranges = [(n * MB, (n + 1) * MB) for n in range(10)]
    reader = dcp(fake, *ranges)
    for n in (0, 6, 3, 9):
        reader.seek(n * MB)
        assert len(reader.read(MB)) == MB
    # The jump from 1 to 6 is too far to read on. A request for 3 fetches 1 and 2 as well, and
    # goes on to 5, as 6 is no longer wanted; the last one picks up what it can reach from 9.
    assert fake.requests == [(0, 10 * MB), (4 * MB, 10 * MB), (1 * MB, 4 * MB), (7 * MB, 10 * MB)]


@every_kind
def test_dcp_starts_a_new_request_after_an_error(direct: bool) -> None:
    fake = FakeObject(direct=direct)
    fake.fail_at = [30]
    reader = dcp(fake, (0, 20), (20, 60), (60, 80))
    assert reader.read(20) == DATA[:20]
    with pytest.raises(S3ProtocolError):
        reader.read(40)
    assert reader.tell() == 20
    assert fake.streams[0].closed
    assert reader.read(60) == DATA[20:80]
    assert fake.requests == [(0, 80), (20, 80)]


@every_kind
@pytest.mark.parametrize("start", [190, 200, 205])
def test_dcp_tells_of_an_object_that_is_too_short(start: int, direct: bool) -> None:
    fake = FakeObject(direct=direct)
    reader = dcp(fake, (180, 185), (start, 220))
    reader.seek(start)
    with pytest.raises(IntegrityError, match=rf"ends at byte 200.*{start}-220"):
        reader.read(5)


def test_dcp_needs_the_memory_of_one_item() -> None:
    fake = FakeObject(bytes(32 << 20), chunk_bytes=1 << 16)
    ranges = [(n << 20, (n + 1) << 20) for n in range(32)]
    reader = dcp(fake, *[item for item in ranges for _ in range(2)])
    buffer = bytearray(1 << 20)
    tracemalloc.start()
    try:
        for start, _ in ranges:
            for _ in range(2):
                reader.seek(start)
                assert reader.readinto(buffer) == 1 << 20
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 << 20
    assert fake.requests == [(0, 32 << 20)]


def test_dcp_refuses_what_it_cannot_serve() -> None:
    reader = dcp(FakeObject(), (10, 20), (50, 60), max_gap_size=0)
    for call in (reader.read, partial(reader.read, -1), partial(reader.seek, 0, io.SEEK_END)):
        with pytest.raises(ValueError, match=r"S3ReaderConstructor\.sequential"):
            call()
    with pytest.raises(TypeError):
        reader.read("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.seek("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.readinto(b"abc")
    with pytest.raises(ValueError, match="before"):
        reader.seek(-1)
    with pytest.raises(ValueError, match="not in the injected"):
        reader.read(1 << 60)
    reader.seek(55)
    with pytest.raises(S3ConfigError, match=r"Bytes 55-65 .* 50-60.*s3://b/k") as caught:
        reader.read(10)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for position, shown in ((5, "10-20"), (15, "10-20, 50-60"), (70, "50-60")):
        reader.seek(position)
        with pytest.raises(ValueError, match=rf"the nearest: {shown}\)"):
            reader.readinto(bytearray(6))


def test_dcp_with_nothing_but_empty_ranges() -> None:
    fake = FakeObject()
    reader = dcp(fake, (5, 5), (0, 0))
    reader.seek(5)
    assert reader.read(0) == b""
    assert reader.readinto(bytearray()) == 0
    with pytest.raises(ValueError, match="all empty"):
        reader.read(1)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bucket": ""}, ValueError),
        ({"key": ""}, ValueError),
        ({"item_ranges": []}, ValueError),
        ({"item_ranges": [ItemRange(3, 2)]}, ValueError),
        ({"item_ranges": [ItemRange(-1, 2)]}, ValueError),
        ({"max_gap_size": -1}, ValueError),
        ({"max_gap_size": float("nan")}, ValueError),
        ({"max_gap_size": "1"}, TypeError),
    ],
)
def test_dcp_refuses_wrong_arguments(change: dict[str, Any], error: type[Exception]) -> None:
    arguments = FakeObject().arguments | {"item_ranges": [ItemRange(0, 1)]}
    with pytest.raises(error):
        DCPOptimizedS3Reader(**(arguments | change))
    gc.collect()


def checkpoint_file() -> tuple[bytes, list[torch.Tensor], list[tuple[int, int]]]:
    file, tensors, ranges = io.BytesIO(), [], []
    for n in range(6):
        start = file.tell()
        tensors.append(torch.arange(1000.0 * n).reshape(n, 1000))
        torch.save(tensors[-1], file)
        ranges.append((start, file.tell()))
    return file.getvalue(), tensors, ranges


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 1, 4], [2, 0, 2]])
@every_kind
def test_torch_loads_items_through_the_dcp_reader(order: list[int], direct: bool) -> None:
    data, tensors, ranges = checkpoint_file()
    fake = FakeObject(data, chunk_bytes=1000, direct=direct)
    with dcp(fake, *[ranges[n] for n in order]) as reader:
        for n in order:
            start, end = ranges[n]
            view: Any = _create_file_view(reader, start, end - start)
            assert torch.equal(torch.load(view, weights_only=True), tensors[n])
    assert len(fake.requests) == 1


@every_reader
def test_torch_loads_through_every_reader(make: Callable[[FakeObject], S3Reader]) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.arange(100)}, file)
    with make(FakeObject(file.getvalue())) as reader:
        stream: Any = reader
        assert torch.equal(torch.load(stream, weights_only=True)["a"], torch.arange(100))


# Constructors.


def read_items(*names: str) -> list[ReadItem]:
    zero = torch.Size([0])
    return [
        ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(name),
            dest_offsets=zero,
            storage_index=MetadataIndex(name),
            storage_offsets=zero,
            lengths=zero,
        )
        for name in names
    ]


STORAGE = {
    MetadataIndex("a"): _StorageInfo("0/__0_0.distcp", 0, 10),
    MetadataIndex("b"): _StorageInfo("0/__0_0.distcp", 50, 10),
    MetadataIndex("c"): _StorageInfo("1/__1_0.distcp", 7, 3),
    MetadataIndex("d"): _StorageInfo("1/__1_0.distcp", 10, 0),
}


@pytest.mark.parametrize("base", ["s3://b/ckpt", "s3://b/ckpt/", PurePosixPath("s3://b/ckpt")])
def test_the_dcp_constructor_hands_out_injected_ranges(base: str | PurePosixPath) -> None:
    constructor = S3ReaderConstructor.dcp_optimized()
    constructor.set_item_ranges_by_file(read_items("a", "b", "c", "d"), STORAGE, base)
    constructor = pickle.loads(pickle.dumps(constructor))
    for _ in range(2):
        fake = FakeObject()
        reader = constructor(**fake.arguments | {"key": "ckpt/0/__0_0.distcp"})
        assert isinstance(reader, DCPOptimizedS3Reader)
        assert reader.read(10) == DATA[:10]
        reader.seek(50)
        assert reader.read(10) == DATA[50:60]
        assert fake.requests == [(0, 60)]
    reader = constructor(**FakeObject().arguments | {"key": "ckpt/1/__1_0.distcp"})
    reader.seek(7)
    assert reader.read(3) == DATA[7:10]
    assert reader.read(0) == b""


def test_the_dcp_constructor_passes_the_gap_size_on() -> None:
    constructor = DCPOptimizedConstructor(max_gap_size=0)
    assert constructor.max_gap_size == 0
    constructor.set_item_ranges_by_file(read_items("a", "b"), STORAGE, "s3://b/p")
    fake = FakeObject()
    reader = constructor(**fake.arguments | {"key": "p/0/__0_0.distcp"})
    reader.read(10)
    assert fake.requests == [(0, 10)]


def test_the_dcp_constructor_reads_metadata_as_a_whole() -> None:
    constructor = S3ReaderConstructor.dcp_optimized()
    for key in ("ckpt/.metadata", "ckpt/__3.metadata"):
        reader = constructor(**FakeObject().arguments | {"key": key})
        assert isinstance(reader, SequentialS3Reader)


def test_the_dcp_constructor_forgets_earlier_plans() -> None:
    constructor = S3ReaderConstructor.dcp_optimized()
    constructor.set_item_ranges_by_file(read_items("a"), STORAGE, "s3://b/ckpt")
    constructor.set_item_ranges_by_file(read_items("c"), STORAGE, "s3://b/ckpt")
    with pytest.raises(S3ConfigError, match=r"s3://b/ckpt/0/__0_0.distcp.*sequential\(\)"):
        constructor(**FakeObject().arguments | {"key": "ckpt/0/__0_0.distcp"})
    constructor.set_item_ranges_by_file([], {}, "s3://b/ckpt")
    with pytest.raises(ValueError, match="No ranges"):
        constructor(**FakeObject().arguments | {"key": "ckpt/1/__1_0.distcp"})
    with pytest.raises(ValueError, match="storage_data"):
        constructor.set_item_ranges_by_file(read_items("a"), {}, "s3://b/ckpt")


@pytest.mark.parametrize(("size", "error"), [(-1, ValueError), ("1", TypeError)])
def test_the_dcp_constructor_refuses_a_wrong_gap(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        S3ReaderConstructor.dcp_optimized(size)


def own_constructor(**arguments: Any) -> S3Reader:
    return SequentialS3Reader(**arguments)


@pytest.mark.parametrize(
    ("constructor", "name", "kind"),
    [
        (S3ReaderConstructor.sequential(), "sequential", SequentialS3Reader),
        (S3ReaderConstructor.default(), "sequential", SequentialS3Reader),
        (partial(SequentialS3Reader), "sequential", SequentialS3Reader),
        (S3ReaderConstructor.range_based(), "range_based", RangedS3Reader),
        (S3ReaderConstructor.range_based(buffer_size=3), "range_based", RangedS3Reader),
        (partial(own_constructor), "unknown", SequentialS3Reader),
        (own_constructor, "unknown", SequentialS3Reader),
    ],
)
def test_constructors(
    constructor: S3ReaderConstructorProtocol, name: str, kind: type[S3Reader]
) -> None:
    assert S3ReaderConstructor.get_reader_type_string(constructor) == name
    assert isinstance(constructor, S3ReaderConstructorProtocol)
    assert not isinstance(constructor, DCPS3ReaderConstructorProtocol)
    for candidate in (constructor, pickle.loads(pickle.dumps(constructor))):
        with candidate(**FakeObject().arguments) as reader:
            assert type(reader) is kind
            assert reader.read() == DATA


def test_the_names_of_the_other_constructors() -> None:
    constructor = S3ReaderConstructor.dcp_optimized(max_gap_size=float("inf"))
    assert isinstance(constructor, DCPS3ReaderConstructorProtocol)
    assert S3ReaderConstructor.get_reader_type_string(constructor) == "dcp_optimized"
    assert S3ReaderConstructor.get_reader_type_string(None) == "sequential"


# The writer.


class Sink:
    """Records what becomes of an upload."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.data = bytearray()
        self.events: list[str] = []
        self.error = error

    def write(self, data: memoryview, /) -> None:
        assert data.readonly
        if self.error is not None:
            raise self.error
        self.data += data

    def close(self) -> None:
        self.events.append("published")

    def abort(self) -> None:
        self.events.append("aborted")


def test_the_writer_publishes_once() -> None:
    sink = Sink()
    with S3Writer(sink) as writer:
        assert writer.write(b"ab") == 2
        assert writer.tell() == 2
        writer.flush()
        assert sink.events == []
        assert (writer.writable(), writer.readable(), writer.seekable()) == (True, False, False)
    assert writer.closed
    assert not writer.writable()
    writer.close()
    writer.abort()
    assert sink.events == ["published"]
    assert sink.data == b"ab"
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"c")


grid = memoryview(bytes(range(12))).cast("B", (3, 4))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", b""),
        (bytearray(b"abc"), b"abc"),
        (array("H", [1, 2]), array("H", [1, 2]).tobytes()),
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(b"abcdef")[::-1], b"fedcba"),
        (grid, bytes(range(12))),
        (grid[:0], b""),
        (torch.arange(3, dtype=torch.int16).numpy(), b"\0\0\1\0\2\0"),
        (torch.arange(4, dtype=torch.uint8).reshape(2, 2).t().numpy(), b"\0\2\1\3"),
    ],
)
def test_the_writer_takes_any_bytes(data: Any, expected: bytes) -> None:
    sink = Sink()
    with S3Writer(sink) as writer:
        assert writer.write(data) == len(expected)
        assert writer.tell() == len(expected)
    assert sink.data == expected


def test_the_writer_takes_no_text() -> None:
    sink = Sink()
    with pytest.raises(TypeError), S3Writer(sink) as writer:
        writer.write("text")  # type: ignore[arg-type]
    assert sink.events == ["aborted"]


def test_the_writer_drops_half_an_object(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    caplog.set_level(logging.INFO)
    with pytest.raises(ZeroDivisionError), S3Writer(sink) as writer:
        fail_after(partial(writer.write, b"a"))
    assert writer.closed
    writer.close()
    assert sink.events == ["aborted"]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "ZeroDivisionError" in caplog.text


def test_an_error_after_close_comes_too_late() -> None:
    sink = Sink()
    with pytest.raises(ZeroDivisionError), S3Writer(sink) as writer:
        fail_after(writer.close)
    assert sink.events == ["published"]


def fail_after(step: Callable[[], object]) -> None:
    step()
    raise ZeroDivisionError


def test_the_writer_does_not_publish_after_a_failed_write() -> None:
    sink = Sink(error=S3ProtocolError("scripted"))
    writer = S3Writer(sink)
    with pytest.raises(S3ProtocolError):
        writer.write(b"a")
    sink.error = None
    writer.write(b"b")
    with pytest.raises(IncompleteSaveError, match="scripted"):
        writer.close()
    writer.close()
    assert sink.events == ["aborted"]


def test_a_failed_publication_is_told_once() -> None:
    class Failing(Sink):
        def close(self) -> None:
            raise S3ProtocolError("scripted")

    writer = S3Writer(Failing())
    with pytest.raises(S3ProtocolError):
        writer.close()
    writer.close()
    assert writer.closed


def test_a_failed_abort_does_not_hide_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Sink):
        def abort(self) -> None:
            raise S3ProtocolError("scripted")

    with pytest.raises(ZeroDivisionError), S3Writer(Failing()):
        raise ZeroDivisionError
    assert "could not be dropped" in caplog.text


@pytest.mark.parametrize("in_cycle", [False, True])
def test_a_forgotten_writer_is_aborted(caplog: pytest.LogCaptureFixture, in_cycle: bool) -> None:
    sink = Sink()
    writer = S3Writer(sink)
    writer.write(b"a")
    if in_cycle:
        writer.me = writer  # type: ignore[attr-defined]
    del writer
    gc.collect()
    assert sink.events == ["aborted"]
    assert "dropped without close()" in caplog.text


def test_a_writer_that_was_never_made_is_no_trouble() -> None:
    with pytest.raises(TypeError):
        S3Writer()  # type: ignore[call-arg]
    gc.collect()


def test_a_second_close_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    publishing, waiting, may_end = threading.Event(), threading.Event(), threading.Event()

    class Slow(Sink):
        def close(self) -> None:
            publishing.set()
            assert may_end.wait(60)
            super().close()

    sink = Slow()
    writer = S3Writer(sink)
    wait = Call.wait

    def spy(call: Call[None], timeout_s: float | None = None) -> bool:
        waiting.set()
        return wait(call, timeout_s)

    monkeypatch.setattr(Call, "wait", spy)
    seen: list[list[str]] = []

    def second() -> None:
        writer.close()
        seen.append(list(sink.events))

    threads = [threading.Thread(target=writer.close), threading.Thread(target=second)]
    threads[0].start()
    assert publishing.wait(60)
    threads[1].start()
    assert waiting.wait(60)
    may_end.set()
    for thread in threads:
        thread.join()
    assert seen == [["published"]]
