"""The commit: one atomic PUT of `.metadata`, and every way in which it can end.

A save first writes data objects under names of its own. Nothing refers to them until `.metadata`
does, so the checkpoint that was there stays loadable up to that one request, and the new one is
whole from it on.

| what the PUT met                        | what follows                                     |
|-----------------------------------------|--------------------------------------------------|
| success                                 | committed                                        |
| 412: the key is not as it was read      | read again; the last writer wins if it may       |
| 409: another conditional PUT in flight  | wait, read again                                 |
| 400 or 501 for the condition itself     | the store has no conditional writes: go without  |
| no answer, a 5xx, or one that cannot    |                                                  |
| be read: outcome unknown                | read back                                        |
| ... and our own bytes are there         | committed                                        |
| ... and the key is as it was            | try again                                        |
| ... and another writer's are there      | conflict: ours may have been there, and replaced |
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from s3dcp._errors import (
    ConflictError,
    ObjectNotFoundError,
    PreconditionFailedError,
    S3CredentialsError,
    S3Exception,
    S3ServiceError,
)
from s3dcp._store import Condition, matchable

METADATA_NAME = ".metadata"
_OF_ONE_SAVE = re.compile(r".*\d\.[0-9a-f]{16}\.distcp", re.DOTALL)  # as `data_name` makes them
_REFUSES_CONDITIONS = frozenset({400, 501})


def metadata_name(rank: int | None = None) -> str:
    """Return the name of the object whose PUT is the commit; a rank's own without collectives."""
    return METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"


def new_token() -> str:
    """Return what tells the names of one save from those of all others."""
    return uuid.uuid4().hex[:16]


def data_name(prefix: str, number: int, token: str) -> str:
    """Return the name of a rank's `number`-th data object in the save that minted `token`."""
    return f"{prefix}{number}.{token}.distcp"


def has_token(name: str) -> bool:
    """Return whether a data object's name is of one save alone, and not that of others too."""
    return _OF_ONE_SAVE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Found:
    """What was read at the commit's key: the bytes, and the ETag that pins them."""

    body: bytes | bytearray
    etag: str | None


class Step(Enum):
    """What to do next."""

    PUT = auto()
    DONE = auto()
    EXISTS = auto()
    CONFLICT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """What is known of a commit under way.

    Args:
        body: The bytes to be published. No two saves have the same, since names differ.
        overwrite: Whether another checkpoint may be replaced.
        conditional: Whether conditions are sent.
        unknown: Whether an attempt's outcome is unknown.
        seen: What was read before that attempt.
    """

    body: bytes
    overwrite: bool
    conditional: bool = True
    unknown: bool = False
    seen: Found | None = None


def next_step(attempts: Attempts, found: Found | None) -> tuple[Step, Condition | None]:
    """Decide from what is at the key now; the second value is the PUT's condition."""
    if found is not None and found.body == attempts.body:
        return Step.DONE, None
    if attempts.unknown and _key_changed(attempts.seen, found):
        return Step.CONFLICT, None
    if found is not None and not attempts.overwrite:
        return Step.EXISTS, None
    return Step.PUT, _condition(found) if attempts.conditional else None


def after_failure(
    attempts: Attempts, error: S3Exception, found: Found | None, *, conditioned: bool
) -> Attempts | None:
    """Return what is known after a PUT failed, or None if the store refused it for good.

    Args:
        attempts: What was known before.
        error: How the PUT failed.
        found: What had been read before it.
        conditioned: Whether the PUT had a condition that the store is not known to honour.
    """
    # AWS answers If-Match on a key that is gone with 404.
    if isinstance(error, PreconditionFailedError | ConflictError | ObjectNotFoundError):
        return attempts
    if (
        conditioned
        and isinstance(error, S3ServiceError)
        and error.status in _REFUSES_CONDITIONS
        and not error.retryable
    ):
        return replace(attempts, conditional=False)
    if _is_refusal(error):
        return None
    return replace(attempts, unknown=True, seen=found)


def _is_refusal(error: S3Exception) -> bool:
    """Return whether an error proves that the PUT had no effect.

    Only what the store itself said does: an answer that could not be read may have been a yes.
    """
    if isinstance(error, S3ServiceError):
        said_no = 400 <= (error.status or 0) < 500 or error.status in _REFUSES_CONDITIONS
        return said_no and not error.retryable
    return isinstance(error, S3CredentialsError)


def deletions(replaced: Iterable[str], published: Iterable[str]) -> list[str]:
    """Return the names that only the replaced checkpoint used.

    Never those of commits: metadata that names one, its own or a nested checkpoint's, is forged.
    """
    names = set(replaced) - set(published)
    return sorted(name for name in names if not name.endswith(METADATA_NAME))


def nested_commits(names: Iterable[str]) -> list[str]:
    """Return what other checkpoints' commits would be called in the folders on the way to names.

    `a/.metadata` and `a/b/.metadata` for `a/b/c`.
    """
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")[:-1]
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return [f"{folder}/{METADATA_NAME}" for folder in sorted(folders)]


def outside(names: Iterable[str], commits: Iterable[str]) -> list[str]:
    """Return the names that may be deleted with a checkpoint that named them.

    Not what lies below a folder with a commit of its own, which may name it too: metadata that
    reaches into another checkpoint is forged, or points there.

    Args:
        names: What it named.
        commits: Those of `nested_commits` that are there.
    """
    below = tuple(commit.removesuffix(METADATA_NAME) for commit in commits)
    return [name for name in names if not name.startswith(below)]


def _condition(found: Found | None) -> Condition | None:
    if found is None:
        return Condition(absent=True)
    etag = matchable(found.etag)
    return None if etag is None else Condition(etag=etag)


def _key_changed(before: Found | None, now: Found | None) -> bool:
    if before is None or now is None:
        return before is not now
    return before.body != now.body
