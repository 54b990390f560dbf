"""A checkpoint copied between S3 and a disk, or within S3: data first, its commits last."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from s3dcp._budget import budget
from s3dcp._cancellation import in_thread
from s3dcp._commit import nested_commits
from s3dcp._config import S3ClientConfig
from s3dcp._copies import PARTIAL_SUFFIX, Manifest, others, plan
from s3dcp._disk import typed
from s3dcp._errors import (
    CheckpointChangedError,
    CheckpointExistsError,
    CommitConflictError,
    CorruptMetadataError,
    DiskError,
    InvalidS3UriError,
    S3ConfigError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._formats import CLAIM_NAME, FORMATS, Format, FormatName, holds_data
from s3dcp._inventory import folder_of, only
from s3dcp._keys import parse_s3_uri, uri_text
from s3dcp._manifests import manifest_of, names_of, read_commits
from s3dcp._movers import Cargo, Room, copy_within, download, same_files
from s3dcp._places import Bucket, Folder
from s3dcp._portal import offload
from s3dcp._s3client import S3Client
from s3dcp._sending import upload
from s3dcp._store import ObjectInfo
from s3dcp._tally import Tally, Totals

_log = logging.getLogger("s3dcp.copies")

#: Told how many bytes more are done, and of how many in all; on the portal's thread.
Progress = Callable[[int, int], None]


def _silent(_count: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy did.

    Attributes:
        objects: How many files the checkpoint has, but for what only describes them.
        size_bytes: Their size.
        copied_objects: How many of them were not there already.
        copied_bytes: Bytes that were moved: less than the size of these objects where one was
            there in part.
        verified: How many items were compared with checksums: their own, or the store's of the
            whole file.
        unverified: How many of those copied were not: there are none, or it was not asked for.
        totals: The requests.
    """

    objects: int
    size_bytes: int
    copied_objects: int
    copied_bytes: int
    verified: int
    unverified: int
    totals: Totals


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: FormatName | None = None,  # noqa: A002 - the word that its users know
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = _silent,
    comparing: Progress = _silent,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> CopyReport:
    """Copy a checkpoint from S3 to a disk, from a disk to S3, or within S3.

    What its commits name is copied first, and the commits last: what was cut off does not look
    like a checkpoint. The same call then goes on where it ended, as long as the source has not
    changed: objects that were whole stay, a file on a disk grows on from its length, and the parts
    that an upload has are compared with the file, and not sent again. Until then they are stored
    and paid for, where no `abort_uploads` removes them.

    With a checkpoint of safetensors files goes what lies beside them in its folder and is called
    `*.json`, `*.txt`, `*.model`, `*.py`, `*.md`, `*.jinja` or `*.tiktoken`, as a model's
    configuration and its tokenizer are. Not so what is called otherwise, what lies in folders below
    it (the shards of which the files were made, in `sharded/`, are a checkpoint of their own), and
    indices of other weights.

    Only DCP that s3dcp saved has names of its own in every save. Names of safetensors, of what lies
    beside them, and of what torch's own writer saved (`__0_0.distcp`) do not tell which version
    they are. So those at the target are compared, by size and CRC64NVME: the same ones stay, also
    of a run that was cut off, and any other one is another checkpoint's. What is on a disk, or in a
    store that keeps no CRC64NVME, is read for that.

    Let one process at a time copy to a place. On a disk another one is refused. In a bucket it is
    found out only before the commit, when objects that both call the same may be the other's.

    Args:
        source: The checkpoint's folder, `s3://bucket/folder` or a path.
        target: The copy's own folder.
        format: Which checkpoint is meant, where there are both.
        overwrite: Whether another checkpoint that is there may be replaced. It stays loadable
            until the commit if both use different names, as s3dcp's saves do; else it goes first.
        verify: Compare the checksums (CRC64NVME) of items that have one as they pass by. Of files
            with other items, and within S3, where nothing passes by, the store's checksum of the
            whole file, if there is one: what was read with it, the copy's with it, or what was sent
            with what arrived. Before that, the headers of safetensors files are read: they must fit
            the files and the index.
        progress: Told, on another thread, how many bytes more are copied, and of how many in all.
        comparing: The same of what has to be read before that, to compare what is there already.
        region: The buckets' region.
        s3client_config: Settings of the client.

    Raises:
        S3ConfigError: neither place is on S3, both are the same, or the source has checkpoints of
            both formats, and no `format`.
        CheckpointNotFoundError: there is none at the source.
        CheckpointExistsError: another one is at the target, or another file of the same name.
        CheckpointChangedError: the source was changed meanwhile.
        CommitConflictError: another process copies to the same place.
        IntegrityError: the source is damaged or incomplete, or the store's copy of it is.
        CorruptMetadataError, InvalidS3UriError: so are its commits or its files' headers, or they
            name what lies outside of the folder.
        DiskError: the disk refused something, or something else is in the way of a file.
        S3Exception: as the store.
    """
    client = S3Client(region, s3client_config)
    tally = Tally()
    portal, channel = client.connect(tally)
    copying = _Copying(
        source=_place(source, channel),
        target=_place(target, channel),
        format_name=format,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        comparing=comparing,
    )
    if isinstance(copying.source, Folder) and isinstance(copying.target, Folder):
        raise S3ConfigError(f"One of {source} and {target} must be an s3:// URI")
    if str(copying.source) == str(copying.target):
        raise S3ConfigError(f"{target} is what is to be copied: copy it to another place")
    config = client.s3client_config
    limit_bytes = config.memory_bytes()
    room = Room(
        memory_bytes=limit_bytes // 2,
        part_bytes=config.part_size,
        connections=channel.slots.count,
    )
    with typed(), budget().share(limit_bytes) as share:
        share.take(room.memory_bytes)  # not all, so that saves and loads can go on
        portal.call(copying.prepare, room)
        with copying.target.alone():
            portal.call(copying.run, room)
    return copying.report(tally.totals())


async def acopy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: FormatName | None = None,  # noqa: A002 - as above
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = _silent,
    comparing: Progress = _silent,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> CopyReport:
    """Await `copy`, from any event loop, which goes on meanwhile.

    Cancelling ends its requests; the same call then goes on where it ended.

    Its arguments, and what it returns and raises, are those of `copy`.
    """
    return await in_thread(
        copy,
        source,
        target,
        format=format,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        comparing=comparing,
        region=region,
        s3client_config=s3client_config,
    )


def _place(path: str | os.PathLike[str], channel: Channel) -> Bucket | Folder:
    text = uri_text(path)
    if "://" in text:
        return Bucket(channel, folder_of(parse_s3_uri(text)))
    if not text:
        raise S3ConfigError("A path must not be empty: write s3://BUCKET/PREFIX, or a folder's")
    if "\0" in text:
        raise S3ConfigError(
            f"No folder can be called {text!r}: write s3://BUCKET/PREFIX, or a path"
        )
    return Folder(Path(text).absolute())


@dataclass(frozen=True, slots=True)
class _There:
    """What is at the target.

    Attributes:
        commits: Those of the copy's format; without their bytes where these are data.
        sizes: Of the files that have names of the copy's.
        claim: What it is going to be a copy of, if any was begun.
        same: The bare ones among them that have the very bytes.
    """

    commits: Mapping[str, bytes]
    sizes: Mapping[str, int]
    claim: bytes | None
    same: frozenset[str]


@dataclass(slots=True, kw_only=True)
class _Copying:
    """One copy. `prepare` and `run` are for the portal."""

    source: Bucket | Folder
    target: Bucket | Folder
    format_name: FormatName | None
    overwrite: bool
    verify: bool
    progress: Progress
    comparing: Progress
    manifest: Manifest = field(init=False)
    _format: Format = field(init=False)
    _from: tuple[ObjectInfo, ...] = field(init=False)
    _compared: dict[ObjectInfo, bool] = field(default_factory=dict)
    _copied: tuple[ObjectInfo, ...] = ()
    _resumed_bytes: int = 0
    _vouched: set[str] = field(default_factory=set)

    async def prepare(self, room: Room) -> None:
        """Find out what is to be copied, and refuse it before anything is changed."""
        commits = {each: await self.source.commits(each) for each in FORMATS}
        there = [each for each in FORMATS if commits[each]]
        self._format = only(self.format_name, there, self.source.where)
        self._from = commits[self._format]
        self.manifest = await manifest_of(
            self.source, self._format, self._from, look_into=self.verify
        )
        await offload(self._check_names)
        await self._look(room)

    def _check_names(self) -> None:
        for name in (*self.manifest.files, *self.manifest.commits):
            self.target.check(name)

    async def run(self, room: Room) -> None:
        """Copy it; nobody else copies to the same place meanwhile, on this machine."""
        claim, target = self.manifest.claim, self.target
        there = await self._look(room)
        claimed = there.claim
        named = await offload(self._named, there.commits)
        below = nested_commits(named or ())
        decided = plan(
            self.manifest,
            there.sizes,
            there.commits,
            claimed=claimed == claim,
            same=there.same,
            named=named,
            nested=await target.files(below) if below else (),
        )
        resume = decided.trusted and claimed == claim
        if decided.missing or there.commits != self.manifest.commits:
            if claimed and not decided.trusted:
                await target.claim(b"")  # what is there must not be trusted later on, either
            await target.remove(decided.uncommitted)
            await target.remove(decided.removed_first)
            if not resume:
                await target.discard(decided.missing)
            claimed = claim
            await target.claim(claim)
            await self._move(decided.missing, room, resume=resume)
            for name, body in self.manifest.commits.items():
                await target.commit(name, body, overwrite=self.overwrite)
            await target.remove(decided.removed_last)
        if there.claim is not None:  # then parts are a copy's; others may have put whole files
            await target.discard(self.manifest.files)
        if claimed is not None:
            await target.remove([CLAIM_NAME])

    def report(self, totals: Totals) -> CopyReport:
        """Return what was done."""
        passed_by = self.verify and not self._is_within_s3
        compared = [
            (passed_by and item.crc is not None) or (self.verify and info.key in self._vouched)
            for info in self._copied
            for item in self.manifest.items.get(info.key, ())
            if item.end > item.start
        ]
        return CopyReport(
            objects=len(self.manifest.files),
            size_bytes=self.manifest.size_bytes,
            copied_objects=len(self._copied),
            copied_bytes=sum(info.size_bytes for info in self._copied) - self._resumed_bytes,
            verified=sum(compared),
            unverified=len(compared) - sum(compared),
            totals=totals,
        )

    @property
    def _is_within_s3(self) -> bool:
        return isinstance(self.source, Bucket) and isinstance(self.target, Bucket)

    async def _look(self, room: Room) -> _There:
        """Return what is at the target, if it may be there."""
        manifest, target = self.manifest, self.target
        infos = await target.commits(self._format)
        commits = await read_commits(target, infos)
        # One that holds data, and that this copy has not, is no less another checkpoint's.
        commits |= {
            info.key: b""
            for info in infos
            if holds_data(info.key) and info.key not in manifest.files
        }
        files = await target.files(manifest.files)
        claim = await target.read(CLAIM_NAME)
        bare = [info for name, info in files.items() if name in manifest.bare]
        same = await self._same(bare, room)
        found = others(manifest, files, commits, same=same)
        if claim is None:  # no copy wrote what is there in part
            parts = await target.parts(manifest.files.keys() - files.keys())
            found += [f"{name}{PARTIAL_SUFFIX}" for name in sorted(parts)]
        if found and not self.overwrite:
            raise CheckpointExistsError(
                f"There is another checkpoint at {target}, or a part of one (its {found[0]} is "
                "another): copy to another place, or pass overwrite=True (--overwrite)"
            )
        sizes = {name: info.size_bytes for name, info in files.items()}
        return _There(commits, sizes, claim, frozenset(same))

    async def _same(self, files: Sequence[ObjectInfo], room: Room) -> set[str]:
        """Return which files at the target have the bytes of the source's."""
        unknown = [info for info in files if info not in self._compared]
        pairs = [(self.manifest.files[info.key], info) for info in unknown]
        found = await same_files(self.source, self.target, pairs, room, self.comparing)
        self._compared |= {info: info.key in found for info in unknown}
        return {info.key for info in files if self._compared[info]}

    def _named(self, commits: Mapping[str, bytes]) -> set[str] | None:
        """Return what the commits at the target name, or None if that cannot be known."""
        described = {name: body for name, body in commits.items() if not holds_data(name)}
        try:
            return names_of(self.target, self._format, described)
        except (CorruptMetadataError, DiskError, InvalidS3UriError) as exc:
            _log.warning("objects of the checkpoint that is replaced are left in place: %s", exc)
            return None

    async def _move(self, missing: Sequence[str], room: Room, *, resume: bool) -> None:
        """Copy files; those that are commits come last, if all else is one checkpoint."""
        manifest = self.manifest
        self._copied = tuple(manifest.files[name] for name in missing)
        total = sum(info.size_bytes for info in self._copied)
        self.progress(0, total)
        cargo = Cargo(
            files=[info for info in self._copied if info.key not in manifest.last],
            items=manifest.items if self.verify else {},
            sums=await self._sums() if self.verify else {},
            vouched=self._vouched,
            resume=resume,
            advance=lambda count: self.progress(count, total),
        )
        await self._carry(cargo, room)
        await self._check_unchanged()
        last = [info for info in self._copied if info.key in manifest.last]
        await self._carry(replace(cargo, files=last), room)

    async def _sums(self) -> dict[str, int]:
        """Return what the store has of files whose items' own checksums are not enough."""
        files = [
            info
            for info in self._copied
            if self._is_within_s3 or self.manifest.checked_bytes(info.key) < info.size_bytes
        ]
        crcs = await wait_all([partial(self.source.crc, info) for info in files])
        found = zip(files, crcs, strict=True)
        return {info.key: crc for info, crc in found if crc is not None}

    async def _carry(self, cargo: Cargo, room: Room) -> None:
        if not cargo.files:
            return
        match self.source, self.target:
            case Bucket() as source, Folder() as target:
                self._resumed_bytes += await download(source, target, cargo, room)
            case Folder() as source, Bucket() as target:
                self._resumed_bytes += await upload(source, target, cargo, room)
            case Bucket() as source, Bucket() as target:
                await copy_within(source, target, cargo)

    async def _check_unchanged(self) -> None:
        """Make sure that what was copied is one checkpoint, whole, and the only one that was."""
        files = await self.source.files(self.manifest.files)
        commits = await self.source.commits(self._format)
        if commits != self._from or files != self.manifest.files:
            raise CheckpointChangedError(
                f"{self.source} was replaced while it was being copied: copy it again"
            )
        if await self.target.read(CLAIM_NAME) != self.manifest.claim:
            raise CommitConflictError(
                f"Another process began to copy to {self.target} meanwhile, or removed its "
                f"{CLAIM_NAME}: this copy was not committed. Let one at a time copy to a place, "
                "and copy again"
            )
        there = await self.target.files(files)  # also what an earlier run copied
        for name in files.keys() - set(self.manifest.last):
            if name not in there or there[name].size_bytes != files[name].size_bytes:
                raise CheckpointChangedError(
                    f"{self.target}/{name} was removed or replaced while the copy was under way: "
                    "copy again"
                )
