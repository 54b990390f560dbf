"""A checkpoint's `.metadata`: what s3dcp adds to DCP's, and what it checks of anybody's."""

from __future__ import annotations

import math
import struct
from types import NoneType
from typing import Any, NamedTuple, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from s3dcp._checksums import crc_of
from s3dcp._collector import CollectorPause, dismantle
from s3dcp._errors import CorruptMetadataError
from s3dcp._giving_way import give_way
from s3dcp._pickles import pickled, unpickled
from s3dcp._torch_internals import LegacyTensorProperties, _StorageInfo

# An attribute that stock readers ignore and stock pickling carries along.
_CRCS = "s3dcp_crc64nvme"
_CRC_BYTES = 8
_MAX_CRC = (1 << 8 * _CRC_BYTES) - 1

# Behind the pickle's end, where nobody who unpickles looks: what it is, and the pickle's CRC64NVME.
_SEAL = b"s3dcp crc64nvme"

_PROPERTIES = (TensorProperties, LegacyTensorProperties)


class ItemCrcs(NamedTuple):
    """The checksums (CRC64NVME) of one stored item.

    Attributes:
        item: The CRC of the whole item.
        data_offset: Where the tensor's bytes start in the item.
        data_bytes: How many they are.
        block_bytes: The size of a block of the tensor's bytes; the last block has what is left.
        blocks: The CRC of each block.
    """

    item: int
    data_offset: int | None = None
    data_bytes: int | None = None
    block_bytes: int | None = None
    blocks: tuple[int, ...] = ()


def annotate(info: _StorageInfo, crcs: ItemCrcs) -> None:
    """Attach an item's checksums to its place, as plain values that any pickle reader knows."""
    blocks = struct.pack(f"<{len(crcs.blocks)}Q", *crcs.blocks)
    setattr(info, _CRCS, (crcs.item, crcs.data_offset, crcs.data_bytes, crcs.block_bytes, blocks))


def crcs_of(info: _StorageInfo) -> ItemCrcs | None:
    """Return the checksums attached to an item's place, or None if another library wrote it.

    Raises:
        CorruptMetadataError: the checksums are no such.
    """
    # What is in the instance: a forged pickle cannot put it on the class, but may leave it out.
    packed = vars(info).get(_CRCS)
    if packed is None:
        return None
    try:
        return _unpacked(packed, info.length)
    except (TypeError, ValueError, struct.error) as exc:
        raise CorruptMetadataError(
            f"The checksums of the item at byte {info.offset} of {info.relative_path!r} are "
            f"malformed ({exc}): load an older checkpoint"
        ) from exc


def _unpacked(packed: Any, item_bytes: int) -> ItemCrcs:
    item, data_offset, data_bytes, block_bytes, blocks = packed
    if not isinstance(blocks, bytes):
        raise TypeError(f"blocks in a {type(blocks).__name__}")
    if not _is_count(item) or item > _MAX_CRC:
        raise ValueError("a CRC is not an unsigned number of 64 bits")
    expected = 0
    if data_offset is not None or data_bytes is not None:
        if not (_is_count(data_offset) and _is_count(data_bytes)):
            raise ValueError("the data's offset and size go together, and are not negative")
        if data_offset + data_bytes > item_bytes:
            raise ValueError("the data ends behind the item")
        if block_bytes is not None:
            if not _is_count(block_bytes) or not block_bytes:
                raise ValueError("the size of a block is not a positive number")
            expected = -(-data_bytes // block_bytes)
    elif block_bytes is not None:
        raise ValueError("blocks without data")
    if len(blocks) != expected * _CRC_BYTES:
        raise ValueError(f"{len(blocks)} bytes of blocks, not {expected}")
    crcs = struct.unpack(f"<{expected}Q", blocks) if expected else ()
    return ItemCrcs(item, data_offset, data_bytes, block_bytes, crcs)


def dump_metadata(metadata: Metadata) -> bytes:
    """Pickle a checkpoint's metadata as DCP does, and append its checksum."""
    with CollectorPause():
        _share(metadata)
        data = pickled(metadata)
    return data + _SEAL + _seal_of(data)


def dismantle_metadata(metadata: Metadata) -> None:
    """Free metadata bit by bit, once nobody else has a use for it."""
    dismantle(metadata.storage_data, metadata.state_dict_metadata)
    if isinstance(metadata.planner_data, dict):
        dismantle(metadata.planner_data)


def _share(metadata: Metadata) -> None:
    """Have equal sizes, and equal properties, be one object each.

    A pickle names again what it has named before: half as many objects to write, and to make and
    keep with every load.
    """
    sizes: dict[torch.Size, torch.Size] = {}
    properties: dict[tuple[object, ...], TensorProperties] = {}

    def shared(size: torch.Size) -> torch.Size:
        return sizes.setdefault(size, size) if type(size) is torch.Size else size

    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.size, own = shared(entry.size), entry.properties
            if type(own) is TensorProperties:
                entry.properties = properties.setdefault(tuple(vars(own).values()), own)
            for chunk in entry.chunks:
                chunk.offsets, chunk.sizes = shared(chunk.offsets), shared(chunk.sizes)
    for index in metadata.storage_data:
        if index.offset is not None:  # frozen, but its `__init__` would make one more object
            object.__setattr__(index, "offset", shared(index.offset))


def _seal_of(data: bytes | memoryview) -> bytes:
    return crc_of([memoryview(data)]).to_bytes(_CRC_BYTES, "little")


def _unsealed(data: bytes | bytearray | memoryview, source: str) -> memoryview:
    """Return the pickle, verified if it is sealed. Other libraries' are not."""
    view = memoryview(data)
    inside, seal = view[: -len(_SEAL) - _CRC_BYTES], view[-len(_SEAL) - _CRC_BYTES :]
    if bytes(seal[:-_CRC_BYTES]) != _SEAL:
        return view
    if bytes(seal[-_CRC_BYTES:]) != _seal_of(inside):
        _refuse(source, "differs from what was saved (CRC64NVME)")
    return inside


def load_metadata(
    data: bytes | bytearray | memoryview, *, source: str, trusted: bool = False
) -> Metadata:
    """Unpickle a checkpoint's metadata without running anything that it names.

    Paths in it become pure paths, whatever system and Python wrote them.

    Args:
        data: The whole `.metadata`.
        source: Where it was read, for errors.
        trusted: Use plain pickle, which runs what the pickle says: for metadata that a planner
            of one's own put its own types into, if nobody else can write to the bucket.

    Raises:
        CorruptMetadataError: damaged, truncated, no pickle, another object, or types that are not
            DCP's.
    """
    data = _unsealed(data, source)
    with CollectorPause():
        try:
            metadata = unpickled(data, source=source, trusted=trusted)
        except CorruptMetadataError:
            raise
        except Exception as exc:  # a damaged or forged pickle fails in every way there is
            raise CorruptMetadataError(
                f"{source} is truncated or no checkpoint metadata ({type(exc).__name__}: {exc}): "
                "load an older checkpoint"
            ) from exc
        if not isinstance(metadata, Metadata):
            _refuse(source, f"holds a {type(metadata).__name__}, not a checkpoint's metadata")
        try:
            _check(metadata, source)
        except AttributeError as exc:  # an object without the attributes that its class promises
            raise CorruptMetadataError(
                f"{source} is incomplete ({exc}): load an older checkpoint"
            ) from exc
    return metadata


def _refuse(source: str, problem: str) -> NoReturn:
    raise CorruptMetadataError(f"{source} {problem}: load an older checkpoint")


def _check(metadata: Metadata, source: str) -> None:
    """Check the types that DCP and s3dcp go by; half a second for 200,000 items."""
    _check_entries(metadata.state_dict_metadata, source)
    _check_places(metadata.storage_data, source)
    meta: object = metadata.storage_meta
    if not isinstance(meta, (StorageMeta, NoneType)):
        _refuse(source, f"has a {type(meta).__name__} for its storage")
    save_id: object = None if meta is None else meta.save_id
    if not isinstance(save_id, (str, NoneType)):
        _refuse(source, f"has a {type(save_id).__name__} for its save_id")


def _check_entries(entries: object, source: str) -> None:
    if not isinstance(entries, dict):
        _refuse(source, "lists no tensors")
    for fqn, entry in entries.items():
        give_way()
        if not isinstance(fqn, str):
            _refuse(source, f"names an entry by a {type(fqn).__name__}")
        if isinstance(entry, TensorStorageMetadata):
            if not _is_tensor_entry(entry):
                _refuse(source, f"describes the tensor {fqn!r} in a way that is not DCP's")
        elif not isinstance(entry, BytesStorageMetadata):
            _refuse(source, f"describes {fqn!r} by a {type(entry).__name__}")


def _check_places(places: object, source: str) -> None:
    if not isinstance(places, dict):
        _refuse(source, "does not say where its items are stored")
    for index, info in places.items():
        give_way()
        if not (isinstance(index, MetadataIndex) and _is_a(index.fqn, str)):
            _refuse(source, f"stores an item under a {type(index).__name__}")
        if not (
            isinstance(info, _StorageInfo)
            and _is_a(info.relative_path, str)
            and _is_count(info.offset)
            and _is_count(info.length)
            and (info.transform_descriptors is None or _is_text(info.transform_descriptors))
        ):
            _refuse(source, f"does not say where {index.fqn!r} is stored")


def _is_tensor_entry(entry: Any) -> bool:
    if not (
        isinstance(entry.properties, _PROPERTIES)
        and _is_a(entry.properties.dtype, torch.dtype)
        and isinstance(entry.size, torch.Size)
        and isinstance(entry.chunks, list)
    ):
        return False
    count = 0
    for chunk in entry.chunks:  # a generator for `all` would double the time
        if not (
            isinstance(chunk, ChunkStorageMetadata)
            and _is_a(chunk.offsets, torch.Size)
            and _is_a(chunk.sizes, torch.Size)
            and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
        ):
            return False
        # torch checks it when it saves, and takes its word for it when it loads.
        for start, size, end in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
            if not 0 <= start <= start + size <= end:
                return False
        count += math.prod(chunk.sizes)
    # Ranks that save by themselves describe their own parts alone; but those, and each once.
    whole = math.prod(entry.size)
    return count <= whole and (bool(entry.chunks) or not whole)


def _is_a(value: object, kind: type) -> bool:
    """Ask for a type that an annotation promises, and a forged object need not have."""
    return isinstance(value, kind)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_text(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)
