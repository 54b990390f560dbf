"""Where the bytes of a load land, whether they are right, and what becomes of them.

Bytes land
- in the target itself, when they are the target's: stored rows of its dtype, in order, in
  contiguous CPU memory. What is fetched around them goes to scratch memory;
- in memory of the span that carries them, to be copied on arrival: small items, for which a read
  each costs more than a copy, and targets on a device;
- in a buffer of the item's own otherwise, to be decoded: other dtypes, other strides, other cuts,
  stream extensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.distributed.checkpoint.planner import ReadItem

from s3dcp._checksums import combine, crc_of, damaged
from s3dcp._devices import bytes_of, is_host
from s3dcp._errors import CorruptMetadataError, IntegrityError
from s3dcp._framing import decode, is_plain, memory_of
from s3dcp._items import Item, Stored
from s3dcp._layouts import parse_header
from s3dcp._metadata import ItemCrcs
from s3dcp._staging import COPIED_BYTES, Buffer
from s3dcp._torch_internals import narrow_tensor_by_index

# What lies around a tensor's own bytes, headers say, is charged to the budget if it is more.
_UNCHARGED_BYTES = 64 << 10


def settle_place(item: Item, targets: list[torch.Tensor], take: Callable[[int], Buffer]) -> None:
    """Decide where an item's bytes land, once its targets are known.

    Args:
        item: The item.
        targets: The tensors of its requests.
        take: Hands out a buffer of so many bytes, and charges for it.
    """
    item.targets = targets
    item.exact = _exact_range(item, targets)
    if item.exact is not None and not is_host(targets[0]):
        item.device = bytes_of(targets[0])
    elif item.is_small:
        pass  # the span that carries it gives it a place
    elif item.exact is not None:
        if (spare_bytes := _spare_bytes(item.ranges, item.exact)) > _UNCHARGED_BYTES:
            item.buffer = take(spare_bytes)
        spare = item.buffer.view if item.buffer else memoryview(bytearray(spare_bytes))
        item.places = list(_around(item.ranges, item.exact, memory_of(targets[0]), spare))
    else:
        item.buffer = take(item.missing_bytes)
        item.places = list(_one_after_another(item.ranges, item.buffer.view))


def _exact_range(item: Item, targets: list[torch.Tensor]) -> tuple[int, int] | None:
    """Return which of the item's bytes are, as they are, the one target's memory."""
    stored = item.stored
    if stored is None or len(item.requests) != 1 or len(targets) != 1:
        return None
    if item.crcs is not None and _may_be_transposed(item.crcs, stored):
        return None
    [request], [target] = item.requests, targets
    shape, lengths = stored.shape, tuple(request.lengths)
    if not (
        type(target) is torch.Tensor
        and target.layout is torch.strided
        and target.dtype == stored.dtype
        and is_plain(target)
        and tuple(target.shape) == lengths
        and lengths[1:] == shape[1:]
        and not any(tuple(request.storage_offsets)[1:])
    ):
        return None
    first = request.storage_offsets[0] if shape else 0
    start = len(stored.frame.header) + first * stored.row_bytes
    end = start + target.nbytes
    return (start, end) if target.nbytes and end <= item.info.length else None


def _may_be_transposed(crcs: ItemCrcs, stored: Stored) -> bool:
    """Return whether our own writer stored strides, which is why it made no block of rows."""
    data_bytes = stored.frame.data_bytes
    if crcs.block_bytes is not None or data_bytes < COPIED_BYTES:
        return False
    return stored.row_bytes * 2 < data_bytes and not stored.is_bare


def _around(
    ranges: Sequence[tuple[int, int]],
    exact: tuple[int, int],
    memory: memoryview,
    spare: memoryview,
) -> Iterator[tuple[int, memoryview]]:
    """Yield places for `ranges`: `memory` for the exact range, `spare` for the rest."""
    first, last = exact
    used = 0
    for start, end in ranges:
        before = start, min(end, first)
        inside = max(start, first), min(end, last)
        behind = max(start, last), end
        for a, b in (before, inside, behind):
            if a >= b:
                continue
            if (a, b) == inside:
                yield a, memory[a - first : b - first]
            else:
                yield a, spare[used : used + b - a]
                used += b - a


def _spare_bytes(ranges: Sequence[tuple[int, int]], exact: tuple[int, int]) -> int:
    """Return how many bytes of `ranges` lie outside of the exact range."""
    first, last = exact
    return sum(end - start - max(0, min(end, last) - max(start, first)) for start, end in ranges)


def _one_after_another(
    ranges: Sequence[tuple[int, int]], memory: memoryview
) -> Iterator[tuple[int, memoryview]]:
    used = 0
    for start, end in ranges:
        yield start, memory[used : used + end - start]
        used += end - start


def verify(item: Item, data: memoryview | None) -> None:
    """Check an item's bytes against the CRCs that were saved with it.

    Args:
        item: The item.
        data: All of them; None if their CRCs came with them.

    Raises:
        IntegrityError: they differ.
    """
    crcs = item.crcs
    if crcs is None or not item.info.length:
        return
    if data is not None:
        if crc_of([data]) != crcs.item:
            raise _damaged(item, 0, item.info.length)
        return
    if not item.is_partial:
        found = combine((crc, size) for _, crc, size in sorted(item.sums))
        if found != crcs.item:
            raise _damaged(item, 0, item.info.length)
        return
    if crcs.block_bytes is None or crcs.data_offset is None:
        raise AssertionError("a part without blocks cannot be verified and is not planned")
    blocks: dict[int, list[tuple[int, int, int]]] = {}
    for start, crc, size in item.sums:
        blocks.setdefault((start - crcs.data_offset) // crcs.block_bytes, []).append(
            (start, crc, size)
        )
    for number, sums in blocks.items():
        if combine((crc, size) for _, crc, size in sorted(sums)) != crcs.blocks[number]:
            start = crcs.data_offset + number * crcs.block_bytes
            raise _damaged(item, start, start + sum(size for _, _, size in sums))


def _damaged(item: Item, start: int, end: int) -> IntegrityError:
    return damaged(item.name, item.uri, item.info.offset + start, item.info.offset + end)


def copy_to_device(item: Item, start: int, view: memoryview) -> None:
    """Copy bytes that arrived at `start` to the device."""
    if item.device is None or item.exact is None:
        return
    if start == 0:
        item.header = bytes(view[: item.exact[0]])
    data_at, data_end = item.exact
    first, last = max(start, data_at), min(start + view.nbytes, data_end)
    if first < last:
        source = torch.frombuffer(view[first - start : last - start], dtype=torch.uint8)
        item.device[first - data_at : last - data_at].copy_(source)


def stored_tensor(item: Item, data: memoryview) -> torch.Tensor:
    """Return a whole item's tensor, over `data` itself where its layout is plain.

    Raises:
        IntegrityError: it is none.
    """
    stored = item.stored
    if stored is not None and stored.is_bare:
        return _values_of(data, stored.dtype).view(stored.shape)
    try:
        return tensor_of(data)
    except Exception as exc:  # torch.load fails in every way there is
        first = item.info.offset
        raise IntegrityError(
            f"{item.name}: bytes [{first}, {first + item.info.length}) of {item.uri} hold no "
            f"tensor that torch.load can read ({type(exc).__name__}: {exc}): load an "
            "older checkpoint",
            bucket=item.uri.bucket,
            key=item.uri.key,
        ) from exc


def tensor_of(data: memoryview) -> torch.Tensor:
    """Return the tensor of a whole item, over `data` itself where its layout is plain."""
    layout = parse_header(data, data.nbytes)
    if layout is None:
        return decode(data)
    if not layout.data_bytes:
        return torch.empty(layout.shape, dtype=layout.dtype, device="cpu")
    stored = data[layout.data_offset : layout.data_offset + layout.data_bytes]
    storage = _values_of(stored, layout.dtype)
    return storage.as_strided(layout.shape, layout.stride, layout.storage_offset)


def _values_of(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Return memory as a flat tensor, over the memory itself where it is aligned."""
    if not data.nbytes:
        return torch.empty(0, dtype=dtype, device="cpu")
    values = torch.frombuffer(data, dtype=dtype)
    if values.data_ptr() % dtype.itemsize:
        # Small items start anywhere in their span's memory, and torch crashes on some dtypes
        # (complex128) that do not lie at a multiple of their size.
        values = values.view(torch.uint8).clone().view(dtype)
    return values


def rows_of(item: Item, data: memoryview) -> tuple[torch.Tensor, int]:
    """Return the rows that were fetched of an item, over `data`, and the first one's index."""
    stored = item.stored
    if stored is None:
        raise AssertionError("only items of a known layout are fetched in part")
    start, end = item.ranges[-1]
    first = (start - len(stored.frame.header)) // stored.row_bytes
    count = (end - start) // stored.row_bytes
    rows = torch.frombuffer(data[-(end - start) :], dtype=stored.dtype)
    return rows[: count * math.prod(stored.shape[1:])].view(count, *stored.shape[1:]), first


def copy_request(
    item: Item, request: ReadItem, target: torch.Tensor, stored: torch.Tensor, first_row: int
) -> None:
    """Copy what a request asks for from the item's tensor, or from its rows from `first_row` on.

    Raises:
        CorruptMetadataError: the stored tensor is not of the shape that the metadata says.
    """
    offsets = list(request.storage_offsets)
    if offsets:
        offsets[0] -= first_row
    try:
        part = narrow_tensor_by_index(stored, offsets, request.lengths)
    except (RuntimeError, IndexError) as exc:
        raise _misfit(item, tuple(request.lengths), tuple(stored.shape)) from exc
    if target.size() != part.size():
        raise _misfit(item, tuple(target.shape), tuple(part.shape))
    target.copy_(part)


def _misfit(item: Item, wanted: Sequence[int], stored: Sequence[int]) -> CorruptMetadataError:
    return CorruptMetadataError(
        f"{item.name}: asked for {wanted} of a stored tensor of {stored} in {item.uri}, which its "
        "metadata does not say"
    )
