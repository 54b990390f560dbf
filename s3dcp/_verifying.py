"""A checkpoint looked into: its tensors, and whether its stored bytes are those that were saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from s3dcp._checksums import combine
from s3dcp._config import MiB
from s3dcp._downloads import Downloads
from s3dcp._errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    InvalidS3UriError,
    ObjectNotFoundError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._formats import DCP, SAFETENSORS, Format, FormatName
from s3dcp._hf_files import StoredTensor, find
from s3dcp._inventory import folder_of, no_checkpoint, place_of
from s3dcp._keys import S3Uri, child_key
from s3dcp._metadata import crcs_of, load_metadata
from s3dcp._portal import offload
from s3dcp._publish import read
from s3dcp._ranges import Span, Want, coalesce
from s3dcp._s3client import list_all
from s3dcp._store import ObjectInfo
from s3dcp._survey import checkpoint_in, commits_in

_READ_BYTES = 8 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPiece:
    """One stored piece of an entry of the state dict.

    Attributes:
        key: The object that holds it.
        offset: Where it starts in the object.
        length: Its size in bytes, in a `.distcp` with the header and trailer of `torch.save`.
        crc: Its CRC64NVME, if it was saved by s3dcp.
    """

    key: str
    offset: int
    length: int
    crc: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEntry:
    """An entry of the state dict.

    Attributes:
        name: Its name, dots and all.
        shape: Of the whole tensor; None if it is none.
        dtype: As torch writes it, without `torch.`; None if it is no tensor.
        pieces: Where they are, in the order of the commits.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    pieces: list[StoredPiece] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes up in storage."""
        return sum(piece.length for piece in self.pieces)

    @property
    def keys(self) -> list[str]:
        """The objects that hold it."""
        return sorted({piece.key for piece in self.pieces})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verification found.

    Attributes:
        objects: How many data objects there should be.
        verified: How many items were compared with their CRC.
        unverified: How many have none, as another library saved them: only sizes were checked.
        size_bytes: Bytes that were read.
        problems: What is wrong, a line each.
    """

    objects: int
    verified: int
    unverified: int
    size_bytes: int
    problems: tuple[str, ...]


async def inspect(
    channel: Channel, uri: S3Uri, format_name: FormatName | None = None
) -> list[StoredEntry]:
    """Return what a checkpoint's commits describe, by name.

    Args:
        channel: The client's.
        uri: The checkpoint's place.
        format_name: Which one is meant, where there are several.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointChangedError: it is being replaced.
        CorruptMetadataError: a commit, or a safetensors file's header, cannot be read.
        InvalidS3UriError: one names an object outside of the checkpoint's folder.
        S3ConfigError: there are several, and no `format_name`.
        S3Exception: as the store.
    """
    folder = folder_of(uri)
    entries = await _entries(channel, folder, *await checkpoint_in(channel, folder, format_name))
    # Objects without items have a name too.
    return [entry for entry in entries if entry.size_bytes or entry.dtype is not None]


async def verify(
    channel: Channel,
    uri: S3Uri,
    *,
    budget_bytes: int,
    format_name: FormatName | None = None,
    progress: Callable[[int, int], None] = lambda _count, _total: None,
) -> Verdict:
    """Read a checkpoint's objects, and compare them with what its commits say of them.

    Safetensors files must have the size and the tensors that their headers and the index say.

    Args:
        channel: The client's.
        uri: The checkpoint's place.
        budget_bytes: Memory for what is being read; at least one buffer of 8 MiB is used.
        format_name: Which checkpoint is meant, where there are several.
        progress: Told, on the portal's thread, how many bytes have been read since, and of how
            many in all.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointChangedError: it was replaced or deleted meanwhile.
        S3ConfigError: there are several, and no `format_name`.
        S3Exception: as the store: it is not known whether the checkpoint is whole.
    """
    folder = folder_of(uri)
    format_, commits = await checkpoint_in(channel, folder, format_name)
    try:
        entries = await _entries(channel, folder, format_, commits)
    except (CorruptMetadataError, InvalidS3UriError, CheckpointChangedError) as exc:
        # A file of another save than the index says: in passing, or for good.
        passing = isinstance(exc, CheckpointChangedError)
        if passing and await commits_in(channel, folder, format_) != commits:
            raise
        return Verdict(objects=0, verified=0, unverified=0, size_bytes=0, problems=(str(exc),))
    by_key: dict[str, list[_Checked]] = {}
    for entry in entries:
        for piece in entry.pieces:
            by_key.setdefault(piece.key, []).append(_Checked(entry.name, piece))
    problems = _wrong_sizes(folder.bucket, by_key, await list_all(channel, folder))
    sound = {key: pieces for key, pieces in by_key.items() if key not in problems}
    spans = [
        (S3Uri(folder.bucket, key), span)
        for key, pieces in sorted(sound.items())
        for span in coalesce(
            [Want(each.piece.offset, each.end, each) for each in pieces if each.has_crc],
            max_gap=0,
            max_span=_READ_BYTES,
        )
    ]
    total = sum(span.size_bytes for _, span in spans)
    progress(0, total)
    buffers = max(1, min(channel.slots.count, budget_bytes // _READ_BYTES, len(spans)))
    await _read_all(channel, spans, buffers, lambda count: progress(count, total))
    checked = [each for pieces in sound.values() for each in pieces if each.piece.length]
    wrong = [each for each in checked if each.has_crc and not each.is_whole]
    if (problems or wrong) and await commits_in(channel, folder, format_) != commits:
        raise _changed(folder)
    return Verdict(
        objects=len(by_key),
        verified=sum(each.has_crc for each in checked),
        unverified=sum(not each.has_crc for each in checked),
        size_bytes=total,
        problems=(
            *problems.values(),
            *(
                f"Bytes [{each.piece.offset}, {each.end}) of "
                f"{S3Uri(folder.bucket, each.piece.key)}, of {each.name!r}, differ from those that "
                "were saved (CRC64NVME)"
                for each in wrong
            ),
        ),
    )


def _wrong_sizes(
    bucket: str, by_key: Mapping[str, Sequence[_Checked]], listing: Iterable[ObjectInfo]
) -> dict[str, str]:
    """Return what is wrong with the objects that are missing or cut short, by key."""
    sizes = {info.key: info.size_bytes for info in listing}
    problems = {}
    for key, pieces in sorted(by_key.items()):
        end = max(each.end for each in pieces)
        if key not in sizes:
            problems[key] = f"{S3Uri(bucket, key)} is missing"
        elif sizes[key] < end:
            problems[key] = f"{S3Uri(bucket, key)} has {sizes[key]} bytes, not {end}"
    return problems


@dataclass(slots=True, eq=False)
class _Checked:
    """An item, and the offset, CRC and size of its pieces that were read."""

    name: str
    piece: StoredPiece
    sums: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Where it ends in its object."""
        return self.piece.offset + self.piece.length

    @property
    def has_crc(self) -> bool:
        """Whether there is something to compare it with."""
        return self.piece.crc is not None

    @property
    def is_whole(self) -> bool:
        """Whether what was read is what was saved."""
        return combine((crc, size) for _, crc, size in sorted(self.sums)) == self.piece.crc


async def _read_all(
    channel: Channel,
    spans: Iterable[tuple[S3Uri, Span[_Checked]]],
    buffers: int,
    advance: Callable[[int], None],
) -> None:
    """Read spans into as many buffers at a time, and take note of their pieces' CRCs."""
    downloads = Downloads(channel)
    queue = iter(spans)

    async def work() -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        for uri, span in queue:
            view = buffer[: span.size_bytes]
            views = [view[w.start - span.start : w.end - span.start] for w in span.pieces]
            try:
                crcs = await downloads.fetch(uri, span.start, [view], views)
            except ObjectNotFoundError as exc:
                raise _changed(uri) from exc
            for want, crc in zip(span.pieces, crcs, strict=True):
                want.owner.sums.append((want.start, crc, want.end - want.start))
            advance(span.size_bytes)

    await wait_all([work] * buffers)


def _changed(uri: S3Uri) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{place_of(uri)} was replaced or deleted while it was being verified: verify again",
        bucket=uri.bucket,
        key=uri.key,
    )


async def _entries(
    channel: Channel, folder: S3Uri, format_: Format, commits: Iterable[ObjectInfo]
) -> list[StoredEntry]:
    if format_ is SAFETENSORS:
        try:
            tensors = (await find(channel, folder)).tensors
        except CheckpointNotFoundError as exc:
            if not await commits_in(channel, folder, DCP):
                raise
            raise no_checkpoint(folder, [SAFETENSORS], [DCP]) from exc
        return [_tensor_entry(folder, name, tensors[name]) for name in sorted(tensors)]
    entries: dict[str, StoredEntry] = {}
    seen = False
    for info in commits:
        uri = S3Uri(folder.bucket, info.key)
        found = await read(channel, uri)
        if found is not None:
            seen = True
            await offload(_add, entries, found.body, folder, uri)
    if not seen:
        raise no_checkpoint(folder, [format_])
    return [entries[name] for name in sorted(entries)]


def _tensor_entry(folder: S3Uri, name: str, tensor: StoredTensor) -> StoredEntry:
    return StoredEntry(
        name=name,
        shape=tensor.shape,
        dtype=_dtype_name(tensor.dtype),
        pieces=[
            StoredPiece(
                key=child_key(folder.key, chunk.file, source=str(folder)),
                offset=chunk.entry.start,
                length=chunk.entry.end - chunk.entry.start,
                crc=None if chunk.crcs is None else chunk.crcs.item,
            )
            for chunk in tensor.chunks
        ],
    )


def _add(
    entries: dict[str, StoredEntry], body: bytes | bytearray, folder: S3Uri, uri: S3Uri
) -> None:
    """Add what a commit describes."""
    metadata = load_metadata(body, source=str(uri))
    keys: dict[str, str] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if name not in keys:
            keys[name] = child_key(folder.key, name, source=str(uri))
        if index.fqn not in entries:
            entries[index.fqn] = _entry(index.fqn, metadata)
        crcs = crcs_of(info)
        entries[index.fqn].pieces.append(
            StoredPiece(
                key=keys[name],
                offset=info.offset,
                length=info.length,
                crc=None if crcs is None else crcs.item,
            )
        )


def _entry(name: str, metadata: Metadata) -> StoredEntry:
    described = metadata.state_dict_metadata.get(name)
    if not isinstance(described, TensorStorageMetadata):
        return StoredEntry(name=name, shape=None, dtype=None)
    dtype = _dtype_name(described.properties.dtype)
    return StoredEntry(name=name, shape=tuple(described.size), dtype=dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
