"""The checkpoints under a URI: listed, the newest of them, deleted, cleaned up after."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from s3dcp._config import S3ClientConfig
from s3dcp._errors import (
    CheckpointChangedError,
    CorruptMetadataError,
    ObjectNotFoundError,
    PreconditionFailedError,
    S3ConfigError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._inventory import (
    Checkpoint,
    CheckpointInfo,
    commits_by_folder,
    doomed,
    folder_of,
    needless,
    order_of,
    orphans,
    place_of,
)
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._publish import exists
from s3dcp._s3client import S3Client, list_all, list_uploads
from s3dcp._s3client import delete as delete_object
from s3dcp._store import ObjectInfo, UploadInfo
from s3dcp._survey import CommitReader, Survey, no_checkpoint, survey

_log = logging.getLogger("s3dcp.catalog")

#: Seconds after which what no checkpoint names is taken for left behind: no save takes a day.
GRACE_S = 86_400.0

_DELETED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What `gc` removes, or would.

    Attributes:
        checkpoints: Those older than the ones to keep.
        objects: Data objects that no checkpoint names.
        unreadable: Checkpoints whose `.metadata` cannot be read: everything below them stays.
    """

    checkpoints: tuple[CheckpointInfo, ...]
    objects: tuple[ObjectInfo, ...]
    unreadable: tuple[CheckpointInfo, ...]


def list_checkpoints(
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> list[CheckpointInfo]:
    """Return the checkpoints at and below a URI, the oldest commit first.

    Incomplete and unreadable ones are listed too, with their `problem`.

    Raises:
        S3Exception: as the store.
    """
    return S3Client(region, s3client_config).call(_list, _folder(uri))


def latest(
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> CheckpointInfo | None:
    """Return the newest complete checkpoint at or below a URI, or None.

    The newest is the one that was committed last, by the store's clock; of several that were
    committed in the same second, the one with the highest step.

    Raises:
        S3Exception: as the store.
    """
    return S3Client(region, s3client_config).call(_latest, _folder(uri))


def delete(
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> None:
    """Delete a checkpoint: its commit first, then the objects that it alone names.

    Interrupted in between, it leaves objects that no checkpoint names, which `gc` removes.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointChangedError: it was replaced meanwhile; the new one is left in place.
        CorruptMetadataError: its `.metadata`, or that of one above, cannot be read, and may name
            any of these objects. Nothing was deleted.
        S3Exception: as the store.
    """
    S3Client(region, s3client_config).call(_delete, _folder(uri))


def gc(
    uri: str | os.PathLike[str],
    *,
    keep: int | None = None,
    grace_s: float = GRACE_S,
    dry_run: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> Garbage:
    """Remove what is no longer needed at and below a URI; by default only tell what that is.

    Args:
        uri: A run's folder. All checkpoints below it count together.
        keep: How many of the newest complete checkpoints stay; None for all.
        grace_s: Seconds for which a data object that no checkpoint names is left alone: a save
            that is under way may name it yet. As long, a checkpoint that was saved without
            collectives does not count for `keep`: some of its ranks may not have committed yet.
            By this machine's clock.
        dry_run: Remove nothing.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.

    Returns:
        What is removed. Objects that a checkpoint above the URI names are not among it.

    Raises:
        S3ConfigError: `keep` is less than 1, or `grace_s` no such time.
        S3Exception: as the store; some of it may have been removed.
    """
    if keep is not None and keep < 1:
        raise S3ConfigError(f"keep must be at least 1, or None for all checkpoints, got {keep!r}")
    client = S3Client(region, s3client_config)
    return client.call(_gc, _folder(uri), keep=keep, grace_s=grace_s, dry_run=dry_run)


def abort_uploads(
    uri: str | os.PathLike[str],
    *,
    grace_s: float = GRACE_S,
    dry_run: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> list[UploadInfo]:
    """Abort multipart uploads below a URI that were left unfinished; by default only list them.

    Args:
        uri: Where to look.
        grace_s: Seconds for which an upload is left alone: it may be under way.
        dry_run: Abort nothing.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.

    Raises:
        S3Exception: as the store; some may have been aborted.
    """
    client = S3Client(region, s3client_config)
    return client.call(_abort_uploads, _folder(uri), grace_s=grace_s, dry_run=dry_run)


def _folder(uri: str | os.PathLike[str]) -> S3Uri:
    return folder_of(parse_s3_uri(uri))


def _ago(seconds: float) -> datetime:
    if seconds >= 0:
        with suppress(OverflowError):  # before the first year
            return datetime.now(UTC) - timedelta(seconds=seconds)
    raise S3ConfigError(f"grace_s must be a time in seconds, got {seconds!r}")


async def _list(channel: Channel, root: S3Uri) -> list[CheckpointInfo]:
    found = await survey(channel, root, look_above=False)
    return [each.info() for each in found.checkpoints]


async def _latest(channel: Channel, root: S3Uri) -> CheckpointInfo | None:
    listing = await list_all(channel, root)
    commits = commits_by_folder(listing)
    reader = CommitReader(channel, listing)
    for folder in sorted(commits, key=lambda key: order_of(key, commits[key]), reverse=True):
        each = await reader.checkpoint(S3Uri(root.bucket, folder), commits[folder])
        if each is not None and each.problem is None:
            return each.info()
        if each is not None:
            _log.warning("passed over %s: %s", place_of(each.folder), each.problem)
    return None


async def _delete(channel: Channel, root: S3Uri) -> None:
    found = await survey(channel, root)
    here = [each for each in found.checkpoints if each.folder == root]
    if not here:
        raise no_checkpoint(root)
    for each in found.everywhere:
        if each.contents.unreadable and root.key.startswith(each.folder.key):
            raise CorruptMetadataError(
                f"Nothing was deleted at {place_of(root)}, since it cannot be known what the "
                f"checkpoint at {place_of(each.folder)} names: {each.contents.unreadable}",
                bucket=root.bucket,
                key=root.key,
            )
    if not await _remove(channel, found, here):
        raise CheckpointChangedError(
            f"{place_of(root)} was replaced while it was being deleted: delete it again",
            bucket=root.bucket,
            key=root.key,
        )


async def _gc(
    channel: Channel, root: S3Uri, *, keep: int | None, grace_s: float, dry_run: bool
) -> Garbage:
    before = _ago(grace_s)
    found = await survey(channel, root)
    old = doomed(found.checkpoints, keep, found.everywhere, before)
    lost = list(orphans(found.listing, found.everywhere, before))
    if not dry_run and (old or lost):
        # What was committed or replaced meanwhile counts: only what is needless still is removed.
        found = await survey(channel, root, found.everywhere)
        old_before, lost_before = {each.commits for each in old}, set(lost)
        old = [
            each
            for each in doomed(found.checkpoints, keep, found.everywhere, before)
            if each.commits in old_before
        ]
        lost = [
            info for info in orphans(found.listing, found.everywhere, before) if info in lost_before
        ]
        old = await _remove(channel, found, old)
        await _delete_all(channel, root.bucket, [info.key for info in lost])
    return Garbage(
        checkpoints=tuple(each.info() for each in old),
        objects=tuple(lost),
        unreadable=tuple(each.info() for each in found.everywhere if each.contents.unreadable),
    )


async def _abort_uploads(
    channel: Channel, root: S3Uri, *, grace_s: float, dry_run: bool
) -> list[UploadInfo]:
    before = _ago(grace_s)

    async def abort(info: UploadInfo) -> None:
        uri = S3Uri(root.bucket, info.key)
        send = partial(channel.store.abort_upload, uri, info.upload_id)
        try:
            await channel.request("AbortMultipartUpload", uri, send)
        except ObjectNotFoundError:
            _log.debug("upload %s of %s has ended by itself", info.upload_id, uri)

    found = await list_uploads(channel, root)
    uploads = [info for info in found if info.initiated and info.initiated <= before]
    if not dry_run:
        await wait_all([partial(abort, info) for info in uploads])
    return uploads


async def _remove(
    channel: Channel, found: Survey, checkpoints: Sequence[Checkpoint]
) -> list[Checkpoint]:
    """Delete checkpoints, commits first; return those that were not replaced meanwhile."""

    async def drop(each: Checkpoint) -> bool:
        for info in each.commits:
            uri = S3Uri(each.folder.bucket, info.key)
            send = partial(channel.store.delete, uri, if_match=info.etag)
            try:
                await channel.request("DeleteObject", uri, send)
            except (PreconditionFailedError, ObjectNotFoundError):
                # It is gone if an attempt's answer was lost, or another deleted it.
                if await exists(channel, uri):
                    _log.warning("%s was replaced while it was being deleted: it stays", uri)
                    return False
        return True

    dropped = await wait_all([partial(drop, each) for each in checkpoints])
    gone = [each for each, was in zip(checkpoints, dropped, strict=True) if was]
    gone_commits = {each.commits for each in gone}
    others = [each for each in found.everywhere if each.commits not in gone_commits]
    for each in gone:
        await _delete_all(channel, each.folder.bucket, needless([each], others))
    return gone


async def _delete_all(channel: Channel, bucket: str, keys: Sequence[str]) -> None:
    # One request for each: free on S3, and some stores refuse DeleteObjects, or want it with MD5.
    for start in range(0, len(keys), _DELETED_AT_ONCE):
        await wait_all(
            [
                partial(delete_object, channel, S3Uri(bucket, key))
                for key in keys[start : start + _DELETED_AT_ONCE]
            ]
        )
