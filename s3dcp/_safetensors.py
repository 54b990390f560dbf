"""The safetensors format: eight bytes of length, a JSON header, and the tensors' bare memory.

Headers are not trusted. What one says must fit the file to the byte, as the `safetensors` library
demands it: the tensors lie one behind the other, from the header's end to the file's, and each has
the size of its dtype and shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from s3dcp._errors import CorruptMetadataError, S3ConfigError
from s3dcp._framing import Frame
from s3dcp._torch_internals import _StorageInfo

LENGTH_BYTES = 8
#: The library's own limit.
MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 63
#: The first tensor starts at a multiple of this, and each at one of its dtype's size.
ALIGNMENT = 8
_EXTRA = "__metadata__"

#: The format's names of dtypes. Its types of less than a byte have no counterpart in torch.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "U16": "uint16",
        "I16": "int16",
        "F16": "float16",
        "BF16": "bfloat16",
        "U32": "uint32",
        "I32": "int32",
        "F32": "float32",
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
        "C64": "complex64",
    }.items()
    if hasattr(torch, attribute)
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorMemory(_StorageInfo):
    """Where a tensor's bare memory is stored: unlike other items, with no frame around it.

    Attributes:
        etag: Of the object that its place was read from.
    """

    etag: str | None = None


def bare_frame(data_bytes: int) -> Frame:
    """Return the frame of memory with nothing around it."""
    return Frame(header=b"", data_bytes=data_bytes, trailer=b"")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file, at the file's bytes [start, end)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        """The size of one index of the first dimension; of all, where there is none."""
        rows = self.shape[0] if self.shape else 1
        return (self.end - self.start) // rows if rows else 0


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds.

    Attributes:
        entries: Its tensors, in the order of their places.
        extra: What its writer had to say, `__metadata__`.
        end: Where the header ends, and the first tensor starts.
        file_bytes: The file's size.
    """

    entries: dict[str, Entry]
    extra: dict[str, str]
    end: int
    file_bytes: int


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], extra: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Lay out a file: return its first bytes, up to the first tensor's, and what they say.

    Raises:
        S3ConfigError: a dtype that the format does not have, a name that it reserves, or more
            names than fit in a header.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in _NAMES:
            raise S3ConfigError(
                f"{name}: safetensors files hold no {dtype}; they hold {', '.join(DTYPES)}"
            )
        if name == _EXTRA:
            raise S3ConfigError(f"No tensor in a safetensors file can be called {name!r}")
    position = 0
    places: dict[str, tuple[int, int]] = {}
    # As the library lays them out: the widest dtypes first, so that all are aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        places[name] = position, position + math.prod(shape) * dtype.itemsize
        position = places[name][1]
    described: dict[str, object] = {_EXTRA: dict(extra)} | {
        name: {"dtype": _NAMES[tensors[name][0]], "shape": tensors[name][1], "data_offsets": place}
        for name, place in places.items()
    }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise S3ConfigError(
            f"A safetensors header of {len(text)} bytes is over the limit of {MAX_HEADER_BYTES}: "
            "spread the tensors over more files with fqn_to_index_mapping"
        )
    end = LENGTH_BYTES + len(text)
    entries = {name: Entry(*tensors[name], end + a, end + b) for name, (a, b) in places.items()}
    return struct.pack("<Q", len(text)) + text, Header(entries, dict(extra), end, end + position)


def header_end(head: bytes | bytearray | memoryview, file_bytes: int, *, source: str) -> int:
    """Return where a file's header ends.

    Args:
        head: The file's first bytes, eight or more.
        file_bytes: The file's size.
        source: What errors call it.

    Raises:
        CorruptMetadataError: not in the file, or beyond the format's limit.
    """
    if len(head) < LENGTH_BYTES:
        raise _corrupt(source, f"has {file_bytes} bytes, and no header")
    [size] = struct.unpack_from("<Q", head)
    if size > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise _corrupt(source, f"has {file_bytes} bytes, and claims a header of {size}")
    return LENGTH_BYTES + int(size)


def parse_header(head: bytes | bytearray | memoryview, file_bytes: int, *, source: str) -> Header:
    """Read what a file holds.

    Args:
        head: The file's first bytes, up to the header's end or further.
        file_bytes: The file's size.
        source: What errors call it.

    Raises:
        CorruptMetadataError: the header is malformed, or does not fit the file.
    """
    end = header_end(head, file_bytes, source=source)
    try:
        described = parse_json(bytes(head[LENGTH_BYTES:end]))
        extra = _checked_extra(described.pop(_EXTRA, {}))
        entries = {name: _entry(name, value, end) for name, value in described.items()}
    except (ValueError, RecursionError) as exc:
        raise _corrupt(source, f"has a malformed header: {exc}") from exc
    position = end
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, entry in ordered.items():
        if entry.start != position:
            raise _corrupt(
                source, f"has {name} at byte {entry.start}, where byte {position} was to follow"
            )
        position = entry.end
    if position != file_bytes:
        raise _corrupt(source, f"has {file_bytes} bytes, and its header describes {position}")
    return Header(ordered, extra, end, file_bytes)


def parse_json(text: bytes | bytearray) -> dict[str, Any]:
    """Parse a JSON object in which no name occurs twice.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deep.
    """
    parsed = json.loads(text.decode(), object_pairs_hook=_unique)
    if not isinstance(parsed, dict):
        raise ValueError("not an object")  # noqa: TRY004 - of the text, not of a caller's type
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def is_count(value: object) -> TypeGuard[int]:
    """Tell whether parsed JSON is a size or an offset."""
    return type(value) is int and 0 <= value < _MAX_COUNT


def _checked_extra(extra: Any) -> dict[str, str]:
    if not isinstance(extra, dict) or not all(isinstance(text, str) for text in extra.values()):
        raise ValueError(f"{_EXTRA} is more than text")
    return extra


def _entry(name: str, value: object, base: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
            pass
        case _:
            raise ValueError(f"{name} has no dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"{name} is of an unknown dtype, {dtype[:40]!r}")
    if len(shape) > _MAX_DIMENSIONS or not all(map(is_count, (*shape, start, end))):
        raise ValueError(f"the shape or the offsets of {name} are no sizes")
    # Without the zeros too: no product that torch makes of a shape may overflow.
    if math.prod(size or 1 for size in shape) >= _MAX_COUNT:
        raise ValueError(f"{name} has more elements than a tensor can have")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name}, {dtype} of shape {shape}, is given {end - start} bytes")
    return Entry(DTYPES[dtype], tuple(shape), base + start, base + end)


def _corrupt(source: str, what: str) -> CorruptMetadataError:
    return CorruptMetadataError(
        f"{source} {what}: it is truncated, or no safetensors file. Load another checkpoint"
    )
