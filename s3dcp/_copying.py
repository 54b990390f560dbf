"""A checkpoint copied between S3 and a disk, or within S3: data first, its commits last."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s3dcp._budget import budget
from s3dcp._cancellation import in_thread
from s3dcp._config import S3ClientConfig
from s3dcp._copies import CLAIM_NAME, Item, Manifest, Plan, differs, items_of, plan
from s3dcp._errors import (
    CheckpointChangedError,
    CheckpointExistsError,
    CommitConflictError,
    CorruptMetadataError,
    IntegrityError,
    InvalidS3UriError,
    S3ConfigError,
)
from s3dcp._flow import Channel
from s3dcp._inventory import Contents, folder_of, problem_of
from s3dcp._keys import parse_s3_uri, uri_text
from s3dcp._movers import Cargo, Room, copy_within, download
from s3dcp._places import Bucket, Folder, Place
from s3dcp._portal import offload
from s3dcp._s3client import S3Client
from s3dcp._sending import upload
from s3dcp._store import ObjectInfo
from s3dcp._tally import Tally, Totals

_log = logging.getLogger("s3dcp.copies")

#: Told how many bytes more have been copied, and of how many in all; on the portal's thread.
Progress = Callable[[int, int], None]


def _silent(_count: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy did.

    Attributes:
        objects: How many data objects the checkpoint has.
        size_bytes: Their size.
        copied_objects: How many of them were not there already.
        copied_bytes: Bytes that were moved: less than the size of these objects where one was
            there in part.
        verified: How many items were compared with their checksums.
        unverified: How many of those copied were not: they have none, the store copied them
            itself, or it was not asked for.
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
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = _silent,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> CopyReport:
    """Copy a checkpoint from S3 to a disk, from a disk to S3, or within S3.

    What its commits name is copied first, and the commits last: what was cut off does not look
    like a checkpoint. The same call then goes on where it ended, as long as the source has not
    changed: objects that were whole stay, a file on a disk grows on from its length, and the parts
    that an upload has are compared with the file, and not sent again. Until then they are stored
    and paid for, where no `abort_uploads` removes them.

    Let one process at a time copy to a place. On a disk another one is refused. In a bucket it is
    found out only before the commit, when objects that both call the same may be the other's.

    Args:
        source: The checkpoint's folder, `s3://bucket/folder` or a path.
        target: The copy's own folder.
        overwrite: Whether another checkpoint that is there may be replaced. It stays loadable
            until the commit if both use different names, as s3dcp's saves do; else it goes first.
        verify: Compare the checksums (CRC64NVME) of items that have one as they pass by. Within S3
            they do not: the store copies by itself.
        progress: Told, on another thread, how many bytes more are copied, and of how many in all.
        region: The buckets' region.
        s3client_config: Settings of the client.

    Raises:
        S3ConfigError: neither place is on S3, or both are the same.
        CheckpointNotFoundError: there is none at the source.
        CheckpointExistsError: another one is at the target.
        CheckpointChangedError: the source was changed meanwhile.
        CommitConflictError: another process copies to the same place.
        IntegrityError: the source is damaged or incomplete.
        CorruptMetadataError, InvalidS3UriError: so are its commits, or they name what lies outside
            of the folder.
        OSError: the disk refused something.
        S3Exception: as the store.
    """
    client = S3Client(region, s3client_config)
    tally = Tally()
    portal, channel = client.connect(tally)
    copying = _Copying(
        source=_place(source, channel),
        target=_place(target, channel),
        overwrite=overwrite,
        verify=verify,
        progress=progress,
    )
    if isinstance(copying.source, Folder) and isinstance(copying.target, Folder):
        raise S3ConfigError(f"One of {source} and {target} must be an s3:// URI")
    if str(copying.source) == str(copying.target):
        raise S3ConfigError(f"{target} is what is to be copied: copy it to another place")
    portal.call(copying.prepare)
    config = client.s3client_config
    limit_bytes = config.memory_bytes()
    with copying.target.alone(), budget().share(limit_bytes) as share:
        share.take(limit_bytes // 2)  # so that saves and loads can go on
        room = Room(
            memory_bytes=limit_bytes // 2,
            part_bytes=config.part_size,
            connections=channel.slots.count,
        )
        portal.call(copying.run, room)
    return copying.report(tally.totals())


async def acopy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = _silent,
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
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        region=region,
        s3client_config=s3client_config,
    )


def _place(path: str | os.PathLike[str], channel: Channel) -> Bucket | Folder:
    text = uri_text(path)
    if "://" in text:
        return Bucket(channel, folder_of(parse_s3_uri(text)))
    if not text:
        raise S3ConfigError("A path must not be empty: write s3://BUCKET/PREFIX, or a folder's")
    return Folder(Path(text).absolute())


@dataclass(slots=True, kw_only=True)
class _Copying:
    """One copy. `prepare` and `run` are for the portal."""

    source: Bucket | Folder
    target: Bucket | Folder
    overwrite: bool
    verify: bool
    progress: Progress
    manifest: Manifest = field(init=False)
    _from: tuple[ObjectInfo, ...] = field(init=False)
    _copied: tuple[ObjectInfo, ...] = ()
    _resumed_bytes: int = 0

    async def prepare(self) -> None:
        """Find out what is to be copied, and refuse it before anything is changed."""
        self._from = await self.source.commits()
        commits = await _read_all(self.source, self._from)
        if not commits:
            raise self.source.no_checkpoint()
        items = await offload(items_of, commits, f"{self.source}/")
        files = await self.source.files(items)
        _refuse_incomplete(self.source, self._from, items, files)
        for name in files:
            self.target.check(name)
        self.manifest = Manifest(
            # Reversed: `.metadata` and rank 0's own last.
            commits=dict(reversed(commits.items())),
            files={name: files[name] for name in items},
            items=items,
        )
        await self._replaced()

    async def run(self, room: Room) -> None:
        """Copy it; nobody else copies to the same place meanwhile, on this machine."""
        claim, target = self.manifest.claim, self.target
        commits = await self._replaced()
        there = await target.files(self.manifest.files)
        claimed = await target.read(CLAIM_NAME)
        decided = plan(
            self.manifest,
            {name: info.size_bytes for name, info in there.items()},
            commits,
            claimed=claimed == claim,
            named=await offload(_named, target, commits),
        )
        if decided.missing or commits != self.manifest.commits:
            if claimed and not decided.trusted:
                await target.claim(b"")  # what is there must not be trusted later on, either
            await target.remove(decided.uncommitted)
            await target.remove(decided.removed_first)
            claimed = claim
            await target.claim(claim)
            await self._move(decided, room)
            await self._check_unchanged(claim)
            for name, body in self.manifest.commits.items():
                await target.commit(name, body, overwrite=self.overwrite)
            await target.remove(decided.removed_last)
        if claimed is not None:
            await target.remove([CLAIM_NAME])

    def report(self, totals: Totals) -> CopyReport:
        """Return what was done."""
        items = [
            item
            for info in self._copied
            for item in self.manifest.items[info.key]
            if item.end > item.start
        ]
        compared = self.verify and not self._is_within_s3
        verified = sum(item.crc is not None for item in items) if compared else 0
        return CopyReport(
            objects=len(self.manifest.files),
            size_bytes=self.manifest.size_bytes,
            copied_objects=len(self._copied),
            copied_bytes=sum(info.size_bytes for info in self._copied) - self._resumed_bytes,
            verified=verified,
            unverified=len(items) - verified,
            totals=totals,
        )

    @property
    def _is_within_s3(self) -> bool:
        return isinstance(self.source, Bucket) and isinstance(self.target, Bucket)

    async def _replaced(self) -> dict[str, bytes]:
        """Return the commits at the target, if they may be there."""
        commits = await _read_all(self.target, await self.target.commits())
        if differs(self.manifest, commits) and not self.overwrite:
            raise CheckpointExistsError(
                f"There is another checkpoint at {self.target}: copy to another place, or pass "
                "overwrite=True (--overwrite)"
            )
        return commits

    async def _move(self, decided: Plan, room: Room) -> None:
        self._copied = tuple(self.manifest.files[name] for name in decided.missing)
        total = sum(info.size_bytes for info in self._copied)
        self.progress(0, total)
        cargo = Cargo(
            files=self._copied,
            items=self.manifest.items if self.verify else {},
            resume=decided.trusted,
            advance=lambda count: self.progress(count, total),
        )
        match self.source, self.target:
            case Bucket() as source, Folder() as target:
                self._resumed_bytes = await download(source, target, cargo, room)
            case Folder() as source, Bucket() as target:
                self._resumed_bytes = await upload(source, target, cargo, room)
            case Bucket() as source, Bucket() as target:
                await copy_within(source, target, cargo)

    async def _check_unchanged(self, claim: bytes) -> None:
        """Make sure that what was copied is one checkpoint, and the only one that was."""
        files = await self.source.files(self.manifest.files)
        if await self.source.commits() != self._from or files != self.manifest.files:
            raise CheckpointChangedError(
                f"{self.source} was replaced while it was being copied: copy it again"
            )
        if await self.target.read(CLAIM_NAME) != claim:
            raise CommitConflictError(
                f"Another process began to copy to {self.target} meanwhile: this copy was not "
                "committed. Let one at a time copy to a place, and copy again"
            )


async def _read_all(place: Place, commits: Iterable[ObjectInfo]) -> dict[str, bytes]:
    bodies = {info.key: await place.read(info.key) for info in commits}
    return {name: body for name, body in bodies.items() if body is not None}


def _refuse_incomplete(
    source: Place,
    commits: Iterable[ObjectInfo],
    items: Mapping[str, Sequence[Item]],
    files: Mapping[str, ObjectInfo],
) -> None:
    least_bytes = {name: max(item.end for item in found) for name, found in items.items()}
    sizes = {name: info.size_bytes for name, info in files.items()}
    problem = problem_of(commits, Contents(least_bytes=least_bytes, tensors=0), sizes)
    if problem is not None:
        raise IntegrityError(f"{source} is incomplete, and was not copied: {problem}")


def _named(target: Place, commits: Mapping[str, bytes]) -> set[str] | None:
    """Return what the commits at the target name, or None if that cannot be known."""
    try:
        names = set(items_of(commits, f"{target}/"))
        for name in names:
            target.check(name)
    except (CorruptMetadataError, InvalidS3UriError) as exc:
        _log.warning("objects of the checkpoint that is replaced are left in place: %s", exc)
        return None
    return names
