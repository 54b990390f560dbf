"""Shards of several ranks into full files, streamed: ranges come down, parts go up.

The output is cut into the parts of its multipart uploads. Of each, it is known beforehand which
bytes of which shards make it up; they are fetched into the part's own memory, or next to it and
copied where shards were cut along other dimensions than the first. Only so many parts are in
memory at a time as the budget allows, however large the tensors are.
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from s3dcp._boxes import Box, slabs
from s3dcp._checksums import combine, damaged
from s3dcp._config import S3ClientConfig
from s3dcp._downloads import Downloads, discard
from s3dcp._errors import S3ConfigError
from s3dcp._flow import Channel, wait_all
from s3dcp._hf_files import Chunk, HFCheckpoint, begin, child_uri, commit, find
from s3dcp._hf_index import (
    FORMAT,
    FORMAT_KEY,
    SAVE_ID_KEY,
    Index,
    SavedFile,
    file_name,
    numbered,
)
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._metadata import ItemCrcs
from s3dcp._portal import offload
from s3dcp._publish import delete_quietly
from s3dcp._ranges import Span, Want, block_bytes, coalesce, cut, upload_part_bytes
from s3dcp._s3client import S3Client
from s3dcp._safetensors import ALIGNMENT, Entry, make_header
from s3dcp._uploads import Upload

#: Where bytes start, their CRC, and how many they are.
_Sum = tuple[int, int, int]

# Elements of so many bytes are moved as these.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def consolidate_safetensors_files(
    input_uri: str | os.PathLike[str],
    output_uri: str | os.PathLike[str],
    fqn_to_index_mapping: Mapping[str, int] | None = None,
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    overwrite: bool = True,
) -> None:
    """Make a sharded safetensors checkpoint one of full files, that every library reads.

    Reads and writes at once, in the memory that `S3ClientConfig.memory_budget` allows, and verifies
    the CRCs of shards that s3dcp wrote. The input stays as it is.

    Args:
        input_uri: The sharded checkpoint's place: ours, or one that torch's
            `HuggingFaceStorageWriter` wrote and that was copied to S3.
        output_uri: Where the full files go, another place than the input's.
        fqn_to_index_mapping: The number of each tensor's file, from 1 on; by default all are
            written to one file.
        region: The buckets' region.
        s3client_config: Settings of the client.
        overwrite: Whether a checkpoint that is there may be replaced.

    Raises:
        CheckpointNotFoundError: there is no input, or its save did not finish.
        CheckpointExistsError: there is an output, and `overwrite` is false.
        IntegrityError: a shard's bytes differ from those that were saved.
        S3ConfigError: a mapping that lacks a tensor, or the input's place for the output.
        S3Exception: as the store. The output then has no index.
    """
    client = S3Client(region, s3client_config)
    source, target = parse_s3_uri(input_uri), parse_s3_uri(output_uri)
    mapping = fqn_to_index_mapping
    client.call(consolidate, client.s3client_config, source, target, mapping, overwrite=overwrite)


async def consolidate(
    channel: Channel,
    config: S3ClientConfig,
    source: S3Uri,
    target: S3Uri,
    mapping: Mapping[str, int] | None,
    *,
    overwrite: bool,
) -> None:
    """Consolidate on the portal; as `consolidate_safetensors_files`."""
    if (source.bucket, source.key.rstrip("/")) == (target.bucket, target.key.rstrip("/")):
        raise S3ConfigError(f"The consolidated files cannot replace their shards in {source}")
    checkpoint = await find(channel, source)
    if mapping is None:
        mapping = dict.fromkeys(checkpoint.tensors, 1)
    by_number = numbered(checkpoint.tensors, mapping)
    save_id = uuid.uuid4().hex[:16]
    names = {number: file_name(number, max(mapping.values())) for number in by_number}
    outputs = [
        _Output(channel, config, checkpoint, child_uri(target, names[number]), fqns, save_id)
        for number, fqns in by_number.items()
    ]
    stale = await begin(channel, target, overwrite=overwrite)
    downloads = Downloads(channel)
    for output in outputs:
        output.pin(downloads)
    most_bytes = 2 * max((output.part_bytes for output in outputs), default=1)
    parts = asyncio.Semaphore(max(1, min(channel.slots.count, config.memory_bytes() // most_bytes)))
    try:
        await wait_all([partial(output.write, downloads, parts) for output in outputs])
    except BaseException:
        await wait_all([output.drop for output in outputs])
        raise
    index = Index(
        weight_map={fqn: names[number] for number, fqns in by_number.items() for fqn in fqns},
        saved={
            names[number]: SavedFile(save_id, output.crcs())
            for number, output in zip(by_number, outputs, strict=True)
        },
        total_bytes=sum(output.data_bytes for output in outputs),
    )
    await commit(channel, target, index, stale, overwrite=overwrite)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Bytes of a chunk that belong to a part.

    Attributes:
        fqn: The tensor's name.
        chunk: Where they are.
        start: The first one's place in the file.
        end: One past the last one's.
        into: Where they go: into the part, or next to it.
        copy: Moves them from there to where they belong, if they went next to it.
    """

    fqn: str
    chunk: Chunk
    start: int
    end: int
    into: memoryview
    copy: Callable[[], object] | None


class _Output:
    """A full file on its way. Used on the portal's loop."""

    def __init__(
        self,
        channel: Channel,
        config: S3ClientConfig,
        checkpoint: HFCheckpoint,
        uri: S3Uri,
        fqns: list[str],
        save_id: str,
    ) -> None:
        self._channel = channel
        self._base = checkpoint.base
        self._tensors = {fqn: checkpoint.tensors[fqn] for fqn in fqns}
        self._head, self._header = make_header(
            {fqn: (tensor.dtype, tensor.shape) for fqn, tensor in self._tensors.items()},
            {FORMAT_KEY: FORMAT, SAVE_ID_KEY: save_id},
        )
        self._names = list(self._header.entries)
        self._starts = [entry.start for entry in self._header.entries.values()]
        self._upload = Upload(channel, uri)
        self._read: defaultdict[tuple[str, str], list[_Sum]] = defaultdict(list)
        self._written: defaultdict[str, list[_Sum]] = defaultdict(list)
        self.data_bytes = self._header.file_bytes - self._header.end
        size = upload_part_bytes(
            self._header.file_bytes,
            config.part_size,
            channel.slots.count,
            most_bytes=config.memory_bytes() // 2,
        )
        self.part_bytes = -(-size // ALIGNMENT) * ALIGNMENT  # no element lies in two parts

    def pin(self, downloads: Downloads) -> None:
        """Have all reads be of the files whose headers were read."""
        for tensor in self._tensors.values():
            for chunk in tensor.chunks:
                downloads.pin(self._source(chunk), chunk.etag)

    async def write(self, downloads: Downloads, parts: asyncio.Semaphore) -> None:
        """Write the file.

        Args:
            downloads: Where the shards are read.
            parts: How many parts, of all files, may be in memory.

        Raises:
            IntegrityError: a shard's bytes differ from those that were saved.
            S3Exception: as the store.
        """
        ranges = list(cut(0, self._header.file_bytes, self.part_bytes))

        async def move(number: int, start: int, end: int) -> None:
            async with parts:
                memory = memoryview(bytearray(end - start))
                await self._fetch(downloads, start, memory)
                views = list(self._views(start, memory))
                body = [view for _, _, view in views]
                if len(ranges) > 1:
                    crcs = await self._upload.send(number, body)
                else:
                    self._verify()
                    crcs = await self._upload.put(body)
            for (fqn, at, view), crc in zip(views, crcs, strict=True):
                self._written[fqn].append((at, crc, view.nbytes))

        await wait_all([partial(move, n, *place) for n, place in enumerate(ranges, 1)])
        if len(ranges) > 1:
            self._verify()
            await self._upload.complete(len(ranges))

    async def drop(self) -> None:
        """Undo what was done."""
        await self._upload.abort()
        if self._upload.touched:
            await delete_quietly(self._channel, [self._upload.uri])

    def crcs(self) -> dict[str, ItemCrcs]:
        """Return the checksums of what was written, by tensor."""
        return {fqn: self._crcs_of(fqn, entry) for fqn, entry in self._header.entries.items()}

    def _crcs_of(self, fqn: str, entry: Entry) -> ItemCrcs:
        sums = sorted(self._written[fqn])
        whole = combine((crc, size) for _, crc, size in sums)
        block = block_bytes(entry.end - entry.start, entry.row_bytes)
        by_block: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for at, crc, size in sums:
            by_block[(at - entry.start) // block].append((crc, size))
        return ItemCrcs(whole, block_bytes=block, blocks=tuple(map(combine, by_block.values())))

    async def _fetch(self, downloads: Downloads, start: int, memory: memoryview) -> None:
        """Fill a part's memory, whose first byte is the file's byte `start`."""
        head = self._head[start : start + memory.nbytes]
        memory[: len(head)] = head
        pieces = [
            piece
            for fqn, entry, a, b in self._within(start, start + memory.nbytes)
            for piece in self._pieces(fqn, entry, a, memory[a - start : b - start])
        ]
        wants: defaultdict[S3Uri, list[Want[_Piece]]] = defaultdict(list)
        for piece in pieces:
            wants[self._source(piece.chunk)].append(Want(piece.start, piece.end, piece))
        await wait_all(
            [
                partial(self._fetch_span, downloads, uri, span)
                for uri, wanted in wants.items()
                for span in coalesce(wanted, max_gap=math.inf, max_span=self.part_bytes)
            ]
        )
        if copies := [piece.copy for piece in pieces if piece.copy is not None]:
            await offload(_call_each, copies)

    async def _fetch_span(self, downloads: Downloads, uri: S3Uri, span: Span[_Piece]) -> None:
        into: list[memoryview] = []
        position = span.start
        for want in span.pieces:
            into += [*discard(want.start - position), want.owner.into]
            position = want.end
        checked = [want.owner.into for want in span.pieces]
        crcs = await downloads.fetch(uri, span.start, into, checked)
        for want, crc in zip(span.pieces, crcs, strict=True):
            key = want.owner.fqn, want.owner.chunk.file
            self._read[key].append((want.start, crc, want.end - want.start))

    def _within(self, start: int, end: int) -> Iterator[tuple[str, Entry, int, int]]:
        """Yield the tensors of which the file's bytes [start, end) have some, and which."""
        for fqn in self._names[max(bisect_right(self._starts, start) - 1, 0) :]:
            entry = self._header.entries[fqn]
            if entry.start >= end:
                return
            a, b = max(start, entry.start), min(end, entry.end)
            if a < b:
                yield fqn, entry, a, b

    def _pieces(self, fqn: str, entry: Entry, start: int, memory: memoryview) -> Iterator[_Piece]:
        """Yield where a tensor's bytes from `start` on come from, `memory` being their place."""
        width = entry.dtype.itemsize
        first = (start - entry.start) // width
        for slab in slabs(entry.shape, first, first + memory.nbytes // width):
            place, memory = memory[: slab.count * width], memory[slab.count * width :]
            for chunk in self._tensors[fqn].chunks:
                if (common := chunk.box.overlap(slab)) is not None:
                    yield _piece(fqn, chunk, common, slab, place)

    def _views(self, start: int, memory: memoryview) -> Iterator[tuple[str, int, memoryview]]:
        """Cut a part's memory to the pieces whose CRCs are wanted; the header's is called ""."""
        end = start + memory.nbytes
        if start < self._header.end:
            yield "", start, memory[: self._header.end - start]
        for fqn, entry, a, b in self._within(start, end):
            size = entry.end - entry.start
            block = block_bytes(size, entry.row_bytes)
            for x, y in cut(a, b, block, entry.start):
                yield fqn, x, memory[x - start : y - start]

    def _verify(self) -> None:
        """Check what was read of every shard, which is all of it, against what was saved."""
        for fqn, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                sums = sorted(self._read[fqn, chunk.file])
                found = combine((crc, size) for _, crc, size in sums)
                if chunk.crcs is not None and found != chunk.crcs.item:
                    entry = chunk.entry
                    raise damaged(fqn, self._source(chunk), entry.start, entry.end)

    def _source(self, chunk: Chunk) -> S3Uri:
        return child_uri(self._base, chunk.file)


def _piece(fqn: str, chunk: Chunk, common: Box, slab: Box, place: memoryview) -> _Piece:
    """Return how the elements that a chunk and a slab have in common get to the slab's memory."""
    width = chunk.entry.dtype.itemsize
    first, last = common.span_in(chunk.box)  # one piece there, by the nature of slabs
    start, end = chunk.entry.start + first * width, chunk.entry.start + last * width
    first, last = common.span_in(slab)
    if last - first == common.count:
        return _Piece(fqn, chunk, start, end, place[first * width : last * width], None)
    aside = memoryview(bytearray(end - start))
    return _Piece(fqn, chunk, start, end, aside, partial(_copy, aside, common, place, slab, width))


def _copy(source: memoryview, box: Box, target: memoryview, outer: Box, width: int) -> None:
    """Copy a box's elements to their places among those of a box around it."""
    inside = tuple(
        slice(a - origin, end - origin)
        for a, end, origin in zip(box.offsets, box.ends, outer.offsets, strict=True)
    )
    whole = torch.frombuffer(target, dtype=_WORDS[width]).view(outer.sizes)
    whole[inside] = torch.frombuffer(source, dtype=_WORDS[width]).view(box.sizes)


def _call_each(functions: Iterable[Callable[[], object]]) -> None:
    for function in functions:
        function()
