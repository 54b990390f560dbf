"""Reads what lies under a URI: one listing, and the commits that it shows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from s3dcp._commit import Found
from s3dcp._downloads import Downloads
from s3dcp._errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CorruptMetadataError,
    InvalidS3UriError,
    ObjectNotFoundError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._formats import DCP, FORMATS, SAFETENSORS, Format, FormatName, holds_data
from s3dcp._hf_files import read_header
from s3dcp._hf_index import Index, parse_index
from s3dcp._inventory import (
    Checkpoint,
    Contents,
    ancestors,
    commits_by_folder,
    only,
    problem_of,
)
from s3dcp._keys import S3Uri, child_key
from s3dcp._metadata import load_metadata
from s3dcp._portal import offload
from s3dcp._publish import read
from s3dcp._s3client import list_all
from s3dcp._store import ObjectInfo

_log = logging.getLogger("s3dcp.catalog")

# Commits are small, and there may be thousands: several are fetched at once, while a single one is
# unpickled, which takes ten times its size in memory.
_READ_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found.

    Attributes:
        listing: Every object at and below the URI.
        checkpoints: Those at and below it, in their order.
        everywhere: These, and those above it, which may name objects below.
    """

    listing: Sequence[ObjectInfo]
    checkpoints: Sequence[Checkpoint]
    everywhere: Sequence[Checkpoint]


async def survey(
    channel: Channel, root: S3Uri, known: Iterable[Checkpoint] = (), *, look_above: bool = True
) -> Survey:
    """List what is there, and read the commits that are not known yet."""
    listing = await list_all(channel, root)
    above = [S3Uri(root.bucket, folder) for folder in ancestors(root.key) if look_above]
    places = [(uri, format_) for uri in above for format_ in FORMATS]
    commits_above = await wait_all(
        [partial(_commits_above, channel, uri, format_) for uri, format_ in places]
    )
    found = [(*place, commits) for place, commits in zip(places, commits_above, strict=True)]
    found += [
        (S3Uri(root.bucket, folder), format_, commits)
        for format_ in FORMATS
        for folder, commits in commits_by_folder(listing, format_).items()
    ]
    reader = CommitReader(channel, listing, known)
    read_all = await wait_all([partial(reader.checkpoint, *each) for each in found])
    everywhere = sorted(
        (each for each in read_all if each is not None), key=lambda each: each.order
    )
    return Survey(
        listing=listing,
        checkpoints=[each for each in everywhere if each.folder not in above],
        everywhere=everywhere,
    )


async def _commits_above(
    channel: Channel, folder: S3Uri, format_: Format
) -> tuple[ObjectInfo, ...]:
    try:
        return await commits_in(channel, folder, format_)
    except AccessDeniedError as exc:
        # Who may not look there does not save there.
        _log.warning("not looked for checkpoints in %s: %s", folder, exc)
        return ()


async def commits_in(
    channel: Channel, folder: S3Uri, format_: Format = DCP
) -> tuple[ObjectInfo, ...]:
    """Return the commits that lie directly in a folder, without listing what is below it."""
    prefixes = [S3Uri(folder.bucket, f"{folder.key}{name}") for name in format_.prefixes]
    found = await wait_all(
        [partial(list_all, channel, prefix, delimiter="/") for prefix in prefixes]
    )
    listing = [info for infos in found for info in infos]
    return commits_by_folder(listing, format_).get(folder.key, ())


async def checkpoint_in(
    channel: Channel, folder: S3Uri, name: FormatName | None
) -> tuple[Format, tuple[ObjectInfo, ...]]:
    """Return the format of the checkpoint in a folder, and its commits.

    There may be none of the latter if safetensors are asked for: such files need none.

    Raises:
        CheckpointNotFoundError: there is none.
        S3ConfigError: there is one of each, and no `name` to say which.
    """
    commits = await wait_all([partial(commits_in, channel, folder, each) for each in FORMATS])
    found = dict(zip(FORMATS, commits, strict=True))
    if name == SAFETENSORS.name:
        return SAFETENSORS, found[SAFETENSORS]
    chosen = only(name, [each for each in FORMATS if found[each]], folder)
    return chosen, found[chosen]


class CommitReader:
    """Reads what commits say.

    Args:
        channel: The client's.
        listing: The objects that are there.
        known: What has been read before.
    """

    def __init__(
        self, channel: Channel, listing: Iterable[ObjectInfo], known: Iterable[Checkpoint] = ()
    ) -> None:
        self._channel = channel
        self._sizes = {info.key: info.size_bytes for info in listing}
        self._known = {each.commits: each.contents for each in known}
        self._reading = asyncio.Semaphore(_READ_AT_ONCE)
        self._unpickling = asyncio.Lock()

    async def checkpoint(
        self, folder: S3Uri, format_: Format, commits: tuple[ObjectInfo, ...]
    ) -> Checkpoint | None:
        """Return the checkpoint in a folder, or None if it is gone by now."""
        sizes: Mapping[str, int] = self._sizes
        contents = self._known.get(commits)
        if contents is None:
            async with self._reading:
                contents, etags = await self._contents(folder, format_, commits)
            if etags != {info.key: info.etag for info in commits}:
                # Replaced or deleted since it was listed, and with it what it names.
                listing = await list_all(self._channel, folder)
                sizes = {info.key: info.size_bytes for info in listing}
                commits = tuple(
                    replace(info, etag=etags[info.key])
                    for info in commits_by_folder(listing, format_).get(folder.key, ())
                    if info.key in etags
                )
        if not commits:
            return None
        if format_ is SAFETENSORS:
            # Commits have no sizes: a file is as long as its own header says, for `verify` to see.
            found = {key: sizes.get(key, 0) for key in contents.least_bytes}
            contents = replace(contents, least_bytes=found)
        problem = problem_of(commits, contents, sizes)
        return Checkpoint(
            folder=folder, commits=commits, contents=contents, problem=problem, format=format_
        )

    async def _contents(
        self, folder: S3Uri, format_: Format, commits: tuple[ObjectInfo, ...]
    ) -> tuple[Contents, dict[str, str | None]]:
        """Return what the commits that are still there say, and their ETags."""
        summary = _Summary(folder)
        etags = {}
        for info in commits:
            uri = S3Uri(folder.bucket, info.key)
            found: Found | ObjectInfo | None
            if holds_data(info.key):
                found = await self._single(summary, uri)
            else:
                found = await self._body(summary, format_, uri)
            if found is not None:
                etags[info.key] = found.etag
        return summary.contents(), etags

    async def _body(self, summary: _Summary, format_: Format, uri: S3Uri) -> Found | None:
        """Take note of a commit of which all is to be read."""
        found = await read(self._channel, uri)
        if found is not None:
            async with self._unpickling:
                await offload(summary.add, format_, found.body, uri)
        return found

    async def _single(self, summary: _Summary, uri: S3Uri) -> ObjectInfo | None:
        """Take note of a file that is a commit and all of its data."""
        downloads = Downloads(self._channel)
        try:
            info = await downloads.head(uri)
        except ObjectNotFoundError:
            return None
        summary.ours = False  # no save of ours calls a file so
        try:
            header = await read_header(downloads, uri, info.size_bytes)
        except ObjectNotFoundError:
            return None
        except (AccessDeniedError, CorruptMetadataError, CheckpointChangedError) as exc:
            summary.damage = str(exc)  # denied: archived, perhaps
        else:
            summary.tensors.update(header.entries)
        summary.least_bytes[uri.key] = 0
        return info


@dataclass(slots=True)
class _Summary:
    """What is kept of a folder's commits, which are large."""

    folder: S3Uri
    least_bytes: dict[str, int] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=set)
    unreadable: str | None = None
    damage: str | None = None
    ours: bool = True

    def add(self, format_: Format, body: bytes | bytearray, uri: S3Uri) -> None:
        """Take note of a commit."""
        try:
            if format_ is DCP:
                self._add_metadata(load_metadata(body, source=str(uri)), uri)
            else:
                self._add_index(parse_index(body, source=str(uri)), uri)
        except (CorruptMetadataError, InvalidS3UriError) as exc:
            self.unreadable = str(exc)

    def _add_metadata(self, metadata: Metadata, uri: S3Uri) -> None:
        for name, end in ends_of(metadata).items():
            key = child_key(self.folder.key, name, source=str(uri))
            self.least_bytes[key] = max(self.least_bytes.get(key, 0), end)
        self.tensors.update(
            fqn
            for fqn, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        )

    def _add_index(self, index: Index, uri: S3Uri) -> None:
        for name in index.files:
            self.least_bytes[child_key(self.folder.key, name, source=str(uri))] = 0
        self.tensors.update(index.tensors)
        self.ours = self.ours and bool(index.saved) and index.files <= index.saved.keys()

    def contents(self) -> Contents:
        return Contents(
            least_bytes=self.least_bytes,
            tensors=len(self.tensors),
            unreadable=self.unreadable,
            damage=self.damage,
            ours=self.ours,
        )


def ends_of(metadata: Metadata) -> dict[str, int]:
    """Return where the last item of each object ends, by the object's name."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        if end >= ends.get(info.relative_path, 0):
            ends[info.relative_path] = end
    return ends
