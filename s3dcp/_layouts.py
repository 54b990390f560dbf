"""Where the data lies in a stored item, read from the item's first bytes.

Stored items are not trusted. The parser copies at most `_MAX_HEADER_BYTES`, never allocates or
loops by a number that it read, and runs no code that a pickle names. What it does not know for
certain is None: the caller then reads the whole item and leaves it to `torch.load`.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
import struct
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

#: So many leading bytes hold the header of an item of up to a dozen dimensions.
HEADER_BYTES_HINT = 1024

# Room for records aligned to 4 KiB; what states a larger header is not torch.save's.
_MAX_HEADER_BYTES = 32 << 10
_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 63

_PICKLE, _BYTE_ORDER, _DATA = b"archive/data.pkl", b"archive/byteorder", b"archive/data/0"
# signature, flags, method, packed and real size, lengths of the name and of the extra field
_LOCAL_HEADER = struct.Struct("<4s2xHH8xIIHH")
_DESCRIPTOR = struct.Struct("<4s4xII")
_SIZES_FOLLOW, _UTF_8 = 1 << 3, 1 << 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A stored tensor's shape, and where its storage lies in the item.

    Attributes:
        stride: In elements; the elements need not be in order, nor be next to each other.
        storage_offset: The first element's place in the storage, in elements.
        data_offset: The storage's place in the item, in bytes.
        data_bytes: The storage's size, which is the tensor's own or more.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    data_offset: int
    data_bytes: int


def parse_header(head: bytes | memoryview, item_bytes: int) -> Layout | None:
    """Find a plain tensor's data in an item.

    None for other objects, conjugated and negated tensors (their bytes are not their values),
    tensors with repeated elements, foreign byte order, and a `head` that ends before the data.

    Args:
        head: The item's first bytes, or all of them.
        item_bytes: The item's whole size.
    """
    window = bytes(head[:_MAX_HEADER_BYTES])
    name_at = window.find(_DATA)
    if name_at < _LOCAL_HEADER.size:
        return None
    # The extra field's length stands right before the name. Should this be no header after all,
    # the walk over the records does not end where it claims to.
    ends_at = name_at + len(_DATA) + window[name_at - 2] + (window[name_at - 1] << 8)
    if ends_at > len(window):
        return None
    layout = _layout(window[:ends_at])
    if layout is None or layout.data_offset + layout.data_bytes > item_bytes:
        return None
    return layout


@functools.lru_cache(maxsize=1024)
def _layout(header: bytes) -> Layout | None:
    walked = _walk(header)
    if walked is None:
        return None
    records, stated_bytes = walked
    # Without a mark, torch.load takes the data for little-endian.
    if records.get(_BYTE_ORDER, b"little") != sys.byteorder.encode():
        return None
    tensor = _unpickle(records.get(_PICKLE, b""))
    if tensor is None or not _is_sound(tensor):
        return None
    data_bytes = tensor.storage.size_bytes
    if stated_bytes not in {None, data_bytes}:
        return None
    return Layout(
        dtype=tensor.dtype,
        shape=tensor.shape,
        stride=tensor.stride,
        storage_offset=tensor.offset,
        data_offset=len(header),
        data_bytes=data_bytes,
    )


def _walk(header: bytes) -> tuple[dict[bytes, bytes], int | None] | None:
    """Return the records in front of the data's, by name, and the data's size where it is stated.

    None if the header is anything but uncompressed records and, at its very end, the local
    header of the data record.
    """
    records: dict[bytes, bytes] = {}
    at = 0
    while at + _LOCAL_HEADER.size <= len(header):
        fields = _LOCAL_HEADER.unpack_from(header, at)
        signature, flags, method, packed, size, name_bytes, extra_bytes = fields
        name_at = at + _LOCAL_HEADER.size
        start = name_at + name_bytes + extra_bytes
        if signature != b"PK\3\4" or flags & ~(_SIZES_FOLLOW | _UTF_8) or method or packed != size:
            return None
        name = header[name_at : name_at + name_bytes]
        if name == _DATA:
            stated = None if flags & _SIZES_FOLLOW else size
            return (records, stated) if start == len(header) else None
        stop = _descriptor(header, start) if flags & _SIZES_FOLLOW else start + size
        if stop is None or name in records:
            return None
        records[name] = header[start:stop]
        at = stop + (_DESCRIPTOR.size if flags & _SIZES_FOLLOW else 0)
    return None


def _descriptor(header: bytes, start: int) -> int | None:
    """Return where the record that starts at `start` ends: where its own length is stated."""
    at = header.find(b"PK\7\10", start)
    while 0 <= at <= len(header) - _DESCRIPTOR.size:
        _, packed, size = _DESCRIPTOR.unpack_from(header, at)
        if packed == size == at - start:
            return at
        at = header.find(b"PK\7\10", at + 1)
    return None


class _Storage(NamedTuple):
    dtype: torch.dtype
    size_bytes: int


class _Tensor(NamedTuple):
    """What the pickle says of the tensor, unchecked."""

    dtype: Any
    storage: Any
    offset: Any
    shape: Any
    stride: Any


def _rebuild_tensor_v2(
    storage: Any, offset: object, shape: object, stride: object, *rest: object
) -> _Tensor:
    grad, hooks, *bits = rest
    return _rebuild_tensor_v3(storage, offset, shape, stride, grad, hooks, storage.dtype, *bits)


def _rebuild_tensor_v3(
    storage: Any, offset: object, shape: object, stride: object, *rest: object
) -> _Tensor:
    _grad, _hooks, dtype, *bits = rest
    if any(bits):
        raise pickle.UnpicklingError("a conj or neg bit")
    return _Tensor(dtype, storage, offset, shape, stride)


#: Stand-ins for what data.pkl names: nothing of torch's own is run.
_GLOBALS: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("collections", "OrderedDict"): dict,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexDoubleStorage"): torch.complex128,
    ("torch", "ComplexFloatStorage"): torch.complex64,
    ("torch.storage", "UntypedStorage"): torch.uint8,
} | {
    ("torch", name): getattr(torch, name)
    for name in (
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("uint16", "uint32", "uint64", "complex32"),
    )
    if hasattr(torch, name)
}

# All that torch.save needs for a tensor. What is missing can allocate by a stated number
# (LONG_BINPUT, BINBYTES8, FRAME) or reach into objects (BUILD).
_OPCODES = frozenset(
    (
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "BINPUT", "BINGET"),
        *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE", "NONE"),
        *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_DICT"),
    )
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> object:
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or key != "0" or not _is_count(count):
            raise pickle.UnpicklingError("not the storage of the one data record")
        return _Storage(dtype, count * dtype.itemsize)


def _unpickle(data: bytes) -> _Tensor | None:
    try:
        if not all(opcode.name in _OPCODES for opcode, _, _ in pickletools.genops(data)):
            return None
        tensor = _Unpickler(io.BytesIO(data)).load()
    except Exception:  # noqa: BLE001  # hostile pickles fail in every way there is
        return None
    return tensor if isinstance(tensor, _Tensor) else None


def _is_sound(tensor: _Tensor) -> bool:
    """Tell whether the numbers are numbers and lead nowhere outside of the storage."""
    dtype, storage, offset, shape, stride = tensor
    if not (
        isinstance(dtype, torch.dtype)
        and isinstance(storage, _Storage)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= _MAX_DIMENSIONS
        and all(map(_is_count, (offset, *shape, *stride)))
        and math.prod(max(size, 1) for size in shape) < _MAX_COUNT
        and storage.size_bytes % dtype.itemsize == 0
    ):
        return False
    count = math.prod(shape)
    last = offset - 1
    if count:
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return bool(max(count, last + 1) * dtype.itemsize <= storage.size_bytes)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT
