"""The format itself, against the library that defines it; and headers that lie."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3dcp import CorruptMetadataError, S3ConfigError
from s3dcp._formats import INDEX_NAME, MANIFEST_NAME
from s3dcp._framing import memory_of
from s3dcp._hf_index import (
    Index,
    SavedFile,
    dump_index,
    file_name,
    numbered,
    parse_index,
)
from s3dcp._metadata import ItemCrcs
from s3dcp._safetensors import DTYPES, MAX_HEADER_BYTES, header_end, make_header, parse_header
from tests._boxes import shapes
from tests._states import MiB, assert_same, fill

# The library knows these as names and cannot make tensors of them.
LIBRARY_DTYPES = [dtype for dtype in DTYPES.values() if dtype in safetensors.torch._SIZE]
READABLE_DTYPES = [DTYPES[name] for name in safetensors.torch._TYPES if name in DTYPES]

states = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(READABLE_DTYPES), shapes()),
    max_size=6,
)


def file_of(tensors: dict[str, torch.Tensor], extra: dict[str, str] | None = None) -> bytes:
    head, header = make_header(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, extra or {}
    )
    return head + b"".join(bytes(memory_of(tensors[name])) for name in header.entries)


@given(states, st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
def test_the_library_reads_what_is_laid_out(
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]], extra: dict[str, str]
) -> None:
    tensors = {name: fill(shape, dtype) for name, (dtype, shape) in described.items()}
    found = safetensors.torch.load(file_of(tensors, extra))
    assert_same(dict(sorted(found.items())), dict(sorted(tensors.items())))


@given(states)
def test_what_the_library_writes_is_read(
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    tensors = {name: fill(shape, dtype) for name, (dtype, shape) in described.items()}
    written = safetensors.torch.save(tensors, {"format": "pt"} if tensors else None)
    header = parse_header(written, len(written), source="it")
    assert {name: (e.dtype, e.shape) for name, e in header.entries.items()} == described
    for name, entry in header.entries.items():
        assert written[entry.start : entry.end] == bytes(memory_of(tensors[name]))


def test_files_are_those_of_the_library() -> None:
    """Byte by byte, but for the order in which the header names things."""
    tensors = {
        "a.half": fill((3,), torch.float16, 1),
        "b.long": fill((2, 2), torch.int64, 2),
        "c.byte": fill((5,), torch.uint8, 3),
        "d": fill((), torch.float32, 4),
    }
    ours, theirs = file_of(tensors), safetensors.torch.save(tensors)
    parsed = [parse_header(each, len(each), source="it") for each in (ours, theirs)]
    assert ours[parsed[0].end :] == theirs[parsed[1].end :]
    places = [
        {name: (e.start - header.end, e.end - header.end) for name, e in header.entries.items()}
        for header in parsed
    ]
    assert places[0] == places[1]


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES, ids=str)
def test_every_dtype_of_the_library_has_its_size(dtype: torch.dtype) -> None:
    assert dtype.itemsize == safetensors.torch._SIZE[dtype]


@given(
    st.dictionaries(
        st.text("ab", min_size=1), st.tuples(st.sampled_from(list(DTYPES.values())), shapes())
    )
)
def test_every_tensor_is_aligned(described: dict[str, Any]) -> None:
    _, header = make_header(described, {})
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in header.entries.values())


@pytest.mark.parametrize(
    ("name", "dtype", "says"),
    [("x", torch.complex128, "complex128"), ("__metadata__", torch.int8, "__metadata__")],
)
def test_what_no_file_can_hold(name: str, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(S3ConfigError, match=says):
        make_header({name: (dtype, (2,))}, {})


# Headers that lie.


def file_with(header: Any, data_bytes: int = 8, *, raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a length beyond the file": struct.pack("<Q", 9) + b"{}      ",
    "a length of 2**64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length of 2**63": struct.pack("<Q", 2**63) + b"{}" * 50,
    "not JSON": file_with(None, raw=b"{x}"),
    "not UTF-8": file_with(None, raw=b'{"\xff": 1}'),
    "a list": file_with([]),
    "a number": file_with(3),
    "nested too deep": file_with(None, raw=b"[" * 200_000),
    "an endless number": file_with(None, raw=b'{"w":' + b"9" * 10_000 + b"}"),
    "a name twice": file_with(
        None, 8, raw=(json.dumps(entry())[:-1] + "," + json.dumps(entry())[1:]).encode()
    ),
    "an entry that is none": file_with({"w": 3}),
    "no dtype": file_with({"w": {"shape": [2], "data_offsets": [0, 8]}}),
    "an unknown dtype": file_with(entry(dtype="F33")),
    "a dtype of less than a byte": file_with(entry(dtype="F4", shape=[16])),
    "a dtype that is a list": file_with(entry(dtype=[])),
    "a shape that is a number": file_with(entry(shape=2)),
    "a negative size": file_with(entry(shape=[-2])),
    "a size that is text": file_with(entry(shape=["2"])),
    "a size that is a fraction": file_with(entry(shape=[2.0])),
    "a size that is true": file_with(entry(shape=[True, 2])),
    "sizes beyond 64 bits": file_with(entry(shape=[2**40, 2**40])),
    "sizes beyond 64 bits, and none": file_with(
        entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), 0
    ),
    "too many dimensions": file_with(entry(shape=[1] * 65 + [2])),
    "one offset": file_with(entry(data_offsets=[8])),
    "three offsets": file_with(entry(data_offsets=[0, 8, 8])),
    "a negative offset": file_with(entry(data_offsets=[-8, 0])),
    "offsets in the wrong order": file_with(entry(data_offsets=[8, 0])),
    "offsets beyond the file": file_with(entry(data_offsets=[8, 16])),
    "an end beyond the file": file_with(entry(shape=[4], data_offsets=[0, 16])),
    "fewer bytes than the shape": file_with(entry(data_offsets=[0, 4]), 4),
    "more bytes than the shape": file_with(entry(data_offsets=[0, 12]), 12),
    "bytes that nothing describes": file_with(entry(), 9),
    "a truncated file": file_with(entry(), 7),
    "a hole in front": file_with(entry(data_offsets=[4, 12]), 12),
    "a hole between": file_with(
        entry() | {"v": {"dtype": "U8", "shape": [1], "data_offsets": [9, 10]}}, 10
    ),
    "two in one place": file_with(
        entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8
    ),
    "two that overlap": file_with(
        entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12
    ),
    "metadata that is a list": file_with(entry() | {"__metadata__": []}),
    "metadata that is no text": file_with(entry() | {"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_a_typed_error(case: str) -> None:
    with pytest.raises(CorruptMetadataError, match=r"^the file "):
        parse_header(HOSTILE[case], len(HOSTILE[case]), source="the file")


#: The library lets pass what torch cannot hold, and the last of two of a name.
LENIENT = {
    "a name twice",
    "a dtype of less than a byte",
    "sizes beyond 64 bits, and none",
    "too many dimensions",
}


@pytest.mark.parametrize("case", [case for case in HOSTILE if case not in LENIENT])
def test_the_library_refuses_the_same(case: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(HOSTILE[case])


def test_a_header_over_the_limit_is_not_even_read() -> None:
    head = struct.pack("<Q", MAX_HEADER_BYTES + 1)
    with pytest.raises(CorruptMetadataError, match="claims a header of 100000001"):
        header_end(head, 1 << 40, source="the file")


@given(st.binary(max_size=60), st.integers(0, 1 << 62))
def test_any_bytes_are_read_or_refused(head: bytes, file_bytes: int) -> None:
    for text in (head, struct.pack("<Q", len(head)) + head):
        with suppress(CorruptMetadataError):
            parse_header(text, max(file_bytes, len(text)), source="the file")


@given(st.data())
def test_flipped_headers_are_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(file_of({"a": fill((2, 3)), "b": fill((5,), torch.int8)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        header = parse_header(whole, len(whole), source="it")
    except CorruptMetadataError:
        return
    assert all(
        math.prod(e.shape) * e.dtype.itemsize == e.end - e.start for e in header.entries.values()
    )
    assert sum(e.end - e.start for e in header.entries.values()) == len(whole) - header.end


def test_hostile_headers_take_little_memory() -> None:
    """Nothing is allocated for a size that is stated; what JSON says takes its own, some times."""
    cases = HOSTILE | {"lists": file_with(None, raw=b"[" + b"[]," * (1 << 18) + b"[]]")}
    for name, case in cases.items():
        tracemalloc.start()
        with suppress(CorruptMetadataError):
            parse_header(case, len(case), source="it")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MiB + 40 * len(case), name


# The index.


crcs = st.one_of(
    st.integers(0, 2**64 - 1).map(ItemCrcs),
    st.builds(
        lambda item, block, blocks: ItemCrcs(item, block_bytes=block, blocks=tuple(blocks)),
        st.integers(0, 2**64 - 1),
        st.integers(1, 2**40),
        # A single one would be the item's own.
        st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=5),
    ),
)
saved_files = st.dictionaries(
    st.text(min_size=1),
    st.builds(SavedFile, st.text(), st.dictionaries(st.text(), crcs)),
    max_size=3,
)


@given(
    st.none() | st.dictionaries(st.text(), st.text(min_size=1)), saved_files, st.integers(0, 2**50)
)
def test_an_index_comes_back(
    weight_map: dict[str, str] | None, saved: dict[str, SavedFile], total_bytes: int
) -> None:
    index = Index(weight_map=weight_map, saved=saved, total_bytes=total_bytes)
    assert parse_index(dump_index(index), source=f"s3://b/{index.name}") == index


def test_an_index_of_hugging_face() -> None:
    body = b'{"metadata": {"total_size": 7}, "weight_map": {"a": "x.safetensors", "b": "y"}}'
    index = parse_index(body, source=INDEX_NAME)
    assert index.files == {"x.safetensors", "y"}
    assert not index.saved
    assert parse_index(b'{"weight_map": {}}', source=INDEX_NAME).files == set()


def with_ours(ours: Any) -> bytes:
    return json.dumps({"weight_map": {}, "metadata": {"s3dcp": ours}}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": "x", "a": "y"}}',
        b'{"weight_map": {}, "metadata": 3}',
        with_ours(3),
        with_ours({"x": 3}),
        with_ours({"x": {"save_id": 3, "crc64nvme": {}}}),
        with_ours({"x": {"save_id": "", "crc64nvme": {"a": 3}}}),
        with_ours({"x": {"save_id": "", "crc64nvme": {"a": "0"}}}),
        with_ours({"x": {"save_id": "", "crc64nvme": {"a": ["0" * 16, 0, ""]}}}),
        with_ours({"x": {"save_id": "", "crc64nvme": {"a": ["0" * 16, 1, "AAAA"]}}}),
    ],
)
def test_an_index_that_is_none(body: bytes) -> None:
    with pytest.raises(CorruptMetadataError, match=r"index\.json is malformed"):
        parse_index(body, source=INDEX_NAME)


def test_names_are_torchs() -> None:
    assert file_name(1, 5) == "model-00001-of-00005.safetensors"
    assert file_name(2, 3, 4) == "shard-00004-model-00002-of-00003.safetensors"
    assert Index(weight_map={}, saved={}, total_bytes=0).name == INDEX_NAME
    assert Index(weight_map=None, saved={}, total_bytes=0).name == MANIFEST_NAME


def test_numbers_of_files() -> None:
    assert numbered(["a", "b", "c"], {"c": 1, "a": 3, "b": 1, "d": 9}) == {1: ["b", "c"], 3: ["a"]}
    with pytest.raises(S3ConfigError, match="no file for b"):
        numbered(["a", "b"], {"a": 1})
    for number in (0, -1, True, "1"):
        with pytest.raises(S3ConfigError, match="from 1 on"):
            numbered([], {"a": number})  # type: ignore[dict-item]
