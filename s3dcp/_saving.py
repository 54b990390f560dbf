"""One rank's part of a save: its items become ropes of memory, the ropes parts, the parts requests.

The planner belongs to the caller's thread, so the work is driven from there: it resolves an item,
frames it, cuts off the parts that are full, and hands each to the portal. Large CPU tensors go out
from their own memory. What has to be copied (small items, devices' tensors, fallbacks) is charged
to a budget, and the thread waits for parts to be sent before it copies more. Small items are copied
one behind the other, and are done with that.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from s3dcp._calls import Call, ended
from s3dcp._checksums import crc_of
from s3dcp._collector import CollectorPause
from s3dcp._config import MiB, S3ClientConfig
from s3dcp._devices import bytes_of, is_host
from s3dcp._errors import IncompleteSaveError, S3ConfigError
from s3dcp._flow import Channel, wait_all
from s3dcp._framing import (
    Frame,
    encode,
    frame_for,
    frame_of,
    is_plain,
    memory_of,
    storage_alignment,
)
from s3dcp._giving_way import give_way
from s3dcp._keys import S3Uri
from s3dcp._metadata import ItemCrcs, annotate
from s3dcp._outgoing import Block, Charge, OutgoingFile, OutgoingItem, Piece, Run
from s3dcp._portal import Calls, Portal
from s3dcp._progress import Meter
from s3dcp._publish import delete_quietly
from s3dcp._ranges import Fragment, PartCutter, block_bytes, cut, upload_part_bytes
from s3dcp._staging import COPIED_BYTES, Buffer, Memory
from s3dcp._store import Moved
from s3dcp._torch_internals import _StorageInfo, _StorageWriterTransforms
from s3dcp._uploads import Upload

# What torch.save puts around a tensor, roughly.
_FRAME_BYTES = 1550
# So much memory is filled with small items before it is sent.
_RUN_BYTES = MiB
# A device's memory comes to the host in pieces of this size at the most: a power of two, as pinned
# memory is.
_STAGED_BYTES = 16 * MiB


class SavedItems:
    """Writes the items of one plan as objects of their own names.

    Args:
        portal: Where the requests run.
        channel: The client's.
        config: Its settings.
        planner: Resolves items, on the caller's thread.
        transforms: The writer's stream extensions.
        meter: Is told of the bytes that are sent.
        after: A call under way, which has to end well before the first byte is sent. Uploads are
            begun meanwhile, and the first parts made.
    """

    def __init__(
        self,
        portal: Portal,
        channel: Channel,
        config: S3ClientConfig,
        planner: SavePlanner,
        transforms: _StorageWriterTransforms,
        meter: Meter | None = None,
        after: Call[Any] | None = None,
    ) -> None:
        self._portal = portal
        self._calls = Calls(portal)
        self._channel = channel
        self._config = config
        self._planner = planner
        self._transforms = transforms
        self._meter = meter or Meter()
        self._budget_bytes = config.memory_bytes()
        self._pause = CollectorPause()
        self._memory = Memory(self._budget_bytes, self._settle, self._pause)
        self._alignment = storage_alignment()
        self._sending: dict[Call[list[int]], tuple[list[Fragment[Piece]], Moved]] = {}
        self._sent: queue.SimpleQueue[Call[list[int]]] = queue.SimpleQueue()
        self._files: list[OutgoingFile] = []
        self._before = [] if after is None else [after]
        self._cleared = None if after is None else partial(ended, after)
        self._meter.watch(self._under_way)

    def write(self, files: Sequence[tuple[S3Uri, str, Sequence[WriteItem]]]) -> list[WriteResult]:
        """Write every file, and return a result for every item.

        Args:
            files: For each, its place, its name in the metadata, and its items.

        Raises:
            S3Exception: something could not be written. Nothing of this plan is left behind.
        """
        try:
            with self._pause, self._memory:
                for uri, name, items in files:
                    self._open(uri, name, items)
                for file in self._files:
                    if file.is_multipart:
                        self._calls.submit(file.upload.begin)
                self._meter.expect(sum(file.expected_bytes for file in self._files))
                for file, (_, _, items) in zip(self._files, files, strict=True):
                    for item in items:
                        self._add(file, item)
                        give_way()
                    self._end(file)
                while self._settle():
                    pass
                results = [result for file in self._files for result in file.copied]
                results += [item.result() for file in self._files for item in file.items]
            self._complete()
        except BaseException:
            self._meter.watch(int)  # it outlives this, and with it the tensors
            self._portal.cancel_soon(self._before)
            self._calls.abandon(self._drop)
            raise
        expected = sum(len(items) for _, _, items in files)
        if len(results) != expected:
            raise IncompleteSaveError(
                f"{len(results)} of {expected} items were written: nothing was "
                "published, save again"
            )
        return results

    def _open(self, uri: S3Uri, name: str, items: Sequence[WriteItem]) -> None:
        # All sizes are chosen, and refused, before the first byte is sent.
        estimate = sum(map(_tensor_bytes, items))
        # A full part and the one being filled may both be copies.
        size = upload_part_bytes(
            estimate,
            self._config.part_size,
            self._channel.slots.count,
            most_bytes=self._budget_bytes // 2,
        )
        expected = estimate + _FRAME_BYTES * len(items)
        upload, cutter = Upload(self._channel, uri, self._cleared), PartCutter[Piece](size)
        self._files.append(
            OutgoingFile(name, upload, cutter, expected, is_multipart=estimate > size)
        )

    def _add(self, file: OutgoingFile, write_item: WriteItem) -> None:
        try:
            data = self._planner.resolve_data(write_item)
        except Exception as exc:
            exc.add_note(f"s3dcp was about to save {write_item.index.fqn}")
            raise
        if write_item.type == WriteItemType.BYTE_IO:
            if not isinstance(data, io.BytesIO):
                raise TypeError(f"{write_item.index.fqn}: expected BytesIO, got {type(data)}")
            self._add_bytes(file, write_item, data.getbuffer())
            return
        if not isinstance(data, torch.Tensor):
            raise TypeError(f"{write_item.index.fqn}: expected a tensor, got {type(data)}")
        if type(data) is not torch.Tensor or data.requires_grad:
            data = data.detach()
        if data.is_meta:
            raise S3ConfigError(
                f"{write_item.index.fqn} is on the meta device, and has no data to save: move the "
                "model with to_empty(), and initialize it, first"
            )
        self._add_tensor(file, write_item, data)

    def _add_tensor(self, file: OutgoingFile, write_item: WriteItem, tensor: torch.Tensor) -> None:
        plain = not self._transforms.extensions
        charge: Charge | None = None  # of memory that this tensor was copied to
        if not is_host(tensor):
            frame = _frame_on_device(tensor) if plain else None
            if frame is not None:
                self._add_framed(file, write_item, tensor, frame, self._staged(tensor))
                return
            charge = self._charge(tensor.nbytes)
            tensor = tensor.cpu()
        frame = frame_of(tensor, self._alignment)
        if frame is None and tensor.layout is torch.strided:
            # As stock DCP does for a view of a larger storage; what has gaps gets a frame this way.
            charge = charge or self._charge(tensor.nbytes)
            tensor = tensor.clone()
            frame = frame_of(tensor, self._alignment)
        if frame is None or not plain:
            self._add_bytes(file, write_item, encode(tensor))
        elif frame.length <= COPIED_BYTES:
            self._copy(file, write_item, tensor, frame)
        else:
            memory = iter([(memory_of(tensor), charge)])
            self._add_framed(file, write_item, tensor, frame, memory)
            return
        if charge is not None:
            self._release(charge)

    def _copy(
        self, file: OutgoingFile, write_item: WriteItem, tensor: torch.Tensor, frame: Frame
    ) -> None:
        """Copy a small tensor's item behind those that were copied before."""
        if file.run is None or file.run.filled + frame.length > _RUN_BYTES:
            self._end_run(file)
            file.run = Run(*self._borrow(_RUN_BYTES, pinned=False))
        run = file.run
        view = run.buffer.view[run.filled : run.filled + frame.length]
        data_at, data_end = len(frame.header), len(frame.header) + frame.data_bytes
        view[:data_at] = frame.header
        view[data_at:data_end] = memory_of(tensor)
        view[data_end:] = frame.trailer
        info = _StorageInfo(file.name, file.cutter.position + run.filled, frame.length)
        annotate(info, ItemCrcs(crc_of([view]), data_at, frame.data_bytes))
        file.copied.append(WriteResult(write_item.index, frame.length, info))
        run.filled += frame.length

    def _end_run(self, file: OutgoingFile) -> None:
        """Send the small items that were copied."""
        if (run := file.run) is not None:
            file.run, run.charge.left_bytes = None, run.filled
            self._push(file, run.buffer.view[: run.filled], Piece(charge=run.charge))

    def _add_bytes(self, file: OutgoingFile, write_item: WriteItem, data: memoryview) -> None:
        """Send an item that has no frame: bytes, or what `torch.save` wrote."""
        self._end_run(file)
        if self._transforms.extensions:
            sink = io.BytesIO()
            stream, _ = self._transforms.transform_save_stream(write_item, sink)
            stream.write(data)
            stream.close()
            data = sink.getbuffer()
        item = self._item(file, write_item)
        self._append(file, item, data, self._charge(data.nbytes))

    def _add_framed(
        self,
        file: OutgoingFile,
        write_item: WriteItem,
        tensor: torch.Tensor,
        frame: Frame,
        memory: Iterator[tuple[memoryview, Charge | None]],
    ) -> None:
        """Send an item's header, its tensor's memory cut at the edges of blocks, its trailer."""
        self._end_run(file)
        item = self._item(file, write_item)
        item.data_offset, item.data_bytes = len(frame.header), frame.data_bytes
        item.block_bytes = _block_bytes(tensor, frame)
        self._append(file, item, memoryview(frame.header))
        size, position = item.block_bytes or frame.data_bytes, 0
        for view, charge in memory:
            end = position + view.nbytes
            for a, b in cut(position, end, size):
                if a % size == 0:
                    item.blocks.append(Block(is_listed=item.block_bytes is not None))
                self._continue(file, item, view[a - position : b - position], charge)
            position = end
        self._append(file, item, memoryview(frame.trailer))

    def _item(self, file: OutgoingFile, write_item: WriteItem) -> OutgoingItem:
        descriptors = [ex.get_descriptor() for ex in reversed(self._transforms.extensions)]
        item = OutgoingItem(write_item, file.name, file.cutter.position, descriptors)
        file.items.append(item)
        return item

    def _append(
        self, file: OutgoingFile, item: OutgoingItem, view: memoryview, charge: Charge | None = None
    ) -> None:
        item.blocks.append(Block())
        self._continue(file, item, view, charge)

    def _continue(
        self, file: OutgoingFile, item: OutgoingItem, view: memoryview, charge: Charge | None
    ) -> None:
        """Send more of an item's last block."""
        item.length += view.nbytes
        self._push(file, view, Piece(item.blocks[-1], charge))

    def _push(self, file: OutgoingFile, view: memoryview, piece: Piece) -> None:
        for part in file.cutter.push(view, piece):
            self._send_held(file)
            file.held = part
            if file.is_multipart or file.sent:
                self._send_held(file)

    def _staged(self, tensor: torch.Tensor) -> Iterator[tuple[memoryview, Charge]]:
        """Yield a device tensor's memory, copied to the host in pieces."""
        source = bytes_of(tensor)
        step = min(_STAGED_BYTES, max(1 << (self._budget_bytes // 4).bit_length() >> 1, MiB))
        for start, end in cut(0, source.nbytes, step):
            buffer, charge = self._borrow(end - start, pinned=True)
            buffer.tensor.copy_(source[start:end])
            yield buffer.view, charge

    def _charge(self, size_bytes: int) -> Charge:
        self._memory.take(size_bytes)
        return Charge(size_bytes, size_bytes)

    def _borrow(self, size_bytes: int, *, pinned: bool) -> tuple[Buffer, Charge]:
        # Memory that was used before is worth more than new: 100 MB of pages take 75 ms.
        while not self._sent.empty():
            self._settle()
        buffer = self._memory.borrow(size_bytes, pinned=pinned)
        return buffer, Charge(buffer.held_bytes, size_bytes, buffer)

    def _release(self, charge: Charge) -> None:
        if charge.buffer is not None:
            self._memory.give_back(charge.buffer)
        else:
            self._memory.give(charge.held_bytes)

    def _send_held(self, file: OutgoingFile) -> None:
        if file.held is not None:
            part, file.held = file.held, None
            file.sent += 1
            moved = Moved()
            call = self._calls.submit(file.upload.send, file.sent, _views(part), moved)
            self._submit(part, moved, call)

    def _end(self, file: OutgoingFile) -> None:
        self._end_run(file)
        rest = file.cutter.rest()
        if file.held is not None and (rest or file.sent):
            self._send_held(file)
        if file.held is not None:
            rest, file.held = file.held, None
        if not file.sent and not file.is_multipart:
            moved = Moved()
            self._submit(rest, moved, self._calls.submit(file.upload.put, _views(rest), moved))
        elif rest or not file.sent:  # an upload ends with one part at least
            file.held = rest
            self._send_held(file)
        self._meter.expect(file.cutter.position - file.expected_bytes)

    def _submit(self, part: list[Fragment[Piece]], moved: Moved, future: Call[list[int]]) -> None:
        self._sending[future] = part, moved
        future.add_done_callback(self._sent.put)

    def _settle(self) -> bool:
        """Wait for a part to be sent; False: none is under way."""
        if not self._sending:
            return False
        future = self._pause.next_of(self._sent, self._meter.look)
        part, _ = self._sending.pop(future)
        crcs = future.result()
        self._meter.advance(sum(fragment.view.nbytes for fragment in part))
        for fragment, crc in zip(part, crcs, strict=True):
            piece = fragment.owner
            piece.block.sums.append((fragment.start, crc, fragment.view.nbytes))
            if (charge := piece.charge) is not None:
                charge.left_bytes -= fragment.view.nbytes
                if not charge.left_bytes:
                    self._release(charge)
        return True

    def _under_way(self) -> int:
        return sum(moved.size_bytes for _, moved in self._sending.values())

    def _complete(self) -> None:
        completing = [
            self._calls.submit(file.upload.complete, file.sent) for file in self._files if file.sent
        ]
        for future in completing:
            self._portal.wait(future)

    async def _drop(self) -> None:
        await wait_all([file.upload.abort for file in self._files])
        await delete_quietly(
            self._channel, [file.upload.uri for file in self._files if file.upload.touched]
        )


def _frame_on_device(tensor: torch.Tensor) -> Frame | None:
    """Return the frame of a device tensor whose memory can be taken as it is, in pieces."""
    if (
        type(tensor) is not torch.Tensor
        or tensor.layout is not torch.strided
        or not is_plain(tensor)
        or tensor.nbytes <= COPIED_BYTES
    ):
        return None
    return frame_for(tensor.dtype, tuple(tensor.shape))


def _block_bytes(tensor: torch.Tensor, frame: Frame) -> int | None:
    # Parts are loaded without the header, which alone says of others how to read them. One block,
    # too, tells readers that the tensor is plain.
    if not is_plain(tensor) or not tensor.ndim or not frame.data_bytes:
        return None
    return block_bytes(frame.data_bytes, frame.data_bytes // tensor.shape[0])


def _tensor_bytes(item: WriteItem) -> int:
    """Return the size of an item's tensor, or of the shard of it that the item is."""
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _views(part: Iterable[Fragment[Piece]]) -> list[memoryview]:
    return [fragment.view for fragment in part]
