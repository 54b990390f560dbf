"""A copy of a checkpoint, decided: what it consists of, and what of it is there already.

Names are those that the commits use, relative to the checkpoint's folder. All that a commit names
is copied first; the commits follow, so that a copy that was cut off never looks complete. It can
be taken up where it ended because a claim says what it was a copy of:

| commits at the target | claim     | what is there under the checkpoint's names                   |
|-----------------------|-----------|--------------------------------------------------------------|
| the source's own      | any       | stays where it has the right size                            |
| none                  | of this   | stays where it has the right size: it was renamed or put when|
|                       |           | it was whole                                                 |
| none                  | none, or  | goes: it may be anything                                     |
|                       | another's |                                                              |
| another checkpoint's  |           | refused, unless it may be replaced. Then the old one stays   |
|                       |           | loadable until the commit, if no name is used by both; else  |
|                       |           | it goes first, commits before data                           |

That holds for files whose names are of one save alone, as those are that s3dcp's saves give to DCP.
All others are bare: safetensors, and what torch's own writer calls `__0_0.distcp` in every save.
Neither a claim nor a commit tells whose file has such a name by now, as others save, edit and
download under the same names. Its bytes do: it stays if they are the same, and is another
checkpoint's if not.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from s3dcp._checksums import combine
from s3dcp._commit import outside
from s3dcp._errors import CheckpointChangedError, CorruptMetadataError
from s3dcp._formats import CLAIM_NAME, is_commit
from s3dcp._keys import S3Uri
from s3dcp._metadata import crcs_of, load_metadata
from s3dcp._ranges import MAX_PARTS, MIN_PART_BYTES
from s3dcp._store import ObjectInfo, PartList

#: What follows the name of a file that is not whole yet.
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Bytes [start, end) of an object: one stored piece of the entry `name`."""

    name: str
    start: int
    end: int
    crc: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint that is to be copied.

    Attributes:
        commits: Their bytes by name, in the order in which they are written: `__0.metadata` last
            of the ranks', as a gap below others shows that ranks are missing.
        files: What the commits name, and what goes with it; an ETag stands for a version of the
            bytes.
        items: Those of each file, where any are known.
        bare: The files whose names others may use too.
    """

    commits: Mapping[str, bytes]
    files: Mapping[str, ObjectInfo]
    items: Mapping[str, Sequence[Item]]
    bare: AbstractSet[str] = frozenset()

    @property
    def last(self) -> tuple[str, ...]:
        """The files that are commits too, and come after the others."""
        return tuple(filter(is_commit, self.files))

    @property
    def size_bytes(self) -> int:
        """The size of the files."""
        return sum(info.size_bytes for info in self.files.values())

    def checked_bytes(self, name: str) -> int:
        """Return how much of a file its items' own CRCs tell of; nothing of a header, say."""
        items = self.items.get(name, ())
        return sum(item.end - item.start for item in items if item.crc is not None)

    @property
    def claim(self) -> bytes:
        """A digest of what would be copied: the same as long as that is unchanged."""
        parts = [(name, sha256(body).hexdigest()) for name, body in self.commits.items()]
        parts += [(name, f"{info.size_bytes} {info.etag}") for name, info in self.files.items()]
        return sha256(repr(sorted(parts)).encode()).hexdigest().encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a copy does.

    Attributes:
        missing: The files to copy.
        uncommitted: The replaced checkpoint's commits, where they cannot stay until the end.
        removed_first: What goes after them, and before anything is written.
        removed_last: What only the replaced checkpoint used, which goes after the commit.
        trusted: Whether what an earlier run left is of this checkpoint.
    """

    missing: tuple[str, ...]
    uncommitted: tuple[str, ...]
    removed_first: tuple[str, ...]
    removed_last: tuple[str, ...]
    trusted: bool


def changed(where: S3Uri | Path) -> CheckpointChangedError:
    """Return the error for a file that is another one by now."""
    return CheckpointChangedError(
        f"{where} was replaced or deleted while it was being copied: copy the checkpoint again"
    )


def is_reserved(name: str) -> bool:
    """Return whether a name is one that no data has."""
    return name == CLAIM_NAME or is_commit(name)


def forged(commit: str, name: str) -> CorruptMetadataError:
    """Return the error for a commit that names as its data what is reserved."""
    return CorruptMetadataError(f"{commit} is forged: it names {name!r} as its data")


def items_of(commits: Mapping[str, bytes], source: str) -> dict[str, list[Item]]:
    """Return what commits of DCP name: the items of each file, in order.

    Raises:
        CorruptMetadataError: a commit cannot be read, or names another commit as its data.
    """
    found: dict[str, list[Item]] = {}
    for commit, body in commits.items():
        metadata = load_metadata(body, source=f"{source}{commit}")
        for index, info in metadata.storage_data.items():
            if is_reserved(info.relative_path):
                raise forged(f"{source}{commit}", info.relative_path)
            crcs = crcs_of(info)
            end = info.offset + info.length
            crc = None if crcs is None else crcs.item
            item = Item(name=index.fqn, start=info.offset, end=end, crc=crc)
            found.setdefault(info.relative_path, []).append(item)
    return {name: sorted(found[name], key=lambda item: item.start) for name in sorted(found)}


def others(
    manifest: Manifest,
    there: Iterable[str],
    commits: Mapping[str, bytes],
    *,
    same: Collection[str] = (),
) -> list[str]:
    """Return the names of what is at the target and of another checkpoint; arguments as `plan`."""
    found = [name for name, body in commits.items() if manifest.commits.get(name) != body]
    return found + sorted((manifest.bare & set(there)) - set(same))


def plan(
    manifest: Manifest,
    there: Mapping[str, int],
    commits: Mapping[str, bytes],
    *,
    claimed: bool,
    same: Collection[str] = (),
    named: Iterable[str] | None = (),
    nested: Iterable[str] = (),
) -> Plan:
    """Decide what to copy, and what goes.

    Args:
        manifest: What is copied.
        there: The sizes of the files at the target that have names of the manifest's.
        commits: Those at the target.
        claimed: Whether an earlier run began to copy just this.
        same: The bare files at the target that have the very bytes.
        named: What another checkpoint's commits at the target name; None if they cannot be read.
        nested: The commits in folders below, whose checkpoints stay.
    """
    replaced = others(manifest, there, commits, same=same)
    replaces = bool(replaced)
    clash = replaces and (
        named is None
        or not manifest.files.keys().isdisjoint({*named, *replaced})
        or not commits.keys() <= manifest.commits.keys()
    )
    trusted = not clash and (claimed or (bool(commits) and not replaces))
    missing = tuple(
        name
        for name, info in manifest.files.items()
        if name not in same and not (trusted and there.get(name) == info.size_bytes)
    )
    stale = [name for name in missing if name in there]
    first = [name for name in manifest.last if name in stale]
    gone = set(named or ()) - manifest.files.keys() if replaces else ()
    old = outside(sorted(name for name in gone if not is_commit(name)), nested)
    return Plan(
        missing=missing,
        uncommitted=(*commits, *first) if clash else (),
        removed_first=(*old, *stale) if clash else tuple(stale),
        removed_last=() if clash else tuple(old),
        trusted=trusted,
    )


def part_bytes_of(
    found: PartList, size_bytes: int, wanted_bytes: int, most_bytes: int
) -> int | None:
    """Return the size of an unfinished upload's parts, or None if nobody can go on with it.

    One is gone on with if all its parts have one size, but for the last, and the object's checksum
    is that of its bytes, as with all that s3dcp begins.

    Args:
        found: What it holds.
        size_bytes: Of the object.
        wanted_bytes: The size that its parts would be given now.
        most_bytes: What they must not be larger than.
    """
    numbers = {part.number for part in found.parts}
    if found.composite or len(numbers) < len(found.parts) or min(numbers, default=1) < 1:
        return None
    largest = max((part.size_bytes for part in found.parts), default=wanted_bytes)
    for size in (wanted_bytes, largest):
        if (
            MIN_PART_BYTES <= size <= most_bytes
            and -(-size_bytes // size) <= MAX_PARTS
            and all(
                0 < part.size_bytes == min(size, size_bytes - (part.number - 1) * size)
                for part in found.parts
            )
        ):
            return size
    return None


class Checks:
    """The CRCs of a file's items, put together from those of its bytes as they pass by.

    Args:
        items: Those of the file. Of those without a CRC nothing is checked.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = [item for item in items if item.crc is not None and item.end > item.start]
        self._edges = sorted({edge for item in self._items for edge in (item.start, item.end)})
        self._sums: dict[int, tuple[int, int]] = {}

    def segments(self, start: int, end: int) -> list[tuple[int, int]]:
        """Cut bytes [start, end) where items begin or end; nothing if no item needs them."""
        if not self._edges:
            return []
        inside = self._edges[bisect_right(self._edges, start) : bisect_left(self._edges, end)]
        return list(zip([start, *inside], [*inside, end], strict=True))

    def add(self, segments: Iterable[tuple[int, int]], crcs: Iterable[int]) -> None:
        """Take note of the CRCs of segments."""
        for (start, end), crc in zip(segments, crcs, strict=True):
            self._sums[start] = (crc, end - start)

    def forget(self) -> None:
        """Start over."""
        self._sums.clear()

    def wrong(self, end: int) -> Item | None:
        """Return an item within the first `end` bytes whose CRC is another than it was saved with.

        Their segments must have been added.
        """
        starts = sorted(self._sums)
        for item in self._items:
            if item.end <= end:
                own = starts[bisect_left(starts, item.start) : bisect_left(starts, item.end)]
                if combine(self._sums[start] for start in own) != item.crc:
                    return item
        return None
