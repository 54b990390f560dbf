"""One rank's part of a load: the ranges of all its items, fetched together, put where they belong.

The planner belongs to the caller's thread, so the work is driven from there: spans (ranged
requests) are planned for all files at once, the largest first; a span's items are resolved when it
is admitted; the portal receives it; and an item whose last byte is in is checked and committed.

Memory that is neither a target's nor the plan's is charged to a budget, and the thread waits for
spans to arrive before it takes more. After a failed load the targets' contents are undefined.
"""

from __future__ import annotations

import io
import queue
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from s3dcp._calls import Call
from s3dcp._collector import CollectorPause, dismantle
from s3dcp._config import MiB, S3ClientConfig
from s3dcp._downloads import Downloads, discard
from s3dcp._errors import S3Exception
from s3dcp._flow import Channel, wait_all
from s3dcp._framing import memory_of
from s3dcp._giving_way import give_way
from s3dcp._items import Item, check_place, group
from s3dcp._keys import S3Uri
from s3dcp._landing import (
    copy_request,
    copy_to_device,
    rows_of,
    settle_place,
    stored_tensor,
    verify,
)
from s3dcp._portal import Calls, Portal
from s3dcp._progress import Meter
from s3dcp._ranges import Span, Want, coalesce, span_bytes
from s3dcp._staging import Buffer, Memory
from s3dcp._store import Moved
from s3dcp._torch_internals import _StorageReaderTransforms

# Requests handed to the portal ahead of those on the wire; more would only cost memory.
_QUEUED_PER_SLOT = 2

# Less than this is allocated for whatever length the metadata states.
_UNDOUBTED_BYTES = MiB


@dataclass(slots=True, eq=False)
class _Fetch:
    """A span on its way.

    Attributes:
        span: What is fetched.
        scratch: Memory for what lands in the span, and is copied from there.
        staged: What lands there for a device: whose, from which of the item's offsets on, where.
        checked: The pieces whose CRCs come back: whose, and from which offset on.
        moved: How far it is.
    """

    span: Span[Item]
    scratch: Buffer | None
    staged: list[tuple[Item, int, memoryview]]
    checked: list[tuple[Item, int, memoryview]]
    moved: Moved = field(default_factory=Moved)

    @property
    def wanted_bytes(self) -> int:
        """How many of the span's bytes are wanted, the gaps between them not included."""
        return sum([want.end - want.start for want in self.span.pieces])


class LoadedItems:
    """Reads the items of one plan into the planner's tensors.

    Args:
        portal: Where the requests run.
        channel: The client's.
        config: Its settings.
        planner: Resolves and commits tensors, on the caller's thread.
        transforms: The reader's stream extensions.
        max_gap_bytes: The most that may be read in vain to save a request.
        meter: Is told of the bytes that are in.
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
        meter: Meter | None = None,
    ) -> None:
        self._portal = portal
        self._calls = Calls(portal)
        self._channel = channel
        self._downloads = Downloads(channel)
        self._planner = planner
        self._transforms = transforms
        self._part_bytes = config.part_size
        self._max_gap_bytes = max_gap_bytes
        self._meter = meter or Meter()
        self._budget_bytes = config.memory_bytes()
        self._pause = CollectorPause()
        self._memory = Memory(self._budget_bytes, self._settle, self._pause)
        self._fetching: dict[Call[list[int]], _Fetch] = {}
        self._fetched: queue.SimpleQueue[Call[list[int]]] = queue.SimpleQueue()
        self._meter.watch(self._under_way)

    def read(self, items: Iterable[ReadItem], metadata: Metadata, base: S3Uri) -> None:
        """Fill every target of the plan.

        Args:
            items: What to read.
            metadata: The checkpoint's.
            base: The checkpoint's place.

        Raises:
            CorruptMetadataError: an item that the metadata does not place, or misdescribes.
            InvalidS3UriError: an item placed outside of `base`.
            IntegrityError: stored bytes differ from those that were saved.
            S3Exception: as the store.
        """
        queued = _QUEUED_PER_SLOT * self._channel.slots.count
        try:
            with self._pause, self._memory:
                wanted = group(items, metadata, base)
                for item in wanted:
                    self._downloads.pin(item.uri, item.etag)
                self._check_places(wanted)
                spans = self._plan(wanted)
                for uri, span in spans:
                    while len(self._fetching) >= queued:
                        self._settle()
                    self._admit(uri, span)
                while self._settle():
                    pass
                for item in wanted:
                    if not item.info.length:
                        self._finish(item, memoryview(b""))
                dismantle(spans, wanted)
        except BaseException:
            self._meter.watch(int)  # it outlives this, and with it the targets
            self._calls.cancel()
            raise

    def _check_places(self, items: Sequence[Item]) -> None:
        """Check large items of which nothing but their place tells how large they are.

        So that no more is allocated for a forged length than there are bytes in the bucket.
        """
        doubtful: defaultdict[S3Uri, list[Item]] = defaultdict(list)
        for item in items:
            if item.stored is None and item.info.length > _UNDOUBTED_BYTES:
                doubtful[item.uri].append(item)
        if not doubtful:
            return
        heads = [partial(self._downloads.head, uri) for uri in doubtful]
        for info, placed in zip(self._portal.call(wait_all, heads), doubtful.values(), strict=True):
            for item in placed:
                check_place(item, info.size_bytes)

    def _plan(self, items: Sequence[Item]) -> list[tuple[S3Uri, Span[Item]]]:
        wants: defaultdict[S3Uri, list[Want[Item]]] = defaultdict(list)
        for item in items:
            at = item.info.offset
            wants[item.uri].extend(Want(at + a, at + b, item) for a, b in item.ranges)
        total = sum(item.missing_bytes for item in items)
        self._meter.expect(total)
        size = span_bytes(total, self._part_bytes, self._channel.slots.count)
        # What one span carries may need buffers: items that it carries parts of, whole ones.
        most = max(self._budget_bytes // 2, MiB)
        spans = [
            (uri, span)
            for uri, wanted in wants.items()
            for span in coalesce(
                wanted, max_gap=self._max_gap_bytes, max_span=min(size, most), max_shared=most
            )
        ]
        # The largest items first, so that no large one is left to be waited for alone at the end;
        # and each item's spans together, so that it gives its buffer back before others take one.
        spans.sort(key=lambda pair: -max(want.owner.missing_bytes for want in pair[1].pieces))
        return spans

    def _admit(self, uri: S3Uri, span: Span[Item]) -> None:
        for want in span.pieces:
            if want.owner.targets is None:
                self._resolve(want.owner)
        fetch, into = self._destinations(span)
        checked = [view for _, _, view in fetch.checked]
        future = self._calls.submit(
            self._downloads.fetch, uri, span.start, into, checked, fetch.moved
        )
        self._fetching[future] = fetch
        future.add_done_callback(self._fetched.put)

    def _resolve(self, item: Item) -> None:
        targets = [
            _detached(self._planner.resolve_tensor(request))
            for request in item.requests
            if request.type == LoadItemType.TENSOR
        ]
        settle_place(item, targets, partial(self._memory.borrow, pinned=False))

    def _destinations(self, span: Span[Item]) -> tuple[_Fetch, list[memoryview]]:
        """Return where a span's bytes go."""
        scratch = self._scratch(span)
        fetch = _Fetch(span, scratch, [], [])
        free = scratch.view if scratch else memoryview(b"")
        into: list[memoryview] = []
        run_bytes = used = 0  # neighbours that land in the span are received as one
        position = span.start
        for want in span.pieces:
            item, start = want.owner, want.start - want.owner.info.offset
            lands_in_span = item.lands_in_span
            if run_bytes and (want.start > position or not lands_in_span):
                into.append(free[used - run_bytes : used])
                run_bytes = 0
            if want.start > position:
                into.extend(discard(want.start - position))
            position = want.end
            length = want.end - want.start
            if lands_in_span:
                views = [free[used : used + length]]
                if item.is_small:
                    item.places = [(start, views[0])]
                used += length
                run_bytes += length
                if item.device is not None:
                    fetch.staged.append((item, start, views[0]))
            else:
                views = item.where(start, start + length)
                into.extend(views)
            if not item.is_small:  # those are checked when they are copied
                for view in views:
                    pieces = item.checked(start, view)
                    fetch.checked.extend((item, at, piece) for at, piece in pieces)
                    start += view.nbytes
        if run_bytes:
            into.append(free[used - run_bytes : used])
        return fetch, into

    def _scratch(self, span: Span[Item]) -> Buffer | None:
        """Return memory for what lands in a span, if anything does."""
        here = [want for want in span.pieces if want.owner.lands_in_span]
        if not here:
            return None
        pinned = any(want.owner.device is not None for want in here)
        return self._memory.borrow(sum([w.end - w.start for w in here]), pinned=pinned)

    def _settle(self) -> bool:
        """Wait for a span, and finish the items that it completes; False: none is under way."""
        if not self._fetching:
            return False
        future = self._pause.next_of(self._fetched, self._meter.look)
        fetch = self._fetching.pop(future)
        try:
            crcs = future.result()
        except S3Exception as exc:
            names = ", ".join(sorted({want.owner.name for want in fetch.span.pieces})[:3])
            exc.message += f" (while reading {names})"
            raise
        for (item, start, view), crc in zip(fetch.checked, crcs, strict=True):
            item.sums.append((start, crc, view.nbytes))
        for item, start, view in fetch.staged:
            copy_to_device(item, start, view)
        self._meter.advance(fetch.wanted_bytes)
        for want in fetch.span.pieces:
            item = want.owner
            item.missing_bytes -= want.end - want.start
            if not item.missing_bytes:
                # A small item is never cut: its one place has all of it.
                self._finish(item, item.places[0][1] if item.is_small and item.places else None)
        if fetch.scratch is not None:
            self._memory.give_back(fetch.scratch)
        return True

    def _under_way(self) -> int:
        return sum(min(f.moved.size_bytes, f.wanted_bytes) for f in self._fetching.values())

    def _finish(self, item: Item, data: memoryview | None) -> None:
        """Check an item whose bytes are in, and hand it to the planner."""
        if item.targets is None:
            self._resolve(item)
        verify(item, data)
        if item.exact is not None and item.is_as_guessed:
            [request], [target] = item.requests, cast("list[torch.Tensor]", item.targets)
            if data is not None and item.device is None:
                first, last = item.exact
                memory_of(target)[:] = data[first:last]
            self._planner.commit_tensor(request, target)
        else:
            self._copy(item, data)
        if item.buffer is not None:
            self._memory.give_back(item.buffer)
        item.buffer = item.places = item.targets = item.device = None
        give_way()

    def _copy(self, item: Item, data: memoryview | None) -> None:
        if data is None:
            data = item.buffer.view if item.buffer is not None else None
        if data is None or not item.is_as_guessed:
            data = self._read_again(item)
        if item.info.transform_descriptors:
            raw = cast("IO[bytes]", io.BytesIO(data))
            stream = self._transforms.transform_load_stream(
                item.requests[0], item.info.transform_descriptors, raw
            )
            data = memoryview(bytearray(stream.read(-1)))
        tensor: torch.Tensor | None = None
        first_row = 0
        targets = iter(cast("list[torch.Tensor]", item.targets))
        for request in item.requests:
            if request.type == LoadItemType.BYTE_IO:
                self._planner.load_bytes(request, io.BytesIO(data))
                continue
            if tensor is None:
                tensor, first_row = (
                    rows_of(item, data) if item.is_partial else (stored_tensor(item, data), 0)
                )
            target = next(targets)
            copy_request(item, request, target, tensor, first_row)
            self._planner.commit_tensor(request, target)

    def _read_again(self, item: Item) -> memoryview:
        """Read the whole of an item whose layout was guessed wrong."""
        again = memoryview(bytearray(item.info.length))
        at = item.info.offset
        self._meter.expect(again.nbytes)
        self._portal.call(self._downloads.fetch, item.uri, at, [again])
        self._meter.advance(again.nbytes)
        item.ranges = [(0, item.info.length)]
        verify(item, again)
        return again


def _detached(target: torch.Tensor) -> torch.Tensor:
    # One more tensor takes 10 us; most targets are as they should be.
    if type(target) is torch.Tensor and not target.requires_grad:
        return target
    # What is copied to a sparse or quantized tensor replaces parts that a detached one would not
    # share with it: its indices, its quantizer.
    plain = target.layout is torch.strided and not target.is_quantized
    return target.detach() if plain else target
