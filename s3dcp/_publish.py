"""Carries out a commit: reads what is there, puts `.metadata`, settles unknown outcomes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from s3dcp._commit import (
    Attempts,
    Found,
    Step,
    after_failure,
    nested_commits,
    next_step,
    outside,
)
from s3dcp._errors import (
    CheckpointExistsError,
    CommitConflictError,
    ObjectNotFoundError,
    S3Exception,
    S3ServiceError,
)
from s3dcp._flow import Channel, wait_all
from s3dcp._keys import S3Uri, join
from s3dcp._store import Scatter, Store
from s3dcp._uploads import CLEANUP_ATTEMPTS, checksums_of

_log = logging.getLogger("s3dcp.commits")

_RANGE_NOT_SATISFIABLE = 416

# A save that takes longer than this does not feel one request more.
_RECENT_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """What was at the commit's key, and when: what the commit may replace.

    Args:
        found: What was read.
        at_s: The channel's clock when it was asked for, in seconds.
    """

    found: Found | None
    at_s: float

    def is_recent(self, now_s: float) -> bool:
        """Whether a commit may go by it: the older it is, the likelier another save's came."""
        return now_s - self.at_s < _RECENT_S


async def exists(channel: Channel, uri: S3Uri) -> bool:
    """Return whether an object is there.

    Asked with a GET of one byte: unlike a HEAD's, its refusal says why, so that a bucket that does
    not exist is not taken for a key that does not.
    """

    async def ask() -> None:
        await channel.store.get_range(uri, 0, Scatter([memoryview(bytearray(1))]))

    try:
        await channel.request("GetObject", uri, ask)
    except ObjectNotFoundError:
        return False
    except S3ServiceError as exc:
        if exc.status != _RANGE_NOT_SATISFIABLE:  # which an empty object answers
            raise
    return True


async def read(channel: Channel, uri: S3Uri) -> Found | None:
    """Return a whole object, or None where there is none."""
    try:
        body, info = await channel.request("GetObject", uri, partial(channel.store.get, uri))
    except ObjectNotFoundError:
        return None
    channel.tally.add_bytes("GetObject", len(body))
    return Found(body, info.etag)


async def look(channel: Channel, uri: S3Uri) -> Look:
    """Read what is at the key of a commit to come."""
    at_s = channel.retry.clock()
    return Look(await read(channel, uri), at_s)


async def publish(
    channel: Channel,
    uri: S3Uri,
    body: bytes,
    *,
    overwrite: bool,
    before: Look | None = None,
    objects: Sequence[S3Uri] = (),
) -> Found | None:
    """Put `body` at `uri` as the whole commit, and return what it replaced.

    Args:
        channel: The client's.
        uri: The key of `.metadata`.
        body: Its bytes, unlike any other save's.
        overwrite: Whether a checkpoint that is there may be replaced.
        before: What was there when the save began. Where it is recent, it spares a request.
        objects: What only `body` refers to: deleted if it is certain not to be published.

    Raises:
        CheckpointExistsError: one is there, and `overwrite` is false.
        CommitConflictError: another writer committed while the outcome of ours was unknown.
        S3Exception: as the store; nothing was published, or nothing is known of it.
    """
    _, checksum = checksums_of([memoryview(body)], channel.checksum)
    attempts = Attempts(
        body=body, overwrite=overwrite, conditional=channel.store.conditional_writes is not False
    )
    replaced: Found | None = None
    failures = 0
    failure: S3Exception | None = None
    ended = False
    guarded = True  # whether every attempt had a condition
    started_s = channel.retry.clock()
    while True:
        found = await _found(channel, uri, attempts, before)
        before = None
        step, condition = next_step(attempts, found)
        if step is Step.EXISTS:
            await delete_quietly(channel, objects)
            raise already_exists(uri)
        if step is Step.CONFLICT:
            raise _conflict(uri, "another writer committed meanwhile") from failure
        if step is Step.DONE:
            break
        if ended:
            # Ours is not there, and may still arrive.
            raise _conflict(uri, "every attempt failed") from failure
        unproven = condition is not None and not channel.store.conditional_writes
        guarded = guarded and condition is not None
        put = partial(
            channel.store.put, uri, [memoryview(body)], checksum=checksum, condition=condition
        )
        try:
            await channel.attempt(
                "PutObject", uri, put, size_bytes=len(body), retry=failure is not None
            )
        except S3Exception as exc:
            known = after_failure(attempts, exc, found, conditioned=unproven)
            failure = exc
            failures += 1
            elapsed_s = channel.retry.clock() - started_s
            ended = channel.retry.next_delay_s(failures, exc, elapsed_s) is None
            if known is None or (ended and not known.unknown):
                if not attempts.unknown:
                    await delete_quietly(channel, objects)
                raise
            _log.info("commit of %s: %s; reading back", uri, exc)
            attempts, replaced = known, found
            # After the last one too: a PUT whose answer was lost gets the time to arrive.
            await channel.retry.sleep(channel.retry.delay_s(failures, exc))
            continue
        replaced = found
        break
    if not (channel.store.conditional_writes and guarded):
        _warn_single_writer(channel.store, uri)
    return replaced


async def _found(
    channel: Channel, uri: S3Uri, attempts: Attempts, before: Look | None
) -> Found | None:
    # A look will do if a condition holds the PUT to it, or anything may be replaced: without
    # conditions, a checkpoint that came since then loses its place, and its objects are left.
    will_do = attempts.overwrite or channel.store.conditional_writes
    if before is not None and will_do and before.is_recent(channel.retry.clock()):
        return before.found
    try:
        return await read(channel, uri)
    except S3Exception as exc:
        if not attempts.unknown:
            raise
        raise _conflict(uri, "it could not be read back") from exc


def _conflict(uri: S3Uri, why: str) -> CommitConflictError:
    return CommitConflictError(
        f"It is not known whether this save was ever committed to {uri}: the answer was lost, and "
        f"{why}. Load what is there before saving to this path again",
        bucket=uri.bucket,
        key=uri.key,
    )


async def delete_quietly(channel: Channel, uris: Sequence[S3Uri]) -> None:
    """Delete objects that nothing refers to; one that stays is logged, never an error."""

    async def delete(uri: S3Uri) -> None:
        try:
            await channel.request(
                "DeleteObject",
                uri,
                partial(channel.store.delete, uri),
                max_attempts=CLEANUP_ATTEMPTS,
            )
        except ObjectNotFoundError:
            pass
        except S3Exception as exc:
            _log.warning("could not delete %s, which nothing refers to: %s", uri, exc)

    await wait_all([partial(delete, uri) for uri in uris])


async def delete_replaced(channel: Channel, base: S3Uri, objects: Mapping[str, S3Uri]) -> None:
    """Delete what only a replaced checkpoint named, as `delete_quietly` does.

    But not what lies below another one, as `outside` has it.

    Args:
        channel: The client's.
        base: The checkpoint's place.
        objects: What may be deleted, by its name below that.
    """
    commits = nested_commits(objects)
    uris = [S3Uri(base.bucket, join(base.key, commit)) for commit in commits]
    try:
        there = await wait_all([partial(exists, channel, uri) for uri in uris])
    except S3Exception as exc:
        _log.warning("objects of the checkpoint that was replaced are left in place: %s", exc)
        return
    nested = [commit for commit, found in zip(commits, there, strict=True) if found]
    await delete_quietly(channel, [objects[name] for name in outside(objects, nested)])


def already_exists(uri: S3Uri) -> CheckpointExistsError:
    """Return the error for a checkpoint that may not be replaced."""
    return CheckpointExistsError(
        f"Checkpoint already exists at {uri} and overwrite=False: save to another path, or pass "
        "overwrite=True",
        bucket=uri.bucket,
        key=uri.key,
    )


_warned: weakref.WeakSet[Store] = weakref.WeakSet()


def _warn_single_writer(store: Store, uri: S3Uri) -> None:
    if store in _warned:
        return
    _warned.add(store)
    _log.warning(
        "the store behind bucket %r is not known to honour conditional writes: let one job at a "
        "time save to a path, or set S3ClientConfig(conditional_writes=True) if it does",
        uri.bucket,
    )
