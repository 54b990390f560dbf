"""What lies under a URI: which objects belong to which checkpoint, and which to none.

A checkpoint is a folder with a commit (`_formats` says which objects are). Objects belong to it
because its commits name them, wherever below the folder they lie; a name alone says nothing. So

- a checkpoint is complete if all that its commits name is there and long enough;
- data that no commit names is an orphan: what a save that failed or was killed has left, or one
  that is still under way has written, which its age alone tells apart;
- a commit that cannot be read may name anything below its folder, all of which is left alone;
- shards that full files were made of, in `sharded/`, come and go with the full files.

A folder's key ends with a slash; the bucket's own is empty.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from s3dcp._errors import CheckpointNotFoundError, S3ConfigError
from s3dcp._formats import (
    CLAIM_NAME,
    DCP,
    FORMATS,
    MANIFEST_NAME,
    SAFETENSORS,
    SHARDED_FOLDER,
    Format,
    FormatName,
    format_of,
    is_commit,
)
from s3dcp._keys import S3Uri
from s3dcp._store import ObjectInfo

_STEP = re.compile(r"(\d+)/$")
_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint without loading it.

    Attributes:
        uri: Its place, `s3://bucket/folder`.
        format: "dcp", which `s3dcp.load` loads, or "safetensors".
        committed_at: When its commit was written, by the store's clock and in UTC; to the second,
            on S3.
        step: The number that its folder's name ends in, if it does.
        ranks: How many ranks wrote objects, if the objects' names tell.
        objects: How many data objects its commits name.
        tensors: How many tensors they describe.
        size_bytes: The size of the data objects, as its commits have it; of safetensors files, as
            they are.
        problem: What keeps it from being loaded; None if it is complete.
    """

    uri: str
    format: FormatName
    committed_at: datetime | None
    step: int | None
    ranks: int | None
    objects: int
    tensors: int
    size_bytes: int
    problem: str | None

    @property
    def complete(self) -> bool:
        """Whether every object that it names is there, and long enough."""
        return self.problem is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What the commits of a folder say.

    Attributes:
        least_bytes: For each key that they name, how many bytes the object has at the least.
        tensors: How many tensors they describe.
        unreadable: Why one of them cannot be read; it may name anything below the folder.
        damage: Why it cannot be loaded, though it is known what it names.
        ours: Whether only `dcp.save` or a writer of ours can have written it.
    """

    least_bytes: Mapping[str, int]
    tensors: int
    unreadable: str | None = None
    damage: str | None = None
    ours: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder, the commits of one format in it, and what they say."""

    folder: S3Uri
    commits: tuple[ObjectInfo, ...]
    contents: Contents
    problem: str | None
    format: Format = DCP

    @property
    def order(self) -> tuple[datetime, int, str]:
        """What checkpoints are sorted by."""
        return order_of(self.folder.key, self.commits)

    def info(self) -> CheckpointInfo:
        """Return it as users see it."""
        ranks = set(map(self.format.rank_of, self.contents.least_bytes)) - {None}
        return CheckpointInfo(
            uri=str(place_of(self.folder)),
            format=self.format.name,
            committed_at=committed(self.commits),
            step=step_of(self.folder.key),
            ranks=len(ranks) or None,
            objects=len(self.contents.least_bytes),
            tensors=self.contents.tensors,
            size_bytes=sum(self.contents.least_bytes.values()),
            problem=self.problem,
        )


def folder_of(uri: S3Uri) -> S3Uri:
    """Return the folder that a checkpoint's URI stands for."""
    slashed = not uri.key or uri.key.endswith("/")
    return uri if slashed else S3Uri(uri.bucket, f"{uri.key}/")


def place_of(folder: S3Uri) -> S3Uri:
    """Return the URI that stands for a folder: without its slash, where that is the same place."""
    key = folder.key.removesuffix("/")
    return folder if not key or key.endswith("/") else S3Uri(folder.bucket, key)


def only(name: FormatName | None, there: Sequence[Format], where: S3Uri | Path) -> Format:
    """Return the format of the checkpoint that is meant.

    Args:
        name: What it is called, if that was said.
        there: The formats of which there is one.
        where: Its folder.

    Raises:
        CheckpointNotFoundError: there is none.
        S3ConfigError: there are several, and no `name` to say which; or no such format.
    """
    wanted = FORMATS if name is None else [format_of(name)]
    found = [each for each in wanted if each in there]
    if not found:
        raise no_checkpoint(where, wanted, there)
    if len(found) > 1:
        names = " and ".join(each.name for each in found)
        raise S3ConfigError(
            f"There are checkpoints of {names} at {_shown(where)}: say which with format= "
            "(--format)"
        )
    return found[0]


def no_checkpoint(
    where: S3Uri | Path, wanted: Sequence[Format] = FORMATS, there: Sequence[Format] = ()
) -> CheckpointNotFoundError:
    """Return the error for a folder without a commit of some formats; `there` are those it has."""
    sought = ", nor ".join(f"{each.commits} ({each.name})" for each in wanted)
    others = " and ".join(each.name for each in there)
    told = (
        f"There is one of {others}: leave format= (--format) out, or name that"
        if others
        else "List what there is, or name a checkpoint's own folder"
    )
    uri = where if isinstance(where, S3Uri) else None
    return CheckpointNotFoundError(
        f"No checkpoint at {_shown(where)}: there is no {sought}. {told}",
        bucket=uri.bucket if uri else None,
        key=uri.key if uri else None,
    )


def _shown(where: S3Uri | Path) -> str:
    return str(place_of(where) if isinstance(where, S3Uri) else where)


def ancestors(folder: str) -> list[str]:
    """Return the folders that a folder lies in, the bucket's own first."""
    ends = [0, *(match.end() for match in re.finditer("/", folder))]
    return [folder[:end] for end in ends if end < len(folder)]


def step_of(folder: str) -> int | None:
    """Return the number that a folder's name ends in."""
    match = _STEP.search(folder)
    return int(match[1]) if match else None


def committed(commits: Iterable[ObjectInfo]) -> datetime | None:
    """Return when the last of a folder's commits was written, in UTC."""
    times = (info.last_modified for info in commits if info.last_modified)
    return max((time.astimezone(UTC) for time in times), default=None)


def order_of(folder: str, commits: Iterable[ObjectInfo]) -> tuple[datetime, int, str]:
    """Sort a folder by the time of its commit, and by step where that is the same second."""
    step = step_of(folder)
    return committed(commits) or _EARLIEST, -1 if step is None else step, folder


def rank_of(commit: ObjectInfo) -> int | None:
    """Return the rank whose own commit this is."""
    match = DCP.commit.fullmatch(posixpath.basename(commit.key))
    return int(match["rank"]) if match and match["rank"] else None


def commits_by_folder(
    listing: Iterable[ObjectInfo], format_: Format = DCP
) -> dict[str, tuple[ObjectInfo, ...]]:
    """Return a format's commits in each folder that has any, `.metadata` first, then by rank."""
    found: dict[str, list[ObjectInfo]] = {}
    for info in listing:
        if format_.is_commit(info.key):
            found.setdefault(_folder(info.key), []).append(info)
    return {folder: tuple(sorted(commits, key=_commit_order)) for folder, commits in found.items()}


def _commit_order(info: ObjectInfo) -> tuple[int, str]:
    rank = rank_of(info)
    return -1 if rank is None else rank, info.key


def _folder(key: str) -> str:
    folder, slash, _ = key.rpartition("/")
    return folder + slash


def problem_of(
    commits: Iterable[ObjectInfo], contents: Contents, sizes: Mapping[str, int]
) -> str | None:
    """Return what keeps a checkpoint from being loaded, if anything does.

    How many ranks saved without collectives is not written down: only a gap among their commits
    shows, and not a missing last one.

    Args:
        commits: Those of the folder.
        contents: What they say.
        sizes: The size of each object that is there, by key.
    """
    if contents.unreadable or contents.damage:
        return contents.unreadable or contents.damage
    ranks = {rank_of(info) for info in commits}
    if None not in ranks and (absent := next(n for n in count() if n not in ranks)) < len(ranks):
        return f"rank {absent} did not commit"
    missing = sorted(key for key in contents.least_bytes if key not in sizes)
    if missing:
        return f"missing: {_some(missing)}"
    short = sorted(key for key, least in contents.least_bytes.items() if sizes[key] < least)
    if short:
        return f"cut short: {_some(short)}"
    return None


def doomed(
    checkpoints: Iterable[Checkpoint],
    keep: int | None,
    everywhere: Iterable[Checkpoint],
    before: datetime,
) -> list[Checkpoint]:
    """Return the checkpoints of each format that are older than its newest `keep` complete ones.

    None where there are fewer of those. Those in the folder of one that cannot be read stay, and
    so does what another library may have written.

    Args:
        checkpoints: Those to choose from.
        keep: How many complete ones stay; None for all.
        everywhere: All of them, and those in folders above.
        before: A moment. Where ranks commit by themselves, others of them may be about to follow
            one that has committed later: such a checkpoint neither counts nor goes.
    """
    if keep is None:
        return []
    settled = [
        each for each in checkpoints if each.contents.ours and not _may_grow(each.commits, before)
    ]
    shards = {each.commits for each in shards_of(settled, settled)}
    settled.sort(key=lambda each: each.order, reverse=True)
    old: list[Checkpoint] = []
    for format_ in FORMATS:
        found = [each for each in settled if each.format is format_ and each.commits not in shards]
        complete = [each for each in found if each.problem is None]
        if len(complete) > keep:
            old += [each for each in found if each.order < complete[keep - 1].order]
    _, sealed = _claims(everywhere)
    old += shards_of(old, settled)
    return [each for each in old if not each.folder.key.startswith(sealed)]


def shards_of(full: Iterable[Checkpoint], checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints of shards that full ones were made of: ours, and none newer."""
    made = {
        f"{each.folder.key}{SHARDED_FOLDER}/": committed(each.commits)
        for each in full
        if each.format is SAFETENSORS
    }
    return [
        each
        for each in checkpoints
        if each.format is SAFETENSORS
        and each.folder.key in made
        and each.contents.ours
        and all(info.key.endswith(f"/{MANIFEST_NAME}") for info in each.commits)
        and _is_before(committed(each.commits), made[each.folder.key])
    ]


def _is_before(shards: datetime | None, full: datetime | None) -> bool:
    return shards is not None and full is not None and shards <= full


def _may_grow(commits: Iterable[ObjectInfo], before: datetime) -> bool:
    latest = committed(commits)
    return all(rank_of(info) is not None for info in commits) and (
        latest is None or latest > before
    )


def needless(removed: Iterable[Checkpoint], others: Iterable[Checkpoint]) -> list[str]:
    """Return the keys that removed checkpoints named, and that no other one may need.

    Never those of commits: what names one, its own or a nested checkpoint's, is forged.
    """
    named = {
        key
        for each in removed
        for key in each.contents.least_bytes
        if key.endswith(each.format.suffix) and not is_commit(key)
    }
    kept, sealed = _claims(others)
    return sorted(key for key in named - kept if not key.startswith(sealed))


def orphans(
    listing: Iterable[ObjectInfo], checkpoints: Iterable[Checkpoint], before: datetime
) -> list[ObjectInfo]:
    """Return the objects, named as our writer names data, that no checkpoint names.

    Args:
        listing: The objects to choose from.
        checkpoints: Every checkpoint that may name one: at, below and above them.
        before: Younger ones may belong to a save that is under way. Where that overwrites what
            it finds, so may all that lie beside a younger one. A copy that goes on where it ended
            claims its folder anew, and all that lies below it.
    """
    listing = list(listing)
    data = [(info, format_) for info in listing for format_ in FORMATS if format_.is_data(info.key)]
    young = {info.key for info, _ in data if _is_young(info, before)}
    busy = {_folder(info.key) for info, format_ in data if format_.recurs and info.key in young}
    named, sealed = _claims(checkpoints)
    sealed += tuple(_folder(i.key) for i in listing if _is_claim(i.key) and _is_young(i, before))
    return [
        info
        for info, format_ in data
        if info.key not in named
        and info.key not in young
        and not info.key.startswith(sealed)
        and not (format_.recurs and _folder(info.key) in busy)
    ]


def cut_off_copies(
    listing: Iterable[ObjectInfo], checkpoints: Iterable[Checkpoint], before: datetime
) -> dict[ObjectInfo, set[ObjectInfo]]:
    """Return the claims of copies that were cut off, each with what lies beside it.

    That is the copy's or somebody else's, but no checkpoint's. Where anything of the kind is
    younger, at whatever depth, the copy may be under way. Arguments as `orphans`.
    """
    known = list(checkpoints)
    named, sealed = _claims(known)
    committed_folders = {each.folder.key for each in known}
    unnamed = [info for info in listing if info.key not in named and not is_commit(info.key)]
    copies = {}
    for claim in unnamed:
        folder = _folder(claim.key)
        if (
            _is_claim(claim.key)
            and folder not in committed_folders
            and not folder.startswith(sealed)
            and not any(_is_young(i, before) for i in unnamed if i.key.startswith(folder))
        ):
            copies[claim] = {info for info in unnamed if _folder(info.key) == folder} - {claim}
    return copies


def _is_claim(key: str) -> bool:
    return posixpath.basename(key) == CLAIM_NAME


def _is_young(info: ObjectInfo, before: datetime) -> bool:
    return info.last_modified is None or info.last_modified > before


def _claims(checkpoints: Iterable[Checkpoint]) -> tuple[set[str], tuple[str, ...]]:
    """Return the keys that checkpoints name, and the folders that may be named as a whole."""
    found = list(checkpoints)
    named = {key for each in found for key in each.contents.least_bytes}
    return named, tuple(each.folder.key for each in found if each.contents.unreadable)


def _some(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
