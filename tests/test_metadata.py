"""A checkpoint's metadata: stock pickles in and out, forged ones refused by name, unexecuted."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import gc
import io
import os
import pathlib
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor import metadata as legacy_metadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as LegacyProperties
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from s3dcp import _metadata, _pickles
from s3dcp._errors import CorruptMetadataError
from s3dcp._metadata import (
    ItemCrcs,
    annotate,
    crcs_of,
    dismantle_metadata,
    dump_metadata,
    load_metadata,
)
from s3dcp._torch_internals import _StorageInfo

SHAPE = torch.Size((4, 2))


def sample(count: int = 2) -> Metadata:
    properties = TensorProperties(
        dtype=torch.bfloat16, layout=torch.sparse_coo, memory_format=torch.channels_last
    )
    entries: dict[str, Any] = {
        f"t{i}": TensorStorageMetadata(
            properties, SHAPE, [ChunkStorageMetadata(torch.Size((0, 0)), SHAPE)]
        )
        for i in range(count)
    }
    places = {
        MetadataIndex(f"t{i}", (0, 0), 0): _StorageInfo("__0_0.distcp", i * 2000, 2000)
        for i in range(count)
    }
    entries["b"] = BytesStorageMetadata()
    places[MetadataIndex("b")] = _StorageInfo("__0_0.distcp", count * 2000, 3)
    return Metadata(
        state_dict_metadata=entries,
        planner_data={"t0": ("t", 0), "b": ("b",)},
        storage_data=places,
        storage_meta=StorageMeta(checkpoint_id="s3://b/k", save_id="x"),
        version="1.0.0",
    )


def load(data: bytes) -> Metadata:
    return load_metadata(data, source="s3://b/.metadata")


def test_round_trip() -> None:
    metadata = sample()
    loaded = load(dump_metadata(metadata))
    assert loaded == metadata
    assert type(loaded) is Metadata
    assert {type(info) for info in loaded.storage_data.values()} == {_StorageInfo}
    # Ranks exchange it by pickling it again.
    assert pickle.loads(pickle.dumps(loaded)) == metadata


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int) -> None:
    assert load(pickle.dumps(sample(), protocol)) == sample()


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_is_found(bit: int) -> None:
    data = dump_metadata(sample(1))
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        with pytest.raises(CorruptMetadataError, match=r"s3://b/\.metadata"):
            load(damaged)


def test_what_is_not_sealed_is_taken() -> None:
    assert load(pickle.dumps(sample())) == sample()
    metadata = sample()
    sealed = dump_metadata(metadata)  # which has equal sizes be one object
    assert sealed.startswith(pickle.dumps(metadata))
    assert len(sealed) < len(pickle.dumps(metadata)) + 30
    assert load_metadata(sealed, source="x", trusted=True) == sample()
    assert pickle.load(io.BytesIO(sealed)) == sample()


def test_python_code_runs_between_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """There other threads take over: an awaiting caller's loop among them."""
    pieces: list[int] = []

    def check() -> None:
        assert sum(pieces) > 5 * max(pieces)
        assert max(pieces) < 100_000
        pieces.clear()

    class Noted(_pickles._Frames):
        def read(self, size: int | None = -1, /) -> bytes:
            pieces.append(len(data := super().read(size)))
            return data

        def write(self, buffer: Any, /) -> int:
            pieces.append(len(buffer))
            return super().write(buffer)

    monkeypatch.setattr(_pickles, "_Frames", Noted)
    data = dump_metadata(sample(5000))
    check()
    load(data)
    check()


def test_what_pickling_made_is_freed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickler that is freed frees it all at once."""
    later: list[list[object]] = []
    monkeypatch.setattr(_pickles, "free_later", later.append)
    metadata = sample(1000)

    dump_metadata(metadata)

    [states] = later
    assert states == [info.__getstate__() for info in metadata.storage_data.values()]


@pytest.mark.parametrize("planner_data", [None, {"model.weight": ("model", "weight")}])
def test_metadata_is_taken_apart(planner_data: dict[str, Any] | None) -> None:
    metadata = dataclasses.replace(sample(), planner_data=planner_data)
    dismantle_metadata(metadata)
    assert not metadata.state_dict_metadata
    assert not metadata.storage_data
    assert not metadata.planner_data


@pytest.mark.parametrize("read", [load, pickle.loads], ids=["ours", "stock"])
def test_equal_sizes_and_properties_are_stored_once(read: Callable[[bytes], Metadata]) -> None:
    metadata = sample(8)
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.size = torch.Size(list(SHAPE))
            entry.chunks[0].sizes = torch.Size(list(SHAPE))
            entry.properties = dataclasses.replace(entry.properties)
    loaded = read(dump_metadata(metadata))
    assert loaded == sample(8)
    tensors = [
        entry
        for entry in loaded.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    ]
    chunks = [chunk for entry in tensors for chunk in entry.chunks]
    offsets = [index.offset for index in loaded.storage_data if index.offset is not None]
    for same in (
        [entry.size for entry in tensors] + [chunk.sizes for chunk in chunks],
        [chunk.offsets for chunk in chunks] + offsets,
        [entry.properties for entry in tensors],
    ):
        assert len(same) >= 8
        assert len(set(map(id, same))) == 1


def test_what_equals_a_size_is_not_taken_for_one() -> None:
    metadata = sample()
    metadata.state_dict_metadata["t0"].size = (2, 3)  # type: ignore[union-attr]
    metadata.state_dict_metadata["other"] = sample().state_dict_metadata["t0"]
    loaded = pickle.loads(dump_metadata(metadata))
    assert type(loaded.state_dict_metadata["t0"].size) is tuple
    assert type(loaded.state_dict_metadata["other"].size) is torch.Size


def test_stock_reads_ours() -> None:
    metadata = sample()
    for info in metadata.storage_data.values():
        annotate(info, ItemCrcs(item=1))
    assert pickle.loads(dump_metadata(metadata)) == metadata


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on saving without process groups
def test_ours_reads_stock(tmp_path: Path) -> None:
    model = {"w": torch.randn(3, 4), "nested": {"list": [torch.ones(2), 5]}, "text": "x"}
    save(model, checkpoint_id=tmp_path, no_dist=True)
    data = (tmp_path / ".metadata").read_bytes()
    loaded, stock = load(data), pickle.loads(data)
    assert loaded.storage_meta is not None
    assert loaded.storage_meta.checkpoint_id == pathlib.PurePosixPath(tmp_path)
    loaded.storage_meta = stock.storage_meta
    assert loaded == stock


def test_checkpoints_of_torch_2_2_and_before() -> None:
    metadata = sample()
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = LegacyProperties(dtype=torch.float16)  # type: ignore[assignment]
    del metadata.__dict__["storage_meta"], metadata.__dict__["version"]
    loaded = load(dump_metadata(metadata))
    assert loaded == metadata
    entry = loaded.state_dict_metadata["t0"]
    assert isinstance(getattr(entry, "properties", None), LegacyProperties)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"])
def test_paths_of_every_python_and_system(module: str, name: str) -> None:
    # Protocol 2 names globals as text, so that a path of another Python can be written.
    path = global_of(module, name) + b"X\x01\0\0\0aX\x01\0\0\0b\x86R"
    data = pickle.dumps(sample(), 2).replace(b"X\x08\0\0\0s3://b/k", path)
    meta = load(data).storage_meta
    assert meta is not None
    expected = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    assert meta.checkpoint_id == expected("a", "b")
    assert type(meta.checkpoint_id) is expected


def test_truncation_at_every_byte() -> None:
    metadata = sample(1)
    data = dump_metadata(metadata)
    pickled = len(pickle.dumps(metadata))
    for length in range(len(data)):
        if length == pickled:
            continue  # as another library writes it
        with pytest.raises(CorruptMetadataError, match=r"s3://b/\.metadata"):
            load(data[:length])


@pytest.mark.parametrize("position", range(0, 600, 3))
def test_damage_is_found_or_harmless(position: int) -> None:
    data = bytearray(pickle.dumps(sample(1)))
    data[position] ^= 0x55
    with contextlib.suppress(CorruptMetadataError):
        load(bytes(data))


@pytest.mark.parametrize("data", [b"", b"\x80", b"<?xml version='1.0'?>", b"PK\3\4", b"\0" * 99])
def test_no_pickle(data: bytes) -> None:
    with pytest.raises(CorruptMetadataError, match="truncated or no checkpoint metadata"):
        load(data)


def forged(**changes: Any) -> Metadata:
    metadata = sample(1)
    for name, value in changes.items():
        setattr(metadata, name, value)
    return metadata


def place(*arguments: Any, **attributes: Any) -> dict[Any, Any]:
    info = _StorageInfo(*(arguments or ("f", 0, 1)))
    vars(info).update(attributes)
    return {MetadataIndex("t0"): info}


def bare(cls: type, **attributes: Any) -> Any:
    made: Any = object.__new__(cls)
    vars(made).update(attributes)
    return made


def entry(**changes: Any) -> dict[str, Any]:
    made = copy.copy(sample(1).state_dict_metadata["t0"])
    vars(made).update(changes)
    return {"t0": made}


CHUNK = bare(ChunkStorageMetadata, offsets=(0,), sizes=SHAPE)


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...], times: int = 1) -> dict[str, Any]:
    return entry(chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))] * times)


@pytest.mark.parametrize(
    ("thing", "problem"),
    [
        (None, "holds a NoneType"),
        ({"a": 1}, "holds a dict"),
        (collections.OrderedDict(), "holds a OrderedDict"),
        (torch.float32, "holds a dtype"),
        (bare(Metadata), "is incomplete"),
        (forged(state_dict_metadata=None), "lists no tensors"),
        (forged(state_dict_metadata={1: BytesStorageMetadata()}), "names an entry by a int"),
        (forged(state_dict_metadata={"t": "x"}), "'t' by a str"),
        (forged(state_dict_metadata=entry(chunks=None)), "describes the tensor 't0'"),
        (forged(state_dict_metadata=entry(chunks=[1])), "describes the tensor 't0'"),
        (forged(state_dict_metadata=entry(chunks=[CHUNK])), "describes the tensor 't0'"),
        *(
            (forged(state_dict_metadata=chunk(*bounds)), "describes the tensor 't0'")
            for bounds in (
                *(((0, 0), (5, 2)), ((1, 0), (4, 2)), ((-1, 0), (4, 2)), ((0, 0), (-1, 2))),
                *(((0, 0), (2**62, 2)), ((4, 0), (-4, 2)), ((0,), (4,)), ((), ()), ((0, 0), (4,))),
            )
        ),
        (forged(state_dict_metadata=entry(chunks=[])), "describes the tensor 't0'"),
        (forged(state_dict_metadata=chunk((0, 0), (4, 2), times=2)), "describes the tensor 't0'"),
        (forged(state_dict_metadata=chunk((3, 1), (1, 1), times=9)), "describes the tensor 't0'"),
        (forged(state_dict_metadata=entry(size=(4, 2))), "describes the tensor 't0'"),
        (forged(state_dict_metadata=entry(properties=torch.float32)), "describes the tensor 't0'"),
        (forged(state_dict_metadata={"t": bare(TensorStorageMetadata)}), "is incomplete"),
        (forged(storage_data=None), "does not say where its items are stored"),
        (forged(storage_data=[]), "does not say where its items are stored"),
        (forged(storage_data={"t0": _StorageInfo("f", 0, 1)}), "stores an item under a str"),
        (forged(storage_data={MetadataIndex("t0"): 5}), "does not say where 't0' is stored"),
        (forged(storage_data=place(b"f", 0, 1)), "does not say where 't0' is stored"),
        (forged(storage_data=place("f", -1, 1)), "does not say where 't0' is stored"),
        (forged(storage_data=place("f", 0, 1.5)), "does not say where 't0' is stored"),
        (forged(storage_data=place("f", True, 1)), "does not say where 't0' is stored"),
        (forged(storage_data=place(transform_descriptors="x")), "does not say where 't0'"),
        (forged(storage_data={MetadataIndex("t0"): bare(_StorageInfo)}), "is incomplete"),
        (forged(storage_meta="x"), "has a str for its storage"),
        (forged(storage_meta=StorageMeta(save_id=[1])), "has a list for its save_id"),  # type: ignore[arg-type]
    ],
)
def test_other_contents(thing: object, problem: str) -> None:
    with pytest.raises(CorruptMetadataError, match=problem) as caught:
        load(pickle.dumps(thing))
    assert "s3://b/.metadata" in str(caught.value)


@pytest.mark.parametrize(
    "honest",
    [
        chunk((1, 0), (2, 2)),  # of a rank that saves by itself
        chunk((4, 2), (0, 0)),  # ... and has nothing of it
        {"t0": TensorStorageMetadata(TensorProperties(), torch.Size((0, 3)), [])},
        entry(
            chunks=[
                ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((1, 2))) for row in range(4)
            ]
        ),
    ],
    ids=["a part", "no part", "no elements", "rows"],
)
def test_what_chunks_may_be(honest: dict[str, Any]) -> None:
    metadata = forged(state_dict_metadata=honest)
    assert load(pickle.dumps(metadata)) == metadata


class Call:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "echo executed"), "(posix|nt).system"),
        (Call(eval, "print('executed')"), "builtins.eval"),
        (Call(exec, "print('executed')"), "builtins.exec"),
        (Call(getattr, torch.Size, "__class__"), "builtins.getattr"),
        (Call(print, "executed"), "builtins.print"),
        (Call(io.open, "/etc/passwd"), "(_io|io).open"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (Call(bytearray, 1 << 50), "builtins.bytearray"),
        (Call(object), "builtins.object"),
        (Call(type, "x", (), {}), "builtins.type"),
    ],
)
@pytest.mark.parametrize("nest", ["alone", "planner_data", "version", "storage_meta"])
def test_hostile_globals(
    call: Call, name: str, nest: str, capfd: pytest.CaptureFixture[str]
) -> None:
    thing = call if nest == "alone" else forged(**{nest: {"deep": [(call,)]}})
    with pytest.raises(CorruptMetadataError, match=name):
        load(pickle.dumps(thing))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    [
        *("Size.__class__", "serialization.os.system", "os", "load", "hub.load", "_C", "Tensor"),
        *("dtype", "strided", "__builtins__", "float32.__class__", "Size.__new__", ""),
    ],
)
def test_attributes_of_torch(name: str) -> None:
    encoded = name.encode()
    data = b"\x80\x04\x8c\x05torch\x8c" + bytes([len(encoded)]) + encoded + b"\x93."
    with pytest.raises(CorruptMetadataError, match=rf"names torch\.{re.escape(name)},"):
        load(data)


def global_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(("module", "name"), _pickles._GLOBALS)
def test_nothing_that_is_admitted_can_be_altered(module: str, name: str) -> None:
    """BUILD sets attributes on whatever it finds on the stack."""
    try:
        real = getattr(__import__(module, fromlist=["x"]), name)
    except (ImportError, AttributeError):  # another Python's pathlib
        real = None
    before = dict(vars(real)) if isinstance(real, type) else {}
    stand_in = _pickles._GLOBALS[module, name]
    for attribute in ("__setstate__", "__reduce_ex__", "__eq__", "offset", "cache"):
        for state in (
            b"}" + short(attribute) + b"K\x01s",  # {attribute: 1} goes into __dict__
            b"N}" + short(attribute) + b"K\x01s\x86",  # (None, {attribute: 1}) through setattr
        ):
            with pytest.raises(CorruptMetadataError):
                load(b"\x80\x04" + global_of(module, name) + state + b"b.")
    if isinstance(real, type):
        assert dict(vars(real)) == before
    if isinstance(stand_in, type):
        assert not any(vars(stand_in).get(name) == 1 for name in ("__eq__", "offset", "cache"))


def test_memory_formats_cannot_be_altered() -> None:
    encoding = global_of(_pickles._METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R"
    for state in (b"}" + short("_value_") + b"K\x02s", b"N}" + short("_value_") + b"K\x02s\x86"):
        with pytest.raises(CorruptMetadataError):
            load(b"\x80\x04" + encoding + state + b"b.")


@pytest.mark.parametrize("module", [torch_metadata, legacy_metadata])
def test_memory_formats_as_some_pythons_pickle_them(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11.0 to 3.11.3, and so Debian 12, has them as attributes of their enum."""
    name = "_MEM_FORMAT_ENCODING" if module is torch_metadata else "MEM_FORMAT_ENCODING"
    encoding = getattr(module, name)

    def reduce(member: Any, _protocol: object) -> object:
        return getattr, (type(member), member.name)

    monkeypatch.setattr(encoding, "__reduce_ex__", reduce)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
        metadata = sample()
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties = module.TensorProperties(memory_format=memory_format)
        pickled = pickle.dumps(metadata)
        assert b"getattr" in pickled
        assert load(pickled) == metadata
    for owner in (torch.Size, Metadata, "x"):
        with pytest.raises(CorruptMetadataError, match=r"builtins\.getattr"):
            load(pickle.dumps(Call(getattr, owner, "__class__")))


def test_trusted_metadata_is_plain_pickle() -> None:
    metadata = forged(planner_data=Call(complex, 1, 2))
    data = pickle.dumps(metadata)
    with pytest.raises(CorruptMetadataError, match=r"builtins\.complex"):
        load(data)
    loaded = load_metadata(data, source="x", trusted=True)
    assert loaded.planner_data == 1 + 2j
    with pytest.raises(CorruptMetadataError, match=r"x holds a dict"):
        load_metadata(pickle.dumps({}), source="x", trusted=True)


def test_memoryviews_are_taken() -> None:
    assert load_metadata(memoryview(dump_metadata(sample())), source="x") == sample()


def test_the_collector_is_left_as_it_was() -> None:
    before = gc.get_threshold()
    load(dump_metadata(sample()))
    with pytest.raises(CorruptMetadataError):
        load(b"")

    assert gc.get_threshold() == before


def test_checking_costs_little_next_to_unpickling() -> None:
    data = dump_metadata(sample(20_000))
    started = time.process_time()
    pickle.loads(data)
    stock = time.process_time() - started
    started = time.process_time()
    load(data)
    assert time.process_time() - started < 3 * stock + 0.2


CRCS = [
    ItemCrcs(item=0),
    ItemCrcs(item=2**64 - 1, data_offset=704, data_bytes=0),
    ItemCrcs(item=5, data_offset=704, data_bytes=100),
    ItemCrcs(item=5, data_offset=704, data_bytes=0, block_bytes=10),
    ItemCrcs(item=5, data_offset=0, data_bytes=25, block_bytes=10, blocks=(1, 2**64 - 1, 0)),
]


@pytest.mark.parametrize("crcs", CRCS)
def test_checksums_travel_in_the_metadata(crcs: ItemCrcs) -> None:
    metadata = sample()
    annotate(metadata.storage_data[MetadataIndex("t1", (0, 0))], crcs)
    loaded = load(dump_metadata(metadata)).storage_data
    assert crcs_of(loaded[MetadataIndex("t1", (0, 0))]) == crcs
    assert crcs_of(loaded[MetadataIndex("t0", (0, 0))]) is None


def test_checksums_take_few_bytes() -> None:
    metadata = sample(100)
    plain = len(dump_metadata(metadata))
    for info in metadata.storage_data.values():
        annotate(info, ItemCrcs(item=2**63, data_offset=704, data_bytes=10**6))
    assert len(dump_metadata(metadata)) - plain < 40 * 101


@pytest.mark.parametrize(
    "fields",
    [
        {"item": -1},
        {"item": 2**64},
        {"item": 1.0},
        {"item": True},
        {"item": 1, "data_offset": 5},
        {"item": 1, "data_bytes": 5},
        {"item": 1, "data_offset": -1, "data_bytes": 5},
        {"item": 1, "block_bytes": 5},
        {"item": 1, "data_offset": 0, "data_bytes": 5, "block_bytes": 0},
        {"item": 1, "data_offset": 0, "data_bytes": 5, "block_bytes": 5},
        {"item": 1, "data_offset": 0, "data_bytes": 5, "block_bytes": 5, "blocks": (1, 2)},
        {"item": 1, "data_offset": 0, "data_bytes": 5, "blocks": (1,)},
        {"item": 1, "blocks": (1,)},
    ],
)
def test_impossible_checksums(fields: dict[str, Any]) -> None:
    info = _StorageInfo("__0_0.distcp", 7, 2000)
    annotate(info, ItemCrcs(**fields))
    with pytest.raises(CorruptMetadataError, match=r"at byte 7 of '__0_0\.distcp' are malformed"):
        crcs_of(info)


@pytest.mark.parametrize(
    "packed",
    [
        *(5, (), "text", (1, 2, 3), [None] * 5),
        (1, None, None, None, "text"),
        (1, None, None, None, None),
        (1, None, None, None, b"\0" * 8),
        (1, 0, 5, 5, b"\0" * 7),
        (1, 0, 5, 5, b"\0" * 9),
        (1, 0, 5, 5, b"\0" * 16),
        ("1", 0, 5, None, b""),
        (1, "0", 5, None, b""),
        (1, 1999, 2, None, b""),
    ],
    ids=str,
)
def test_malformed_checksums(packed: object) -> None:
    info = _StorageInfo("__0_0.distcp", 7, 2000)
    setattr(info, _metadata._CRCS, packed)
    with pytest.raises(CorruptMetadataError, match=r"at byte 7 of '__0_0\.distcp' are malformed"):
        crcs_of(info)
