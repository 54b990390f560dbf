"""What makes safetensors files a checkpoint: their names, and the object that is its commit.

Full tensors have Hugging Face's index, `model.safetensors.index.json`, which says in which file
each is. Shards, of which a tensor has several, have a manifest in its place, which names the files
alone. Under `metadata`, where other readers do not look, both have for every file that s3dcp wrote
the id of the save that wrote it, which the file's header repeats, and its tensors' CRCs.
"""

from __future__ import annotations

import base64
import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from s3dcp._errors import CorruptMetadataError, S3ConfigError
from s3dcp._formats import INDEX_NAME, MANIFEST_NAME, SUFFIX
from s3dcp._metadata import ItemCrcs
from s3dcp._safetensors import MAX_HEADER_BYTES, is_count, parse_json

#: Keys of a file's `__metadata__`: torch's own two, Hugging Face's, and ours.
SHARDING_KEY = "DCP_SHARDING_INFO"
VERSION_KEY, VERSION = "DCP_VERSION", "1.0"
FORMAT_KEY, FORMAT = "format", "pt"
SAVE_ID_KEY = "s3dcp_save_id"
OFFSETS_KEY = "saved_offsets"

_OURS = "s3dcp"
_CRC_BYTES = 8


def file_name(number: int, count: int, shard: int | None = None) -> str:
    """Return the name of file `number` of `count`, or of a rank's shard of it; all from 1 on."""
    name = f"model-{number:05}-of-{count:05}{SUFFIX}"
    return name if shard is None else f"shard-{shard:05}-{name}"


def numbered(fqns: Iterable[str], mapping: Mapping[str, int]) -> dict[int, list[str]]:
    """Return the names that go to each file, by the file's number.

    Raises:
        S3ConfigError: the mapping lacks one, or a number is none from 1 on.
    """
    if any(type(number) is not int or number < 1 for number in mapping.values()):
        raise S3ConfigError("fqn_to_index_mapping: files are numbered from 1 on")
    found: defaultdict[int, list[str]] = defaultdict(list)
    for fqn in fqns:
        if fqn not in mapping:
            raise S3ConfigError(f"fqn_to_index_mapping names no file for {fqn}")
        found[mapping[fqn]].append(fqn)
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class SavedFile:
    """What the commit says of a file that s3dcp wrote: whose it is, and its tensors' CRCs."""

    save_id: str
    crcs: Mapping[str, ItemCrcs] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """A commit.

    Attributes:
        weight_map: The file of each tensor; None in a manifest.
        saved: The files that s3dcp wrote, by name; in a manifest, all.
        total_bytes: The size of all tensors.
    """

    weight_map: Mapping[str, str] | None
    saved: Mapping[str, SavedFile]
    total_bytes: int

    @property
    def name(self) -> str:
        """The object's name."""
        return MANIFEST_NAME if self.weight_map is None else INDEX_NAME

    @property
    def files(self) -> set[str]:
        """The names of all files."""
        return set(self.saved if self.weight_map is None else self.weight_map.values())

    @property
    def tensors(self) -> set[str]:
        """The names of all tensors; in a manifest, of those that have CRCs, as all of ours do."""
        if self.weight_map is not None:
            return set(self.weight_map)
        return {name for file in self.saved.values() for name in file.crcs}


def dump_index(index: Index) -> bytes:
    """Write a commit as JSON."""
    files = {
        name: {"save_id": file.save_id, "crc64nvme": {k: _packed(v) for k, v in file.crcs.items()}}
        for name, file in index.saved.items()
    }
    content: dict[str, object] = {"metadata": {"total_size": index.total_bytes, _OURS: files}}
    if index.weight_map is not None:
        content["weight_map"] = dict(index.weight_map)
    return json.dumps(content, indent=1).encode()


def parse_index(body: bytes | bytearray, *, source: str) -> Index:
    """Read a commit, ours or another library's.

    Raises:
        CorruptMetadataError: it is none.
    """
    try:
        if len(body) > MAX_HEADER_BYTES:
            raise ValueError(f"{len(body)} bytes are no index")  # noqa: TRY301
        content = parse_json(body)
        metadata = content.get("metadata") or {}
        saved = {name: _saved(value) for name, value in metadata.get(_OURS, {}).items()}
        total_bytes = metadata.get("total_size", 0)
        weight_map = None
        if not source.endswith(MANIFEST_NAME):
            weight_map = _checked(content["weight_map"])
    except (ValueError, TypeError, AttributeError, KeyError, struct.error, RecursionError) as exc:
        raise CorruptMetadataError(
            f"{source} is malformed, load another checkpoint: {type(exc).__name__}: {exc}"
        ) from exc
    return Index(weight_map=weight_map, saved=saved, total_bytes=total_bytes)


def _checked(weight_map: dict[str, Any]) -> dict[str, str]:
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise TypeError("a file's name is no text")
    return weight_map


# A CRC is 16 digits; one with several blocks is a list: the CRC, the size of a block, their CRCs.


def _packed(crcs: ItemCrcs) -> object:
    whole = f"{crcs.item:016x}"
    if len(crcs.blocks) < 2:
        return whole
    blocks = struct.pack(f"<{len(crcs.blocks)}Q", *crcs.blocks)
    return [whole, crcs.block_bytes, base64.b64encode(blocks).decode()]


def _saved(value: Any) -> SavedFile:
    save_id = value["save_id"]
    if not isinstance(save_id, str):
        raise TypeError("a save's id is no text")
    return SavedFile(save_id, {name: _unpacked(crc) for name, crc in value["crc64nvme"].items()})


def _unpacked(value: Any) -> ItemCrcs:
    if isinstance(value, str):
        return ItemCrcs(_crc(value))
    whole, block_bytes, packed = value
    if not is_count(block_bytes) or not block_bytes:
        raise ValueError("the size of a block is not a positive number")
    blocks = base64.b64decode(packed, validate=True)
    crcs = struct.unpack(f"<{len(blocks) // _CRC_BYTES}Q", blocks)
    return ItemCrcs(_crc(whole), block_bytes=block_bytes, blocks=crcs)


def _crc(text: str) -> int:
    digits = bytes.fromhex(text)
    if len(digits) != _CRC_BYTES:
        raise ValueError("a CRC is not a number of 64 bits")
    return int.from_bytes(digits, "big")
