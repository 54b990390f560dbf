"""The bytes of a tensor's item in a `.distcp` file: header, the tensor's own memory, trailer.

An item is what `torch.save(tensor)` writes: a zip whose one large record holds the tensor's
memory. `torch.save` under `skip_data` writes all of it but that record. What is in front of the
data and behind it depends on dtype, shape, stride, the conj and neg bits and the configured
alignment alone, so it is made once for each of those; a tensor is then sent without being copied
or serialized (`torch.save` costs 70 to 170 us and a copy, a known frame 3 us).

The zip's own CRC-32 of the data record stays 0: `torch.load` does not check it.
"""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import math
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.serialization import config

from s3dcp._checksums import crc_of
from s3dcp._torch_internals import is_zero_tensor, neg_view, pickled_without_memory

_logger = logging.getLogger("s3dcp.framing")

#: What is framed; everything else (quantized, sub-byte, raw bits) is left to `torch.save`.
_DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
    if hasattr(torch, name)
)

# One type for every length, sliced to what is asked for: ctypes makes a new type for each length,
# which takes 48 us. Nothing is read when an array is laid over an address.
_Memory = ctypes.c_ubyte * sys.maxsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What `torch.save` writes in front of a tensor's memory, and behind it."""

    header: bytes = field(repr=False)
    data_bytes: int
    trailer: bytes = field(repr=False)
    header_crc: int = field(init=False)
    trailer_crc: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "header_crc", crc_of([memoryview(self.header)]))
        object.__setattr__(self, "trailer_crc", crc_of([memoryview(self.trailer)]))

    @property
    def length(self) -> int:
        """The item's size in bytes."""
        return len(self.header) + self.data_bytes + len(self.trailer)


def frame_of(tensor: torch.Tensor, alignment: int | None = None) -> Frame | None:
    """Return the frame of a detached CPU tensor, or None if `torch.save` has to write it.

    The tensor is framed as one that owns no more memory than it needs, which is what DCP makes of
    views. None, too, for a tensor with gaps, overlaps or repeated elements: its `clone()` has a
    frame.
    """
    # The layout comes first: sparse and nested tensors raise when they are asked for strides.
    if (
        type(tensor) is not torch.Tensor
        or tensor.layout is not torch.strided
        or not tensor.is_cpu
        or tensor.is_nested
        or is_zero_tensor(tensor)
    ):
        return None
    return _frame(
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        (tensor.is_conj(), tensor.is_neg()),
        alignment or storage_alignment(),
    )


def frame_for(
    dtype: torch.dtype, shape: tuple[int, ...], alignment: int | None = None
) -> Frame | None:
    """Return the frame of a contiguous tensor that does not exist yet."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return _frame(
        dtype, shape, tuple(reversed(stride)), (False, False), alignment or storage_alignment()
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a strided tensor's memory is its values in the order of rows."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return a dense CPU tensor's memory in the order of its addresses, writable and not copied.

    The view keeps the tensor's storage alive.

    Raises:
        ValueError: the tensor is not dense, not on the CPU, or its storage was freed.
    """
    if not tensor.is_cpu or not (
        tensor.is_contiguous() or _is_dense(tensor.shape, tensor.stride())
    ):
        raise ValueError(f"No plain memory behind {_described(tensor)}: clone it to the CPU first")
    size_bytes = tensor.nbytes
    if not size_bytes:
        return memoryview(bytearray())
    address = tensor.data_ptr()
    # FSDP frees parameters by resizing their storage to nothing; there, an address is no memory.
    ends_at = tensor.storage_offset() * tensor.itemsize + size_bytes
    if not address or ends_at > tensor.untyped_storage().nbytes():
        raise ValueError(f"The storage behind {_described(tensor)} was freed")
    memory = _Memory.from_address(address)
    memory.owner = tensor  # type: ignore[attr-defined]  # lives as long as any view of `memory`
    return memoryview(memory)[:size_bytes].cast("B")


def encode(tensor: torch.Tensor) -> memoryview:
    """Return what `torch.save` writes for a tensor that has no frame."""
    sink = io.BytesIO()
    torch.save(tensor, sink)
    return sink.getbuffer()


def decode(item: bytes | bytearray | memoryview) -> torch.Tensor:
    """Load a whole item with `torch.load`, onto the CPU and without its unsafe types.

    Raises:
        Exception: whatever `torch.load` makes of a damaged item.
    """
    loaded = torch.load(_Source(item), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    if not isinstance(loaded, torch.Tensor):
        raise TypeError(f"The item holds a {type(loaded).__name__}, not a tensor")
    return loaded


@functools.lru_cache(maxsize=2048)
def _frame(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    bits: tuple[bool, bool],
    alignment: int,  # noqa: ARG001  # read by torch.save itself; here to tell frames apart
) -> Frame | None:
    if dtype not in _DTYPES or not _is_dense(shape, stride) or not _is_torch_save_understood():
        return None
    return _template(dtype, shape, stride, bits)


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether the elements fill their memory, each in a place of its own."""
    if 0 in shape:
        return True
    step = 1
    for axis_step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue  # its stride is never used, and may be anything
        if axis_step != step:
            return False
        step *= size
    return True


class _Sink:
    """Keeps what is written, and only counts what is skipped."""

    def __init__(self) -> None:
        self.header = bytearray()
        self.trailer = bytearray()
        self.skipped = 0

    def write(self, data: bytes) -> int:
        (self.trailer if self.skipped else self.header).extend(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or self.skipped:
            raise io.UnsupportedOperation("torch.save was expected to skip one record, forwards")
        self.skipped = offset
        return len(self.header) + offset

    def flush(self) -> None:
        pass


def _template(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], bits: tuple[bool, bool]
) -> Frame:
    conj, neg = bits
    like = torch.empty(0, dtype=dtype, device="cpu")
    if conj:
        like = like.conj()
    if neg:
        like = neg_view(like)
    data_bytes = math.prod(shape) * dtype.itemsize
    sink = _Sink()
    with torch.serialization.skip_data():
        # Plain tuples: a torch.Size would be pickled as such.
        template = pickled_without_memory(like, tuple(shape), tuple(stride), data_bytes)
        torch.save(template, sink)  # type: ignore[arg-type]  # all that it needs of a file
    if sink.skipped != data_bytes:
        raise ValueError(f"torch.save skipped {sink.skipped} bytes of a record of {data_bytes}")
    return Frame(header=bytes(sink.header), data_bytes=data_bytes, trailer=bytes(sink.trailer))


@functools.cache
def _is_torch_save_understood() -> bool:
    """Tell whether this torch writes tensors the way frames are made; checked once, on samples."""
    try:
        for dtype, conj in ((torch.float32, False), (torch.complex64, True), (torch.uint16, False)):
            sample = torch.ones((2, 3), dtype=dtype, device="cpu")
            _check_sample(sample.conj() if conj else sample)
    except Exception:
        _logger.warning(
            "torch %s saves tensors in a way that s3dcp does not know: items go through "
            "torch.save, which is slower",
            torch.__version__,
            exc_info=True,
        )
        return False
    return True


def _check_sample(sample: torch.Tensor) -> None:
    bits = (sample.is_conj(), sample.is_neg())
    frame = _template(sample.dtype, sample.shape, sample.stride(), bits)
    item = encode(sample)
    data_at = len(frame.header)
    if (
        item.nbytes != frame.length
        or item[:data_at] != frame.header
        or item[data_at : data_at + frame.data_bytes] != memory_of(sample)
    ):
        raise ValueError(f"torch.save does not write the frame made for {sample.dtype}")


class _Source(io.RawIOBase):
    """A file over memory. Unlike `io.BytesIO`, it copies nothing but what is read."""

    def __init__(self, memory: bytes | bytearray | memoryview) -> None:
        self._memory = memoryview(memory).cast("B")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._memory.nbytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, into: Any, /) -> int:
        piece = self._memory[self._at : self._at + len(into)]
        into[: piece.nbytes] = piece
        self._at += piece.nbytes
        return piece.nbytes


def storage_alignment() -> int:
    """Return what data is aligned to: looked up once for many tensors, as torch takes its time."""
    return getattr(config.save, "storage_alignment", 64)  # fixed before torch made it a setting


def _described(tensor: torch.Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"
