"""A stored item of a load: which of its bytes are wanted, where they land, whether they are right.

Bytes land
- in the target itself, when they are the target's: stored rows of its dtype, in order, in
  contiguous CPU memory. What is fetched around them goes to scratch memory;
- in memory of the span that carries them, to be copied on arrival: small items, for which a read
  each costs more than a copy, and targets on a device;
- in a buffer of the item's own otherwise, to be decoded: other dtypes, other strides, other cuts,
  stream extensions.

When only some rows are wanted, only those are fetched, widened to the edges of checksum blocks.
Where the rows lie is known from the CRC attributes of our own checkpoints. In others it is guessed
from dtype and shape, and the guess is checked against the item's header, which is fetched along;
a wrong one costs a second read of the whole item.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from s3dcp._checksums import combine, crc_of
from s3dcp._errors import CorruptMetadataError, IntegrityError
from s3dcp._framing import Frame, decode, frame_for, memory_of, storage_alignment
from s3dcp._keys import S3Uri, child_key
from s3dcp._layouts import parse_header
from s3dcp._metadata import ItemCrcs, crcs_of
from s3dcp._ranges import cut
from s3dcp._safetensors import TensorMemory, bare_frame
from s3dcp._staging import Buffer, bytes_of, is_host
from s3dcp._torch_internals import _StorageInfo, narrow_tensor_by_index

# Copying less than this is quicker than a read of its own.
_COPIED_BYTES = 256 << 10
# What lies around a tensor's own bytes, headers say, is charged to the budget if it is more.
_UNCHARGED_BYTES = 64 << 10
# Leaving out less than this does not pay for another request.
_LEAST_SAVING_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor's dtype and shape, as the metadata has them, and the frame they imply."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    frame: Frame

    @property
    def is_bare(self) -> bool:
        """Whether the item is the tensor's memory and nothing else, and so in the order of rows."""
        return not self.frame.header

    @property
    def row_bytes(self) -> int:
        """The size of one index of the first dimension; of all, where there is none."""
        rows = self.shape[0] if self.shape else 1
        return self.frame.data_bytes // rows if rows else 0


@dataclass(slots=True, eq=False)
class Item:
    """A stored item, and everyone who wants something of it. Offsets are from the item's start.

    Attributes:
        stored: What the item's bytes should be, if that can be told without reading them.
        ranges: The bytes that are fetched, in order.
        targets: The planner's tensors, one for each request for a tensor.
        places: Where bytes land: for each place its offset and its memory. None: in the span's.
        exact: Which of the item's bytes are the one target's memory, if any are.
        device: That memory, where it is a device's and arriving bytes are copied to it.
        buffer: The item's own memory.
        header: What arrived of the item's first bytes, for an item that lands on a device.
        missing_bytes: Bytes that have not arrived.
        sums: Offset, CRC and length of what has arrived.
    """

    uri: S3Uri
    info: _StorageInfo
    crcs: ItemCrcs | None
    stored: Stored | None
    requests: list[ReadItem] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    targets: list[torch.Tensor] | None = None
    places: list[tuple[int, memoryview]] | None = None
    device: torch.Tensor | None = None
    exact: tuple[int, int] | None = None
    buffer: Buffer | None = None
    header: bytes | None = None
    missing_bytes: int = 0
    sums: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What an error calls it."""
        return self.requests[0].storage_index.fqn

    @property
    def etag(self) -> str | None:
        """The ETag that its object must have, if its place tells."""
        return self.info.etag if isinstance(self.info, TensorMemory) else None

    @property
    def is_small(self) -> bool:
        """Whether it is copied from its span's memory."""
        return self.info.length <= _COPIED_BYTES

    @property
    def is_partial(self) -> bool:
        """Whether only some of its rows are fetched."""
        return self.ranges != [(0, self.info.length)]

    @property
    def lands_in_span(self) -> bool:
        """Whether its bytes land in memory of the span, to be copied."""
        return self.is_small or self.device is not None

    @property
    def is_as_guessed(self) -> bool:
        """Whether bytes that were placed by a guess at the layout were what they were taken for.

        Those placed by the CRC attributes come without a header, and are verified by them.
        """
        if self.stored is None or not (self.exact or self.is_partial):
            return True
        expected = self.stored.frame.header
        header = self.header
        if header is None and self.places and not self.places[0][0]:
            # A copy is quick; views are compared element by element.
            header = bytes(self.places[0][1][: len(expected)])
        return header is None or header[: len(expected)] == expected

    def where(self, start: int, end: int) -> list[memoryview]:
        """Return the memory for the item's bytes [start, end)."""
        views = []
        for offset, memory in self.places or ():
            first, last = max(start - offset, 0), min(end - offset, memory.nbytes)
            if first < last:
                views.append(memory[first:last])
        return views

    def checked(self, start: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Cut what lands at `start` to the pieces whose CRCs are to come with them.

        None of small items, which are checked when they are copied; else one, or blocks.
        """
        crcs = self.crcs
        if crcs is None or self.is_small:
            return
        if not self.is_partial:
            yield start, view
        elif crcs.block_bytes is not None and crcs.data_offset is not None:
            for a, b in cut(start, start + view.nbytes, crcs.block_bytes, crcs.data_offset):
                yield a, view[a - start : b - start]


def group(items: Iterable[ReadItem], metadata: Metadata, base: S3Uri) -> list[Item]:
    """Collect what is wanted of each stored item, so that none is fetched twice.

    Raises:
        CorruptMetadataError: an item that the metadata does not place.
        InvalidS3UriError: an item placed outside of the checkpoint.
    """
    source = f"{base}/.metadata"
    found: dict[object, Item] = {}
    uris: dict[str, S3Uri] = {}
    alignment = storage_alignment()
    for request in items:
        index = request.storage_index
        item = found.get(index)
        if item is None:
            info = metadata.storage_data.get(index)
            if info is None:
                raise CorruptMetadataError(
                    f"{source} does not say where {index} is stored: load an older checkpoint"
                )
            uri = uris.get(info.relative_path)
            if uri is None:
                key = child_key(base.key, info.relative_path, source=source)
                uri = uris[info.relative_path] = S3Uri(base.bucket, key)
            stored = _stored(request, info, metadata, alignment)
            if stored is not None and stored.frame.length != info.length:
                stored = None
            item = found[index] = Item(uri, info, crcs_of(info), stored)
        item.requests.append(request)
    for item in found.values():
        item.ranges = needed_ranges(item.requests, item.stored, item.crcs, item.info.length)
        item.missing_bytes = sum([end - start for start, end in item.ranges])
    return list(found.values())


def check_place(item: Item, object_bytes: int) -> None:
    """Check that an item lies within its object.

    Raises:
        CorruptMetadataError: it does not.
    """
    end = item.info.offset + item.info.length
    if end > object_bytes:
        raise CorruptMetadataError(
            f"{item.name}: its metadata places it at bytes [{item.info.offset}, {end}) of "
            f"{item.uri}, which has {object_bytes}: load an older checkpoint",
            bucket=item.uri.bucket,
            key=item.uri.key,
        )


def needed_ranges(
    requests: Sequence[ReadItem], stored: Stored | None, crcs: ItemCrcs | None, length: int
) -> list[tuple[int, int]]:
    """Return the ranges of an item that its requests need, at least, as far as can be told."""
    whole = [(0, length)]
    if (
        stored is None
        or not stored.shape
        or length <= _COPIED_BYTES
        or any(request.type != LoadItemType.TENSOR for request in requests)
    ):
        return whole
    first = min(request.storage_offsets[0] for request in requests)
    last = max(request.storage_offsets[0] + request.lengths[0] for request in requests)
    start, end = first * stored.row_bytes, last * stored.row_bytes
    if crcs is not None:
        if crcs.block_bytes is None or crcs.data_offset is None:
            return whole
        if crcs[1:3] != (len(stored.frame.header), stored.frame.data_bytes):
            return whole
        start -= start % crcs.block_bytes
        end = min(-(-end // crcs.block_bytes) * crcs.block_bytes, stored.frame.data_bytes)
    if end - start + _LEAST_SAVING_BYTES > length or not 0 <= start < end:
        return whole
    data_at = len(stored.frame.header)
    rows = (data_at + start, data_at + end)
    return [rows] if crcs is not None else [(0, data_at), rows]


def _stored(
    request: ReadItem, info: _StorageInfo, metadata: Metadata, alignment: int
) -> Stored | None:
    index = request.storage_index
    entry = metadata.state_dict_metadata.get(index.fqn)
    if request.type != LoadItemType.TENSOR or not isinstance(entry, TensorStorageMetadata):
        return None
    if info.transform_descriptors:
        return None
    chunks, hint = entry.chunks, index.index
    if hint is not None and hint < len(chunks) and chunks[hint].offsets == index.offset:
        chunks = [chunks[hint]]
    for chunk in chunks:
        if index.offset is None or chunk.offsets == index.offset:
            dtype = entry.properties.dtype
            if isinstance(info, TensorMemory):
                return Stored(dtype, tuple(chunk.sizes), bare_frame(info.length))
            return _framed(dtype, chunk.sizes, alignment)
    return None


@functools.lru_cache(maxsize=2048)
def _framed(dtype: torch.dtype, sizes: torch.Size, alignment: int) -> Stored | None:
    shape = tuple(sizes)
    frame = frame_for(dtype, shape, alignment)
    return Stored(dtype, shape, frame) if frame is not None else None


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
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
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
    """Return whether our own writer stored strides, which is why it made no blocks of rows."""
    data_bytes = stored.frame.data_bytes
    if crcs.block_bytes is not None or data_bytes < _COPIED_BYTES:
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


def damaged(name: str, uri: S3Uri, start: int, end: int) -> IntegrityError:
    """Return the error for an object's bytes [start, end) that are not what was saved."""
    return IntegrityError(
        f"{name}: bytes [{start}, {end}) of {uri} differ from those that were saved (CRC64NVME): "
        "load an older checkpoint",
        bucket=uri.bucket,
        key=uri.key,
    )


def copy_to_device(item: Item, start: int, view: memoryview) -> None:
    """Copy bytes that arrived at `start` to the device, without waiting for it."""
    if item.device is None or item.exact is None:
        return
    if start == 0:
        item.header = bytes(view[: item.exact[0]])
    data_at, data_end = item.exact
    first, last = max(start, data_at), min(start + view.nbytes, data_end)
    if first < last:
        source = torch.frombuffer(view[first - start : last - start], dtype=torch.uint8)
        item.device[first - data_at : last - data_at].copy_(source, non_blocking=True)


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
        return torch.empty(layout.shape, dtype=layout.dtype)
    stored = data[layout.data_offset : layout.data_offset + layout.data_bytes]
    storage = _values_of(stored, layout.dtype)
    return storage.as_strided(layout.shape, layout.stride, layout.storage_offset)


def _values_of(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Return memory as a flat tensor, over the memory itself where it is aligned."""
    if not data.nbytes:
        return torch.empty(0, dtype=dtype)
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
