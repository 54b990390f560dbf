"""The formats of checkpoints, by the names of their objects.

A checkpoint is a folder with a commit, and what the commit names. An object with a name that our
writer gives to data, and that no commit names, may be what a save has left.

| format      | commits                                            | data, as our writer calls it  |
|-------------|----------------------------------------------------|-------------------------------|
| dcp         | `.metadata`, or `__{rank}.metadata` of every rank  | `*.distcp`                    |
|             | that saved without collectives                     |                               |
| safetensors | the index of full files, the manifest of shards,   | `model-00001-of-00002`, and   |
|             | or `model.safetensors`, which is all the data too  | its shards: `*.safetensors`   |

Beside safetensors lie a model's small files, which no commit names: its companions.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from s3dcp._commit import METADATA_NAME
from s3dcp._errors import S3ConfigError

FormatName: TypeAlias = Literal["dcp", "safetensors"]

INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "model.safetensors.manifest.json"
#: A checkpoint of one file needs no index.
SINGLE_NAME = "model.safetensors"
#: Where the shards lie of which full files were made.
SHARDED_FOLDER = "sharded"
SUFFIX = ".safetensors"
#: What a copy calls the object that says, as long as it is under way, what it is a copy of.
CLAIM_NAME = ".s3dcp-copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What tells a format's objects, by the last segment of their keys.

    Attributes:
        name: As users know it.
        commit: The names of commits.
        commits: The same for people.
        prefixes: What these start with.
        data: The names that our writer gives to data.
        rank: What such a name starts with; the group is the rank that wrote it.
        suffix: What the names of all data end in that a commit may have deleted.
        recurs: Whether a save overwrites the data of the one before it.
        companion: The names of what is of use with it, and lies beside it.
    """

    name: FormatName
    commit: re.Pattern[str]
    commits: str
    prefixes: tuple[str, ...]
    data: re.Pattern[str]
    rank: re.Pattern[str]
    suffix: str
    recurs: bool
    companion: re.Pattern[str] | None = None

    def is_commit(self, key: str) -> bool:
        """Return whether a key is one that this format's commits have."""
        return self.commit.fullmatch(posixpath.basename(key)) is not None

    def is_data(self, key: str) -> bool:
        """Return whether a key is one that our writer gives to data."""
        return self.data.fullmatch(posixpath.basename(key)) is not None

    def is_companion(self, key: str) -> bool:
        """Return whether a key is one that a checkpoint's companions have."""
        if self.companion is None or is_commit(key):
            return False
        return self.companion.fullmatch(posixpath.basename(key)) is not None

    def is_own(self, name: str) -> bool:
        """Return whether data that a commit names may go with it when it is replaced.

        Data that recurs lies beside its commit: below there may be a checkpoint of its own.

        Args:
            name: Relative to the commit's folder.
        """
        return name.endswith(self.suffix) and not (self.recurs and "/" in name)

    def rank_of(self, key: str) -> int | None:
        """Return the rank that wrote an object, if its key tells."""
        match = self.rank.match(posixpath.basename(key))
        return int(match[1]) if match else None


DCP = Format(
    name="dcp",
    commit=re.compile(rf"(?:__(?P<rank>\d+))?{re.escape(METADATA_NAME)}"),
    commits=METADATA_NAME,
    prefixes=(METADATA_NAME, "__"),
    data=re.compile(r".*\.distcp", re.DOTALL),
    rank=re.compile(r"__(\d+)_"),
    suffix="",
    recurs=False,
)
SAFETENSORS = Format(
    name="safetensors",
    commit=re.compile("|".join(map(re.escape, (INDEX_NAME, MANIFEST_NAME, SINGLE_NAME)))),
    commits=f"{INDEX_NAME}, {MANIFEST_NAME} or {SINGLE_NAME}",
    prefixes=(SINGLE_NAME,),
    data=re.compile(rf"(?:shard-\d{{5,}}-)?model-\d{{5,}}-of-\d{{5,}}{re.escape(SUFFIX)}"),
    rank=re.compile(r"shard-(\d+)-"),
    suffix=SUFFIX,
    recurs=True,
    # An index of other weights, such as pytorch_model.bin.index.json, is of no use without them.
    companion=re.compile(
        r"(?!.*\.index\.json)[^.].*\.(?:jinja|json|md|model|py|tiktoken|txt)", re.DOTALL
    ),
)
FORMATS = (DCP, SAFETENSORS)


def format_of(name: str) -> Format:
    """Return a format by its name.

    Raises:
        S3ConfigError: there is none of that name.
    """
    for each in FORMATS:
        if each.name == name:
            return each
    names = " or ".join(repr(each.name) for each in FORMATS)
    raise S3ConfigError(f"format must be {names}, got {name!r}")


def is_commit(key: str) -> bool:
    """Return whether a key is one that commits have, of any format."""
    return any(each.is_commit(key) for each in FORMATS)


def holds_data(commit: str) -> bool:
    """Return whether a commit is a file with tensors, and no description of others."""
    return commit.endswith(SUFFIX)
