"""A Hugging Face checkpoint on S3: found by its commit, read from its files' headers, replaced.

The names of its files are fixed, so that one that is replaced is overwritten in place. What readers
can be promised rests on this order and these checks:

- A save deletes the commit first, then writes the files, then the new commit. So other libraries
  find no index while files of two saves lie side by side, and a save that died leaves none.
- Every file repeats its save's id, which the commit names. A reader that finds another one, or
  that finds a file replaced after it read its header (they are pinned by ETag), ends in
  `CheckpointChangedError`.
- `model.safetensors`, which no save of ours writes, stays until the new commit is there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from s3dcp._boxes import Box, fill
from s3dcp._commit import Found
from s3dcp._downloads import Downloads
from s3dcp._errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    InvalidS3UriError,
    ObjectNotFoundError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._formats import (
    CLAIM_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    SAFETENSORS,
    SINGLE_NAME,
    SUFFIX,
)
from s3dcp._hf_index import (
    OFFSETS_KEY,
    SAVE_ID_KEY,
    SHARDING_KEY,
    Index,
    dump_index,
    parse_index,
)
from s3dcp._keys import S3Uri, child_key, join
from s3dcp._metadata import ItemCrcs, annotate
from s3dcp._portal import offload
from s3dcp._publish import already_exists, delete_quietly, exists, publish, read
from s3dcp._s3client import delete, list_all
from s3dcp._safetensors import (
    Entry,
    Header,
    TensorMemory,
    header_end,
    is_count,
    parse_header,
    parse_json,
)

_log = logging.getLogger("s3dcp.safetensors")

#: Fills memory with a file's bytes, from an offset on.
Fetch: TypeAlias = Callable[[int, memoryview], Awaitable[None]]

# So many leading bytes hold most headers; a longer one takes a second read.
_HEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored piece of a tensor.

    Attributes:
        box: Which of the tensor's elements it holds.
        file: The file's name.
        entry: Its place there.
        etag: The file's.
        crcs: Its checksums, if s3dcp wrote it.
    """

    box: Box
    file: str
    entry: Entry
    etag: str | None
    crcs: ItemCrcs | None


@dataclass(slots=True)
class StoredTensor:
    """A tensor, and the chunks that it consists of."""

    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape: as far as the chunks reach."""
        return tuple(map(max, *(chunk.box.ends for chunk in self.chunks), self.chunks[0].box.ends))


@dataclass(frozen=True, slots=True)
class File:
    """A file of a checkpoint, and the version of it that its header was read from."""

    header: Header
    etag: str | None


@dataclass(frozen=True, slots=True)
class HFCheckpoint:
    """A checkpoint as it was found.

    Attributes:
        base: Where it is.
        tensors: What is in it, by name.
        commit: The name of the object that is its commit, and that object without its content;
            None if the files speak for themselves.
    """

    base: S3Uri
    tensors: Mapping[str, StoredTensor]
    commit: tuple[str, Found] | None


async def find(channel: Channel, base: S3Uri) -> HFCheckpoint:
    """Read what a checkpoint consists of: its commit, and the headers of its files.

    Raises:
        CheckpointNotFoundError: there is none, or only a save that did not finish.
        CheckpointChangedError: it is being replaced.
        CorruptMetadataError: something in it is malformed, or does not fit together.
        S3Exception: as the store.
    """
    for name in (INDEX_NAME, MANIFEST_NAME):
        uri = child_uri(base, name)
        found = await read(channel, uri)
        if found is not None:
            index = parse_index(found.body, source=str(uri))
            files = await _read_files(channel, base, index.files, uri)
            commit = name, Found(b"", found.etag)
            return HFCheckpoint(base, await offload(tensors_of, base, files, index), commit)
    files = await _read_files(channel, base, await _uncommitted(channel, base), None)
    for name, file in files.items():
        if SAVE_ID_KEY in file.header.extra and name != SINGLE_NAME:
            for committed in (INDEX_NAME, MANIFEST_NAME):
                if await exists(channel, child_uri(base, committed)):  # by now
                    raise _replaced(base)
            raise CheckpointNotFoundError(
                f"No checkpoint at {base}: {name} is of a save that has not finished, and there "
                f"is no {INDEX_NAME}. Load another one, or save again",
                bucket=base.bucket,
                key=base.key,
            )
    return HFCheckpoint(base, await offload(tensors_of, base, files, None), None)


async def _uncommitted(channel: Channel, base: S3Uri) -> list[str]:
    """Return the files of a checkpoint that has no commit: the single one, or all there are."""
    if await exists(channel, child_uri(base, SINGLE_NAME)):
        return [SINGLE_NAME]
    folder = join(base.key, "")
    listed = await list_all(channel, S3Uri(base.bucket, folder), delimiter="/")
    if any(info.key == f"{folder}{CLAIM_NAME}" for info in listed):
        raise CheckpointNotFoundError(
            f"No checkpoint at {base}: a copy to it has not finished, as its {CLAIM_NAME} says, "
            f"and there is no {INDEX_NAME}. Copy again, or load another one; if the files are "
            f"whole without that copy, delete {CLAIM_NAME}",
            bucket=base.bucket,
            key=base.key,
        )
    names = [info.key.removeprefix(folder) for info in listed if info.key.endswith(SUFFIX)]
    if not names:
        raise CheckpointNotFoundError(
            f"No checkpoint at {base}: there is no {INDEX_NAME}, {MANIFEST_NAME} or {SINGLE_NAME}, "
            f"and no other file that ends in {SUFFIX}: load another one",
            bucket=base.bucket,
            key=base.key,
        )
    return names


async def _read_files(
    channel: Channel, base: S3Uri, names: Iterable[str], commit: S3Uri | None
) -> dict[str, File]:
    names = sorted(names)
    uris = [child_uri(base, name, source=str(commit or base)) for name in names]
    downloads = Downloads(channel)
    try:
        files = await wait_all([partial(_read_file, downloads, uri) for uri in uris])
    except ObjectNotFoundError as exc:
        if commit is None or await read(channel, commit) is None:
            raise _replaced(base) from exc
        raise CorruptMetadataError(f"{commit} names a file that is not there: {exc}") from exc
    return dict(zip(names, files, strict=True))


async def _read_file(downloads: Downloads, uri: S3Uri) -> File:
    info = await downloads.head(uri)
    return File(await read_header(downloads, uri, info.size_bytes), info.etag)


async def read_header(downloads: Downloads, uri: S3Uri, file_bytes: int) -> Header:
    """Read what a file on S3 holds.

    Raises:
        CheckpointChangedError: it is not the one that was read before.
        CorruptMetadataError: the header is malformed, or does not fit the file.
        S3Exception: as the store.
    """

    async def fetch(start: int, into: memoryview) -> None:
        await downloads.fetch(uri, start, [into])

    return await fetch_header(fetch, file_bytes, source=str(uri))


async def fetch_header(fetch: Fetch, file_bytes: int, *, source: str) -> Header:
    """Read what a file holds, wherever it is.

    Raises:
        CorruptMetadataError: the header is malformed, or does not fit the file.
        Exception: as `fetch`.
    """
    head = bytearray(min(file_bytes, _HEAD_BYTES))
    await fetch(0, memoryview(head))
    end = header_end(head, file_bytes, source=source)
    if end > len(head):
        rest = bytearray(end - len(head))
        await fetch(len(head), memoryview(rest))
        head += rest
    return await offload(partial(parse_header, head, file_bytes, source=source))


def _check_saves(base: S3Uri | Path, files: Mapping[str, File], index: Index) -> None:
    """Check that every file is of the save that the commit says."""
    for name, file in files.items():
        saved = index.saved.get(name)
        if file.header.extra.get(SAVE_ID_KEY) != (saved.save_id if saved else None):
            raise _replaced(base, f": {name} is of another save than {index.name} says")


def _replaced(base: S3Uri | Path, why: str = "") -> CheckpointChangedError:
    uri = base if isinstance(base, S3Uri) else None
    return CheckpointChangedError(
        f"The checkpoint at {base} was replaced while it was being read, or a save that replaces "
        f"it has not finished: load it again{why}",
        bucket=uri.bucket if uri else None,
        key=uri.key if uri else None,
    )


def tensors_of(
    base: S3Uri | Path, files: Mapping[str, File], index: Index | None
) -> dict[str, StoredTensor]:
    """Put together what files hold of each tensor.

    Args:
        base: Where they are.
        files: Those that the index names, or all.
        index: What says which file each tensor is in, if anything does.

    Raises:
        CheckpointChangedError: a file is of another save than the index says.
        CorruptMetadataError: a tensor is missing, or is not whole.
    """
    if index is not None:
        _check_saves(base, files, index)
    weight_map = index.weight_map if index else None
    tensors: dict[str, StoredTensor] = {}
    for file_name, file in files.items():
        source = join(str(base), file_name)
        saved = index.saved.get(file_name) if index else None
        offsets = _saved_offsets(file.header, source)
        for name, entry in file.header.entries.items():
            if weight_map is not None and weight_map.get(name) != file_name:
                continue  # a copy, or what the index leaves out
            box = Box(offsets.get(name, (0,) * len(entry.shape)), entry.shape)
            tensor = tensors.setdefault(name, StoredTensor(entry.dtype))
            crcs = saved.crcs.get(name) if saved else None
            tensor.chunks.append(Chunk(box, file_name, entry, file.etag, crcs))
    if weight_map is not None and (missing := weight_map.keys() - tensors.keys()):
        some = ", ".join(sorted(missing)[:3])
        raise CorruptMetadataError(
            f"{base} has no tensor in the file that its {INDEX_NAME} names for it: {some}"
        )
    for name, tensor in tensors.items():
        _check_whole(base, name, tensor)
    return tensors


def _saved_offsets(header: Header, source: str) -> dict[str, tuple[int, ...]]:
    """Return where each shard of a file starts in its tensor, as DCP notes it."""
    text = header.extra.get(SHARDING_KEY)
    if text is None:
        return {}
    try:
        described = parse_json(text.encode())
        return {
            name: _checked_offsets(described[name][OFFSETS_KEY], entry)
            for name, entry in header.entries.items()
        }
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CorruptMetadataError(f"{source} has malformed {SHARDING_KEY}: {exc!r}") from exc


def _checked_offsets(offsets: Any, entry: Entry) -> tuple[int, ...]:
    if not isinstance(offsets, list) or len(offsets) != len(entry.shape):
        raise ValueError(f"offsets {offsets!r:.100} for the shape {entry.shape}")
    if not all(
        is_count(a) and is_count(a + size) for a, size in zip(offsets, entry.shape, strict=True)
    ):
        raise ValueError(f"offsets {offsets!r:.100} are none")
    return tuple(offsets)


def _check_whole(base: S3Uri | Path, name: str, tensor: StoredTensor) -> None:
    first, *others = tensor.chunks
    for chunk in others:
        if chunk.entry.dtype != first.entry.dtype or len(chunk.box.sizes) != len(first.box.sizes):
            raise CorruptMetadataError(
                f"{name} is not of one dtype and rank in {first.file} and {chunk.file} of {base}"
            )
    if not fill(tensor.shape, [chunk.box for chunk in tensor.chunks]):
        raise CorruptMetadataError(
            f"{name}: the {len(tensor.chunks)} shards in {base} do not make up a whole tensor of "
            f"shape {tensor.shape}: files are missing, or are of several saves"
        )


def metadata_of(checkpoint: HFCheckpoint) -> Metadata:
    """Return what DCP plans a load with."""
    described: dict[str, Any] = {}
    storage_data: dict[MetadataIndex, TensorMemory] = {}
    for name, tensor in checkpoint.tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            offsets = torch.Size(chunk.box.offsets)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.box.sizes)))
            size = chunk.entry.end - chunk.entry.start
            info = TensorMemory(chunk.file, chunk.entry.start, size)
            info.etag = chunk.etag
            if chunk.crcs is not None:
                annotate(info, chunk.crcs._replace(data_offset=0, data_bytes=size))
            storage_data[MetadataIndex(name, offsets)] = info
        properties = TensorProperties(dtype=tensor.dtype)
        described[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    return Metadata(state_dict_metadata=described, storage_data=storage_data)


async def begin(channel: Channel, base: S3Uri, *, overwrite: bool) -> set[str]:
    """Give up the checkpoint that is there, right before its files are overwritten.

    Returns:
        Names of its files, those to delete among them once the new one is committed.

    Raises:
        CheckpointExistsError: there is one, and `overwrite` is false.
        S3Exception: as the store; it is then as it was.
    """
    stale: set[str] = set()
    commits = []
    for name in (INDEX_NAME, MANIFEST_NAME):
        if (found := await read(channel, uri := child_uri(base, name))) is not None:
            commits.append(uri)
            stale |= _files_of(found, uri)
    if await exists(channel, single := child_uri(base, SINGLE_NAME)):
        stale.add(SINGLE_NAME)
    if (commits or stale) and not overwrite:
        raise already_exists(commits[0] if commits else single)
    for uri in commits:
        _log.info("replacing the checkpoint at %s", base)
        await delete(channel, uri)
    return stale


async def commit(
    channel: Channel, base: S3Uri, index: Index, stale: set[str], *, overwrite: bool
) -> None:
    """Publish a checkpoint whose files are there, and delete those that it replaced.

    Raises:
        CheckpointExistsError: another writer committed first, and `overwrite` is false.
        CommitConflictError: another writer committed while our outcome was unknown.
        S3Exception: as the store.
    """
    uri = child_uri(base, index.name)
    replaced = await publish(channel, uri, await offload(dump_index, index), overwrite=overwrite)
    if replaced is not None:
        stale = stale | _files_of(replaced, uri)
    stale = {name for name in stale if SAFETENSORS.is_own(name)}  # whatever an index says
    await delete_quietly(channel, [child_uri(base, name) for name in sorted(stale - index.files)])
    _log.info("committed %s", uri)


def _files_of(found: Found, uri: S3Uri) -> set[str]:
    """Return the files that a commit names, or none if it cannot be read."""
    try:
        names = parse_index(found.body, source=str(uri)).files
        base = S3Uri(uri.bucket, uri.key.rpartition("/")[0])
        for name in names:
            child_uri(base, name, source=str(uri))
    except (CorruptMetadataError, InvalidS3UriError) as exc:
        _log.warning("files of the checkpoint that is replaced are left in place: %s", exc)
        return set()
    return names


def child_uri(base: S3Uri, name: str, source: str = "s3dcp") -> S3Uri:
    """Return the place of a checkpoint's file; `source` is where its name was read.

    Raises:
        InvalidS3UriError: the name leads out of the checkpoint.
    """
    return S3Uri(base.bucket, child_key(base.key, name, source=source))
