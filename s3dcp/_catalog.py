"""The checkpoints under a URI: listed, the newest of them, deleted, cleaned up after."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from s3dcp._config import S3ClientConfig
from s3dcp._downloads import Downloads
from s3dcp._errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CorruptMetadataError,
    ObjectNotFoundError,
    PreconditionFailedError,
    S3ConfigError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._formats import CLAIM_NAME, SAFETENSORS, Format, FormatName, format_of
from s3dcp._hf_files import read_header
from s3dcp._hf_index import SAVE_ID_KEY
from s3dcp._inventory import (
    Checkpoint,
    CheckpointInfo,
    commits_by_folder,
    cut_off_copies,
    doomed,
    folder_of,
    needless,
    only,
    order_of,
    orphans,
    place_of,
    shards_of,
)
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._publish import exists
from s3dcp._s3client import S3Client, list_all, list_uploads
from s3dcp._store import ObjectInfo, UploadInfo
from s3dcp._survey import CommitReader, Survey, survey

_log = logging.getLogger("s3dcp.catalog")

#: Seconds after which what no checkpoint names is taken for left behind: no save takes a day.
GRACE_S = 86_400.0

_DELETED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What `gc` removes, or would.

    Attributes:
        checkpoints: Those older than the ones to keep.
        objects: Data objects that no checkpoint names, and what copies left that were cut off.
        unreadable: Checkpoints whose commit cannot be read: everything below them stays.
        copies: Where a copy was cut off, `s3://bucket/folder`, and files lie that stay, as nothing
            tells whether they are its own.
    """

    checkpoints: tuple[CheckpointInfo, ...]
    objects: tuple[ObjectInfo, ...]
    unreadable: tuple[CheckpointInfo, ...]
    copies: tuple[str, ...] = ()


def list_checkpoints(
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> list[CheckpointInfo]:
    """Return the checkpoints at and below a URI, the oldest commit first.

    Those of every format: `CheckpointInfo.format` says which. Incomplete and unreadable ones are
    listed too, with their `problem`.

    Raises:
        S3Exception: as the store.
    """
    return S3Client(region, s3client_config).call(_list, _folder(uri))


def latest(
    uri: str | os.PathLike[str],
    *,
    format: FormatName = "dcp",  # noqa: A002 - the word that its users know
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> CheckpointInfo | None:
    """Return the newest complete checkpoint at or below a URI, or None.

    The newest is the one that was committed last, by the store's clock; of several that were
    committed in the same second, the one with the highest step.

    Args:
        uri: Where to look.
        format: "dcp" for what `s3dcp.load` loads, "safetensors" for `S3HuggingFaceStorageReader`.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.

    Raises:
        S3ConfigError: there is no such format.
        S3Exception: as the store.
    """
    return S3Client(region, s3client_config).call(_latest, _folder(uri), format_of(format))


def delete(
    uri: str | os.PathLike[str],
    *,
    format: FormatName | None = None,  # noqa: A002 - as above
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
) -> None:
    """Delete a checkpoint: its commit first, then the objects that it alone names.

    Interrupted in between, it leaves objects that no checkpoint names, which `gc` removes if a
    save of ours wrote them. Of a safetensors checkpoint, `*.safetensors` files are deleted, and the
    shards in `sharded/` that it was made of; a model's other files stay. The `.s3dcp-copy` of a
    copy that was cut off goes too.

    Args:
        uri: The checkpoint's place.
        format: Which one is meant, where there are both.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointChangedError: it was replaced meanwhile; the new one is left in place.
        CorruptMetadataError: its commit, or that of one above, cannot be read, and may name any of
            these objects. Nothing was deleted.
        S3ConfigError: there are both, and no `format`.
        S3Exception: as the store.
    """
    S3Client(region, s3client_config).call(_delete, _folder(uri), format)


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

    Safetensors that another library may have written are not touched: of such files, those go whose
    header has the id of a save of ours. Nor is what lies beside the `.s3dcp-copy` of a copy that
    was cut off, which goes itself once nothing does.

    Args:
        uri: A run's folder. All checkpoints of a format below it count together.
        keep: How many of the newest complete checkpoints of each format stay; None for all. Full
            safetensors files and the shards in `sharded/` that they were made of are one.
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
        S3ConfigError: `keep` is less than 1, `grace_s` no such time, or `dry_run` no boolean.
        S3Exception: as the store; some of it may have been removed.
    """
    # True counts as 1, and would remove all checkpoints but one.
    if keep is not None and (type(keep) is not int or keep < 1):
        raise S3ConfigError(f"keep must be at least 1, or None for all checkpoints, got {keep!r}")
    _check_dry_run(dry_run)
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
        S3ConfigError: `grace_s` is no such time, or `dry_run` no boolean.
        S3Exception: as the store; some may have been aborted.
    """
    _check_dry_run(dry_run)
    client = S3Client(region, s3client_config)
    return client.call(_abort_uploads, _folder(uri), grace_s=grace_s, dry_run=dry_run)


def _folder(uri: str | os.PathLike[str]) -> S3Uri:
    return folder_of(parse_s3_uri(uri))


def _check_dry_run(dry_run: object) -> None:
    if type(dry_run) is not bool:  # None or 0 would remove what nobody meant to be removed
        raise S3ConfigError(f"dry_run must be True or False, got {dry_run!r}")


def _ago(seconds: float) -> datetime:
    with suppress(TypeError, OverflowError):  # no number, or before the first year
        if seconds >= 0:
            return datetime.now(UTC) - timedelta(seconds=seconds)
    raise S3ConfigError(f"grace_s must be a time in seconds, got {seconds!r}")


async def _list(channel: Channel, root: S3Uri) -> list[CheckpointInfo]:
    found = await survey(channel, root, look_above=False)
    return [each.info() for each in found.checkpoints]


async def _latest(channel: Channel, root: S3Uri, format_: Format) -> CheckpointInfo | None:
    listing = await list_all(channel, root)
    commits = commits_by_folder(listing, format_)
    reader = CommitReader(channel, listing)
    for folder in sorted(commits, key=lambda key: order_of(key, commits[key]), reverse=True):
        each = await reader.checkpoint(S3Uri(root.bucket, folder), format_, commits[folder])
        if each is not None and each.problem is None:
            return each.info()
        if each is not None:
            _log.warning("passed over %s: %s", place_of(each.folder), each.problem)
    return None


async def _delete(channel: Channel, root: S3Uri, name: FormatName | None) -> None:
    found = await survey(channel, root)
    there = [each for each in found.checkpoints if each.folder == root]
    chosen = only(name, [each.format for each in there], root)
    here = [each for each in there if each.format is chosen]
    here += shards_of(here, found.checkpoints)
    for each in found.everywhere:
        if each.contents.unreadable and root.key.startswith(each.folder.key):
            raise CorruptMetadataError(
                f"Nothing was deleted at {place_of(root)}, since it cannot be known what the "
                f"checkpoint at {place_of(each.folder)} names: {each.contents.unreadable}",
                bucket=root.bucket,
                key=root.key,
            )
    if len(await _remove(channel, found, here)) < len(here):
        raise CheckpointChangedError(
            f"{place_of(root)} was replaced while it was being deleted: delete it again",
            bucket=root.bucket,
            key=root.key,
        )
    claim = f"{root.key}{CLAIM_NAME}"
    await _drop_all(channel, root.bucket, [info for info in found.listing if info.key == claim])


async def _gc(
    channel: Channel, root: S3Uri, *, keep: int | None, grace_s: float, dry_run: bool
) -> Garbage:
    before = _ago(grace_s)
    found = await survey(channel, root)
    old = doomed(found.checkpoints, keep, found.everywhere, before)
    lost = await _ours(channel, root.bucket, orphans(found.listing, found.everywhere, before))
    copies = cut_off_copies(found.listing, found.everywhere, before)
    lost += _bare(copies, lost)
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
        copies = cut_off_copies(found.listing, found.everywhere, before)
        lost += _bare(copies, lost)
        old = await _remove(channel, found, old)
        await _drop_all(channel, root.bucket, lost)
    return Garbage(
        checkpoints=tuple(each.info() for each in old),
        objects=tuple(lost),
        unreadable=tuple(each.info() for each in found.everywhere if each.contents.unreadable),
        copies=tuple(
            str(place_of(S3Uri(root.bucket, claim.key.removesuffix(CLAIM_NAME))))
            for claim in copies
            if claim not in lost
        ),
    )


def _bare(
    copies: Mapping[ObjectInfo, set[ObjectInfo]], lost: Sequence[ObjectInfo]
) -> list[ObjectInfo]:
    """Return the claims of copies beside which nothing is but what is lost."""
    return [claim for claim, beside in copies.items() if beside <= set(lost)]


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


async def _ours(channel: Channel, bucket: str, data: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """Return the objects that a save of ours wrote.

    Safetensors files of others are called the same, and without an index some libraries load them.
    """

    async def is_ours(info: ObjectInfo) -> bool:
        if not SAFETENSORS.is_data(info.key):
            return True
        uri = S3Uri(bucket, info.key)
        downloads = Downloads(channel)
        downloads.pin(uri, info.etag)
        try:
            header = await read_header(downloads, uri, info.size_bytes)
        except (
            AccessDeniedError,
            CheckpointChangedError,
            CorruptMetadataError,
            ObjectNotFoundError,
        ) as exc:
            _log.info("%s is left alone: %s", uri, exc)
            return False
        return SAVE_ID_KEY in header.extra

    ours = await wait_all([partial(is_ours, info) for info in data])
    return [info for info, is_one in zip(data, ours, strict=True) if is_one]


async def _remove(
    channel: Channel, found: Survey, checkpoints: Sequence[Checkpoint]
) -> list[Checkpoint]:
    """Delete checkpoints, commits first; return those that were not replaced meanwhile."""

    async def give_up(each: Checkpoint) -> bool:
        for info in each.commits:
            if not await _drop(channel, each.folder.bucket, info):
                return False
        return True

    given_up = await wait_all([partial(give_up, each) for each in checkpoints])
    gone = [each for each, was in zip(checkpoints, given_up, strict=True) if was]
    gone_commits = {each.commits for each in gone}
    others = [each for each in found.everywhere if each.commits not in gone_commits]
    listed = {info.key: info for info in found.listing}
    for each in gone:
        # What has come since the listing is of another save, or for the next `gc`.
        data = [listed[key] for key in needless([each], others) if key in listed]
        await _drop_all(channel, each.folder.bucket, data)
    return gone


async def _drop_all(channel: Channel, bucket: str, objects: Sequence[ObjectInfo]) -> None:
    # One request for each: free on S3, and some stores refuse DeleteObjects, or want it with MD5.
    for start in range(0, len(objects), _DELETED_AT_ONCE):
        some = objects[start : start + _DELETED_AT_ONCE]
        await wait_all([partial(_drop, channel, bucket, info) for info in some])


async def _drop(channel: Channel, bucket: str, info: ObjectInfo) -> bool:
    """Delete an object, and return whether it is gone: one that was replaced meanwhile stays."""
    uri = S3Uri(bucket, info.key)
    send = partial(channel.store.delete, uri, if_match=info.etag)
    try:
        await channel.request("DeleteObject", uri, send)
    except (PreconditionFailedError, ObjectNotFoundError):
        # It is gone if an attempt's answer was lost, or another deleted it.
        if await exists(channel, uri):
            _log.warning("%s was replaced while it was being deleted: it stays", uri)
            return False
    return True
