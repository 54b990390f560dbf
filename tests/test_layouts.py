"""Stored headers, honest and hostile: found exactly, or left to `torch.load`, never believed."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import tracemalloc
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3dcp._framing import memory_of
from s3dcp._layouts import HEADER_BYTES_HINT, parse_header


def saved(thing: object, **options: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(thing, sink, **options)
    return sink.getvalue()


TENSOR = torch.arange(6, dtype=torch.float32).reshape(2, 3)
ITEM = saved(TENSOR)


class Call:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


class Place:
    """Pickles as the storage of a tensor, by a persistent id that may be anything."""

    def __init__(self, *pid: object) -> None:
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.pid if isinstance(value, Place) else None


def header_of(pickled: object, *, archive: str = "archive", byteorder: str = "little") -> bytes:
    """Write the records that torch writes in front of the data, with any pickle in the first."""
    if not isinstance(pickled, bytes):
        sink = io.BytesIO()
        Pickler(sink, protocol=2).dump(pickled)
        pickled = sink.getvalue()
    whole = b""
    for name, record in (("data.pkl", pickled), ("byteorder", byteorder.encode()), ("data/0", b"")):
        full = f"{archive}/{name}".encode()
        whole += struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(full), 4)
        whole += full + b"FB\0\0" + record
        if record:
            whole += struct.pack("<4s3I", b"PK\7\10", 0, len(record), len(record))
    return whole


def rebuilt(
    pid: tuple[object, ...] = ("storage", torch.FloatStorage, "0", "cpu", 6),
    offset: object = 0,
    shape: object = (2, 3),
    stride: object = (3, 1),
    *rest: object,
) -> Call:
    hooks: dict[str, object] = collections.OrderedDict()
    return Call(
        torch._utils._rebuild_tensor_v2, Place(*pid), offset, shape, stride, False, hooks, *rest
    )


def test_the_forger_of_these_tests_forges_what_is_accepted() -> None:
    layout = parse_header(header_of(rebuilt()), 1000)
    assert layout is not None
    assert (layout.dtype, layout.shape, layout.stride) == (torch.float32, (2, 3), (3, 1))
    assert layout.data_bytes == 24


def test_views_of_larger_storages() -> None:
    # Written by torch before DCP cloned views, and by other programs.
    base = torch.arange(20, dtype=torch.int16).reshape(4, 5)
    item = saved(base[1:3, 2:])
    layout = parse_header(item, len(item))
    assert layout is not None
    assert (layout.shape, layout.stride, layout.storage_offset) == ((2, 3), (5, 1), 7)
    data = item[layout.data_offset : layout.data_offset + layout.data_bytes]
    flat = torch.frombuffer(bytearray(data), dtype=layout.dtype)
    assert torch.equal(flat.as_strided(layout.shape, layout.stride, 7), base[1:3, 2:])


def test_parameters_and_older_items() -> None:
    for item in (
        saved(TENSOR.clone().requires_grad_()),
        saved(TENSOR, _disable_byteorder_record=True),
    ):
        layout = parse_header(item, len(item))
        assert layout is not None
        assert item[layout.data_offset :].startswith(bytes(memory_of(TENSOR)))


def test_the_hint_holds_for_many_dimensions() -> None:
    item = saved(torch.empty((1,) * 12, dtype=torch.float8_e4m3fn))
    assert parse_header(item[:HEADER_BYTES_HINT], len(item)) is not None


def test_any_buffer_is_taken_and_headers_are_parsed_once() -> None:
    other = ITEM[:704] + b"other data" * 10
    layout = parse_header(ITEM, len(ITEM))
    assert layout is parse_header(memoryview(bytearray(other)), len(ITEM))


@pytest.mark.parametrize("length", range(0, 704, 7))
def test_a_head_that_ends_early(length: int) -> None:
    assert parse_header(ITEM[:length], len(ITEM)) is None


def test_an_item_that_ends_early() -> None:
    assert parse_header(ITEM, 704 + 24) is not None
    assert parse_header(ITEM, 704 + 23) is None
    assert parse_header(ITEM, 0) is None
    assert parse_header(ITEM, -1) is None


@pytest.mark.parametrize(
    "thing",
    [
        {"a": TENSOR},
        [TENSOR],
        TENSOR.to_sparse(),
        torch.nn.Parameter(TENSOR),
        torch.randn(3, dtype=torch.complex64).conj(),
        TENSOR.expand(2, 2, 3),
        torch.empty(3, device="meta"),
        TENSOR.untyped_storage(),
        torch.nn.Linear(2, 2),
        "text",
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_other_objects(thing: object) -> None:
    item = saved(thing)
    assert parse_header(item, len(item)) is None


def test_other_files() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", b"x" * 100)
        target.writestr("archive/data/0", b"x" * 100)
    for item in (
        archive.getvalue(),
        saved(TENSOR, _use_new_zipfile_serialization=False),
        saved(TENSOR, pickle_protocol=4),
        header_of(rebuilt(), archive="other"),
        header_of(rebuilt(), byteorder="big"),
        b"PK\3\4" * 200,
        b"archive/data/0" * 50,
        b"",
    ):
        assert parse_header(item, 1 << 40) is None


FLOATS = torch.FloatStorage


#: None of them is a tensor whose data lies within the item.
FORGED: dict[str, Any] = {
    "offset below": rebuilt(offset=-1),
    "offset behind": rebuilt(offset=1),
    "too large": rebuilt(shape=(2, 4)),
    "negative": rebuilt(shape=(-2, -3)),
    "a list": rebuilt(shape=[2, 3]),
    "a float": rebuilt(shape=(2.0, 3)),
    "a bool": rebuilt(shape=(True, 3)),
    "repeated": rebuilt(shape=(2**40, 2**40), stride=(0, 0)),
    "huge": rebuilt(shape=(10**300, 0)),
    "huge in all": rebuilt(shape=(2**62, 2**62, 0), stride=(1, 1, 1)),
    "broken elements": Call(
        torch._utils._rebuild_tensor_v3,
        Place("storage", torch.UntypedStorage, "0", "cpu", 5),
        *(0, (2,), (1,), False, {}, torch.uint16),
    ),
    "many dimensions": rebuilt(shape=(1,) * 65, stride=(1,) * 65),
    "few strides": rebuilt(stride=(3,)),
    "backwards": rebuilt(stride=(-3, 1)),
    "far strides": rebuilt(stride=(2**62, 1)),
    "negative storage": rebuilt(("storage", FLOATS, "0", "cpu", -6)),
    "huge storage": rebuilt(("storage", FLOATS, "0", "cpu", 2**62)),
    "text for a number": rebuilt(("storage", FLOATS, "0", "cpu", "6")),
    "another record": rebuilt(("storage", FLOATS, "1", "cpu", 6)),
    "conj": rebuilt(("storage", FLOATS, "0", "cpu", 6), 0, (2, 3), (3, 1), {"conj": True}),
    "no storage": rebuilt(("module", FLOATS, "0", "cpu", 6)),
    "no dtype": rebuilt(("storage", collections.OrderedDict, "0", "cpu", 6)),
    "short id": rebuilt(("storage",)),
    "empty id": rebuilt(()),
    "storage alone": Place("storage", FLOATS, "0", "cpu", 6),
    "no arguments": Call(torch._utils._rebuild_tensor_v2),
    "no storage, v2": Call(torch._utils._rebuild_tensor_v2, 1, 0, (), (), False, {}),
    "no storage, v3": Call(torch._utils._rebuild_tensor_v3, 1, 0, (), (), False, {}, torch.uint16),
    "allocation": Call(torch.FloatStorage, 1 << 40),
    "print": Call(print, "executed"),
    "eval": Call(eval, "print('executed')"),
    "getattr": Call(getattr, torch.Tensor, "data_ptr"),
    "a number": b"\x80\x02K\x01.",
    "unfinished": b"\x80\x02K\x01",
    "empty": b"",
    "garbage": b"garbage",
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_forged_pickles(forged: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_header(header_of(forged), 1 << 50) is None
    assert capsys.readouterr().out == ""


#: Opcodes that make the unpickler allocate, or fill, as much as they state.
BOMBS = {
    "LONG_BINPUT": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "BINBYTES8": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "BYTEARRAY8": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "BINUNICODE": b"\x80\x02X\xff\xff\xff\x7fx.",
    "FRAME": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"N.",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_stated_numbers_allocate_nothing(bomb: bytes) -> None:
    item = header_of(bomb)
    tracemalloc.start()
    try:
        assert parse_header(item, 1 << 50) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_endless_headers_are_cut() -> None:
    endless = ITEM[:600] * 100_000
    assert parse_header(endless, 1 << 50) is None
    late = b"\0" * (1 << 20) + ITEM
    assert parse_header(late, len(late)) is None


def check_within(head: bytes, item_bytes: int) -> None:
    layout = parse_header(head, item_bytes)
    if layout is None:
        return
    assert 0 <= layout.data_offset <= layout.data_offset + layout.data_bytes <= item_bytes
    assert layout.data_offset <= len(head)
    last = layout.storage_offset
    if 0 not in layout.shape:
        last += sum((s - 1) * t for s, t in zip(layout.shape, layout.stride, strict=True)) + 1
    assert last * layout.dtype.itemsize <= layout.data_bytes


@given(data=st.data())
@settings(max_examples=1500, deadline=None)
def test_damaged_headers_are_refused_or_stay_within_the_item(data: st.DataObject) -> None:
    head = bytearray(ITEM[:800])
    for _ in range(data.draw(st.integers(1, 4))):
        # The pickle is what there is to hit.
        at = data.draw(st.integers(0, 799) | st.integers(60, 230))
        head[at] = data.draw(st.integers(0, 255))
    check_within(bytes(head), data.draw(st.sampled_from([len(ITEM), 700, 728, 1 << 62])))


@given(cut=st.integers(60, 215), piece=st.binary(max_size=30), drop=st.integers(0, 30))
@settings(max_examples=500, deadline=None)
def test_spliced_pickles(cut: int, piece: bytes, drop: int) -> None:
    pickled = ITEM[64:214]
    spliced = pickled[: cut - 60] + piece + pickled[cut - 60 + drop :]
    check_within(header_of(spliced), 1 << 62)


@given(st.binary(max_size=2000))
def test_noise(noise: bytes) -> None:
    check_within(noise, 1 << 62)
