"""The stored items of a load: what is wanted of each, and which of its bytes that takes.

When only some rows are wanted, only those are fetched, widened to the edges of checksum blocks.
Where the rows lie is known from the CRC attributes of our own checkpoints. In others it is guessed
from dtype and shape, and the guess is checked against the item's header, which is fetched along;
a wrong one costs a second read of the whole item.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from s3dcp._errors import CorruptMetadataError
from s3dcp._framing import Frame, frame_for, storage_alignment
from s3dcp._keys import S3Uri, child_key
from s3dcp._metadata import ItemCrcs, crcs_of
from s3dcp._ranges import cut
from s3dcp._safetensors import TensorMemory, bare_frame
from s3dcp._staging import COPIED_BYTES, Buffer
from s3dcp._torch_internals import _StorageInfo

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
        return self.info.length <= COPIED_BYTES

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
        or length <= COPIED_BYTES
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
