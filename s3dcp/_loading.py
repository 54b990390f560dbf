"""One rank's part of a load: the ranges of all its items, fetched together, put where they belong.

The planner belongs to the caller's thread, so the work is driven from there: spans (ranged
requests) are planned for all files at once, the largest first; a span's items are resolved when it
is admitted; the portal receives it; and an item whose last byte is in is checked and committed.

Where an item's bytes land:
- in the target itself, when a whole stored tensor goes to contiguous CPU memory of its dtype: what
  comes before and after the data goes to scratch memory;
- in scratch memory shared by a span's small items, to be copied, since a read per 20 KiB tensor
  costs more than its copy;
- in a buffer of its own otherwise, to be decoded and copied: strided or differently sharded
  targets, other dtypes and devices, stream extensions.
Scratch memory and buffers are charged to a budget. After a failed load the targets' contents are
undefined.
"""

from __future__ import annotations

import io
import queue
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from s3dcp._checksums import combine
from s3dcp._config import MiB, S3ClientConfig
from s3dcp._downloads import Downloads
from s3dcp._errors import CorruptMetadataError, IntegrityError, S3Exception
from s3dcp._flow import Channel
from s3dcp._framing import Frame, decode, frame_for, memory_of
from s3dcp._keys import S3Uri, child_key
from s3dcp._layouts import parse_header
from s3dcp._metadata import ItemCrcs, crcs_of
from s3dcp._portal import Portal
from s3dcp._ranges import Span, Want, coalesce, span_bytes
from s3dcp._torch_internals import (
    _StorageInfo,
    _StorageReaderTransforms,
    narrow_tensor_by_index,
)

# Copying less than this is quicker than a read of its own.
_COPIED_BYTES = 256 << 10
_MAX_BUFFER_BYTES = 96 * MiB
# Requests handed to the portal ahead of those on the wire; more would only cost memory.
_QUEUED_PER_SLOT = 2

_garbage = memoryview(bytearray(256 << 10))


@dataclass(slots=True, eq=False)
class _Stored:
    """A stored item, and everyone who wants something of it."""

    uri: S3Uri
    info: _StorageInfo
    crcs: ItemCrcs | None
    frame: Frame | None
    requests: list[ReadItem] = field(default_factory=list)
    targets: list[torch.Tensor] | None = None
    memory: memoryview | None = None  # the target's own, when the data goes straight there
    edges: memoryview | None = None  # then, what is in front of the data and behind it
    buffer: memoryview | None = None
    charged_bytes: int = 0
    missing_bytes: int = 0
    sums: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What an error calls it."""
        return self.requests[0].storage_index.fqn

    @property
    def is_small(self) -> bool:
        """Whether it is copied from its span's scratch memory."""
        return self.info.length <= _COPIED_BYTES


@dataclass(slots=True, eq=False)
class _Fetch:
    """A span on its way, and whose bytes lie in what memory from which offset on."""

    span: Span[_Stored]
    uri: S3Uri
    checked: list[tuple[_Stored, int, memoryview]]
    charged_bytes: int


class LoadedItems:
    """Reads the items of one plan into the planner's tensors.

    Args:
        portal: Where the requests run.
        channel: The client's.
        config: Its settings.
        planner: Resolves and commits tensors, on the caller's thread.
        transforms: The reader's stream extensions.
        max_gap_bytes: The most that may be read in vain to save a request.
    """

    def __init__(
        self,
        portal: Portal,
        channel: Channel,
        config: S3ClientConfig,
        planner: LoadPlanner,
        transforms: _StorageReaderTransforms,
        *,
        max_gap_bytes: float,
    ) -> None:
        self._portal = portal
        self._channel = channel
        self._downloads = Downloads(channel)
        self._planner = planner
        self._transforms = transforms
        self._part_bytes = config.part_size
        self._max_gap_bytes = max_gap_bytes
        self._budget_bytes = min(config.memory_bytes(), _MAX_BUFFER_BYTES)
        self._charged_bytes = 0
        self._fetching: dict[Future[list[int]], _Fetch] = {}
        self._fetched: queue.SimpleQueue[Future[list[int]]] = queue.SimpleQueue()

    def read(self, items: Iterable[ReadItem], metadata: Metadata, base: S3Uri) -> None:
        """Fill every target of the plan.

        Args:
            items: What to read.
            metadata: The checkpoint's.
            base: The checkpoint's place.

        Raises:
            CorruptMetadataError: an item that the metadata does not place, or not below `base`.
            IntegrityError: stored bytes differ from those that were saved.
            S3Exception: as the store.
        """
        stored = _group(items, metadata, base)
        spans = self._plan(stored)
        queued = _QUEUED_PER_SLOT * self._channel.slots.count
        try:
            for uri, span in spans:
                while len(self._fetching) >= queued:
                    self._settle()
                self._admit(uri, span)
            while self._fetching:
                self._settle()
            for item in stored:
                if not item.info.length:
                    self._finish(item)
        except BaseException:
            self._portal.cancel(list(self._fetching))
            raise

    def _plan(self, stored: Sequence[_Stored]) -> list[tuple[S3Uri, Span[_Stored]]]:
        wants: defaultdict[S3Uri, list[Want[_Stored]]] = defaultdict(list)
        for item in stored:
            start = item.info.offset
            item.missing_bytes = item.info.length
            wants[item.uri].append(Want(start, start + item.info.length, item))
        total = sum(item.info.length for item in stored)
        size = span_bytes(total, self._part_bytes, self._channel.slots.count)
        spans = [
            (uri, span)
            for uri, wanted in wants.items()
            for span in coalesce(wanted, max_gap=self._max_gap_bytes, max_span=size)
        ]
        # The largest first, so that no large one is left to be waited for alone at the end.
        spans.sort(key=lambda pair: -pair[1].size_bytes)
        return spans

    def _admit(self, uri: S3Uri, span: Span[_Stored]) -> None:
        for want in span.pieces:
            if want.owner.targets is None:
                self._resolve(want.owner)
        into, checked, charged_bytes = self._destinations(span)
        fetch = _Fetch(span, uri, checked, charged_bytes)
        future = self._portal.submit(
            self._downloads.fetch,
            uri,
            span.start,
            into,
            [view for item, _, view in checked if item.crcs is not None],
        )
        self._fetching[future] = fetch
        future.add_done_callback(self._fetched.put)

    def _resolve(self, item: _Stored) -> None:
        """Ask for the targets, and decide where the item's bytes land."""
        item.targets = [
            self._planner.resolve_tensor(request).detach()
            for request in item.requests
            if request.type == LoadItemType.TENSOR
        ]
        if item.is_small:
            return
        if item.frame is not None and len(item.requests) == 1:
            [target], [request] = item.targets, item.requests
            if _is_whole(request, target, item.frame):
                item.memory = memory_of(target)
                item.edges = memoryview(bytearray(item.frame.length - item.frame.data_bytes))
                return
        self._make_room(item.info.length)
        item.charged_bytes = item.info.length
        self._charged_bytes += item.charged_bytes
        item.buffer = _blank(item.info.length)

    def _destinations(
        self, span: Span[_Stored]
    ) -> tuple[list[memoryview], list[tuple[_Stored, int, memoryview]], int]:
        """Return where the span's bytes go, whose views they are, and the scratch bytes charged."""
        scratch_bytes = sum(w.end - w.start for w in span.pieces if w.owner.is_small)
        self._make_room(scratch_bytes)
        self._charged_bytes += scratch_bytes
        scratch = _blank(scratch_bytes)
        used = 0
        into: list[memoryview] = []
        checked: list[tuple[_Stored, int, memoryview]] = []
        position = span.start
        run: int | None = None  # where in the scratch memory the current run of small items starts
        for want in span.pieces:
            if run is not None and (want.start > position or not want.owner.is_small):
                into.append(scratch[run:used])
                run = None
            into.extend(_gap(want.start - position))
            position = want.end
            if want.owner.is_small:
                run = used if run is None else run
                view = scratch[used : used + want.end - want.start]
                used += view.nbytes
                want.owner.buffer = view
                checked.append((want.owner, want.start, view))
                continue
            start = want.start
            for view in _places(want):
                into.append(view)
                checked.append((want.owner, start, view))
                start += view.nbytes
        if run is not None:
            into.append(scratch[run:used])
        return into, checked, scratch_bytes

    def _make_room(self, size_bytes: int) -> None:
        while self._fetching and self._charged_bytes + size_bytes > self._budget_bytes:
            self._settle()

    def _settle(self) -> None:
        future = self._fetched.get()
        fetch = self._fetching.pop(future)
        try:
            crcs = iter(future.result())
        except S3Exception as exc:
            names = ", ".join(sorted({want.owner.name for want in fetch.span.pieces})[:3])
            exc.message += f" (while reading {names})"
            raise
        for item, start, view in fetch.checked:
            if item.crcs is not None:
                item.sums.append((start, next(crcs), view.nbytes))
        for want in fetch.span.pieces:
            item = want.owner
            item.missing_bytes -= want.end - want.start
            if not item.missing_bytes:
                self._finish(item)
        self._charged_bytes -= fetch.charged_bytes

    def _finish(self, item: _Stored) -> None:
        if item.targets is None:
            self._resolve(item)
        _verify(item)
        if item.memory is None or not self._landed(item):
            self._copy(item)
        else:
            [request], [target] = item.requests, cast("list[torch.Tensor]", item.targets)
            self._planner.commit_tensor(request, target)
        self._charged_bytes -= item.charged_bytes
        item.buffer = item.memory = item.edges = item.targets = None

    def _landed(self, item: _Stored) -> bool:
        """Return whether the bytes in the target are the tensor, as was guessed from its frame."""
        frame, edges = cast("Frame", item.frame), cast("memoryview", item.edges)
        header = edges[: len(frame.header)]
        if header == frame.header:
            return True
        target = cast("list[torch.Tensor]", item.targets)[0]
        layout = parse_header(header, item.info.length)
        if (
            layout is not None
            and layout.data_offset == len(frame.header)
            and layout.data_bytes == frame.data_bytes
            and layout.dtype == target.dtype
            and layout.shape == tuple(target.shape)
        ):
            # Another writer's header, and perhaps its strides: the right bytes in another order.
            raw = target.clone().view(-1)
            target.copy_(raw.as_strided(layout.shape, layout.stride, layout.storage_offset))
            return True
        # A header of another length: what was taken for data is not. Read the item again.
        buffer = _blank(item.info.length)
        self._portal.call(self._downloads.fetch, item.uri, item.info.offset, [buffer])
        item.buffer = buffer
        return False

    def _copy(self, item: _Stored) -> None:
        data = item.buffer if item.buffer is not None else memoryview(b"")
        if item.info.transform_descriptors:
            raw = cast("IO[bytes]", io.BytesIO(data))
            stream = self._transforms.transform_load_stream(
                item.requests[0], item.info.transform_descriptors, raw
            )
            data = memoryview(bytearray(stream.read(-1)))
        tensor: torch.Tensor | None = None
        targets = iter(cast("list[torch.Tensor]", item.targets))
        for request in item.requests:
            if request.type == LoadItemType.BYTE_IO:
                self._planner.load_bytes(request, io.BytesIO(data))
                continue
            if tensor is None:
                tensor = _tensor_of(data)
            target = next(targets)
            part = narrow_tensor_by_index(tensor, request.storage_offsets, request.lengths)
            if target.size() != part.size():
                raise CorruptMetadataError(
                    f"{item.name}: the target's size is {tuple(target.size())}, the stored one's "
                    f"{tuple(part.size())}"
                )
            target.copy_(part)
            self._planner.commit_tensor(request, target)


def _group(items: Iterable[ReadItem], metadata: Metadata, base: S3Uri) -> list[_Stored]:
    """Collect what is wanted of each stored item, so that none is fetched twice."""
    stored: dict[object, _Stored] = {}
    for request in items:
        index = request.storage_index
        found = stored.get(index)
        if found is None:
            info = metadata.storage_data.get(index)
            if info is None:
                raise CorruptMetadataError(f"{base}/.metadata does not say where {index} is stored")
            key = child_key(base.key, info.relative_path, source=f"{base}/.metadata")
            frame = None if info.transform_descriptors else _expected_frame(request, metadata)
            if frame is not None and frame.length != info.length:
                frame = None
            found = _Stored(S3Uri(base.bucket, key), info, crcs_of(info), frame)
            stored[index] = found
        found.requests.append(request)
    return list(stored.values())


def _expected_frame(request: ReadItem, metadata: Metadata) -> Frame | None:
    """Return how the stored item should look, going by its dtype and shape."""
    index = request.storage_index
    entry = metadata.state_dict_metadata.get(index.fqn)
    if request.type != LoadItemType.TENSOR or not isinstance(entry, TensorStorageMetadata):
        return None
    chunks = entry.chunks
    if index.index is not None and index.index < len(chunks):
        hinted = chunks[index.index]
        if index.offset is None or hinted.offsets == index.offset:
            return frame_for(entry.properties.dtype, tuple(hinted.sizes))
    for chunk in chunks:
        if index.offset is None or chunk.offsets == index.offset:
            return frame_for(entry.properties.dtype, tuple(chunk.sizes))
    return None


def _is_whole(request: ReadItem, target: torch.Tensor, frame: Frame) -> bool:
    """Return whether a stored tensor's bytes, as they are, are the target's."""
    return (
        type(target) is torch.Tensor
        and target.is_cpu
        and target.layout is torch.strided
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
        and not any(request.storage_offsets)
        and target.nbytes == frame.data_bytes
        and frame_for(target.dtype, tuple(target.shape)) == frame
    )


def _verify(item: _Stored) -> None:
    if item.crcs is None or not item.info.length:
        return
    found = combine((crc, size) for _, crc, size in sorted(item.sums))
    if found != item.crcs.item:
        start = item.info.offset
        raise IntegrityError(
            f"{item.name}: bytes [{start}, {start + item.info.length}) of {item.uri} differ from "
            f"those that were saved (CRC64NVME {found:016x}, not {item.crcs.item:016x}): load an "
            "older checkpoint",
            bucket=item.uri.bucket,
            key=item.uri.key,
        )


def _tensor_of(data: memoryview) -> torch.Tensor:
    """Return the stored tensor, over `data` itself where its layout is plain."""
    layout = parse_header(data, data.nbytes)
    if layout is None:
        return decode(data)
    if not layout.data_bytes:
        return torch.empty(layout.shape, dtype=layout.dtype)
    stored = data[layout.data_offset : layout.data_offset + layout.data_bytes]
    storage = torch.frombuffer(stored, dtype=layout.dtype)
    return storage.as_strided(layout.shape, layout.stride, layout.storage_offset)


def _places(want: Want[_Stored]) -> list[memoryview]:
    """Return where a piece of a large item goes."""
    item = want.owner
    start, end = want.start - item.info.offset, want.end - item.info.offset
    if item.memory is None:
        return [cast("memoryview", item.buffer)[start:end]]
    edges, frame = cast("memoryview", item.edges), cast("Frame", item.frame)
    data_at, data_bytes = len(frame.header), frame.data_bytes
    views = [
        edges[start : min(end, data_at)],
        item.memory[max(start - data_at, 0) : max(end - data_at, 0)],
        edges[max(start - data_bytes, data_at) : max(end - data_bytes, data_at)],
    ]
    return [view for view in views if view.nbytes]


def _gap(size_bytes: int) -> list[memoryview]:
    whole, rest = divmod(size_bytes, _garbage.nbytes)
    return [_garbage] * whole + ([_garbage[:rest]] if rest else [])


def _blank(size_bytes: int) -> memoryview:
    """Return memory that no pass has zeroed."""
    return memory_of(torch.empty(size_bytes, dtype=torch.uint8)) if size_bytes else memoryview(b"")
