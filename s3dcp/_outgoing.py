"""What a save keeps of the bytes on their way: files, items, their blocks, whose memory it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from s3dcp._checksums import combine
from s3dcp._metadata import ItemCrcs, annotate
from s3dcp._ranges import Fragment, PartCutter
from s3dcp._staging import Buffer
from s3dcp._torch_internals import _StorageInfo
from s3dcp._uploads import Upload


@dataclass(slots=True, eq=False)
class Charge:
    """Memory of ours that is charged to the budget until every byte of it has been sent.

    Attributes:
        held_bytes: What is charged.
        left_bytes: What has not been sent.
        buffer: The memory, if it is to be used again.
    """

    held_bytes: int
    left_bytes: int
    buffer: Buffer | None = None


@dataclass(slots=True, eq=False)
class Block:
    """Some bytes of an item that have one CRC, which the metadata names where it `is_listed`.

    A block may be spread over several parts, which arrive in any order: `sums` has, for each, where
    it starts, its CRC and its length.
    """

    is_listed: bool = False
    sums: list[tuple[int, int, int]] = field(default_factory=list)

    def sum(self) -> tuple[int, int]:
        """Return the block's CRC and length."""
        if len(self.sums) == 1:
            [(_, crc, size)] = self.sums
            return crc, size
        ordered = [(crc, size) for _, crc, size in sorted(self.sums)]
        return combine(ordered), sum(size for _, size in ordered)


@dataclass(slots=True, eq=False)
class Piece:
    """Some bytes on their way: of which block, and what their memory is charged to."""

    block: Block = field(default_factory=Block)
    charge: Charge | None = None


@dataclass(slots=True, eq=False)
class OutgoingItem:
    """An item and where it lies."""

    write_item: WriteItem
    name: str
    offset: int
    descriptors: list[str]
    length: int = 0
    data_offset: int | None = None
    data_bytes: int | None = None
    block_bytes: int | None = None
    blocks: list[Block] = field(default_factory=list)

    def result(self) -> WriteResult:
        """Return what DCP records of the item, with its CRCs."""
        info = _StorageInfo(
            self.name, self.offset, self.length, transform_descriptors=self.descriptors or None
        )
        sums = [block.sum() for block in self.blocks]
        blocks = tuple(
            crc for block, (crc, _) in zip(self.blocks, sums, strict=True) if block.is_listed
        )
        places = self.data_offset, self.data_bytes, self.block_bytes
        annotate(info, ItemCrcs(combine(sums), *places, blocks))
        return WriteResult(
            index=self.write_item.index, size_in_bytes=self.length, storage_data=info
        )


@dataclass(slots=True, eq=False)
class Run:
    """Memory that small items are copied to, one behind the other."""

    buffer: Buffer
    charge: Charge
    filled: int = 0


@dataclass(slots=True, eq=False)
class OutgoingFile:
    """An object being written.

    Attributes:
        expected_bytes: Roughly its size.
        is_multipart: Whether the upload has been begun.
        items: Those that are sent from where they lie.
        run: Small items that wait for more to follow them.
        copied: What DCP records of small items.
        held: A full part that waits for more to follow it: the only part of an object is a PUT.
        sent: How many parts have been handed to the portal.
    """

    name: str
    upload: Upload
    cutter: PartCutter[Piece]
    expected_bytes: int
    is_multipart: bool
    items: list[OutgoingItem] = field(default_factory=list)
    run: Run | None = None
    copied: list[WriteResult] = field(default_factory=list)
    held: list[Fragment[Piece]] | None = None
    sent: int = 0
