"""CRCs of memory, and how CRCs of neighbours make the CRC of the whole.

awscrt computes them with the processor's own instructions and without the GIL.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

from awscrt import checksums as _crt

from s3dcp._config import ChecksumName
from s3dcp._errors import IntegrityError
from s3dcp._keys import S3Uri
from s3dcp._store import Checksum, Views

#: The CRC that every item carries in the checkpoint's metadata, whatever the store is sent.
ITEM_CHECKSUM: ChecksumName = "CRC64NVME"


# Below this much memory a checksum is quicker than the way to a worker thread and back.
INLINE_CHECKSUM_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class _Algorithm:
    crc: Callable[[memoryview, int], int]
    combine: Callable[[int, int, int], int]
    size_bytes: int


_ALGORITHMS: dict[ChecksumName, _Algorithm] = {
    "CRC64NVME": _Algorithm(_crt.crc64nvme, _crt.combine_crc64nvme, 8),
    "CRC32C": _Algorithm(_crt.crc32c, _crt.combine_crc32c, 4),
    "CRC32": _Algorithm(_crt.crc32, _crt.combine_crc32, 4),
}


def is_known(algorithm: str) -> TypeGuard[ChecksumName]:
    """Return whether checksums of this name can be computed here."""
    return algorithm in _ALGORITHMS


def crc_of(views: Views, algorithm: ChecksumName = ITEM_CHECKSUM) -> int:
    """Return the CRC of `views`, one after the other."""
    compute, value = _ALGORITHMS[algorithm].crc, 0
    for view in views:
        value = compute(view, value)
    return value


def crcs_of(views: Views, algorithm: ChecksumName = ITEM_CHECKSUM) -> list[int]:
    """Return the CRC of each view by itself."""
    compute = _ALGORITHMS[algorithm].crc
    return [compute(view, 0) for view in views]


def combine(pieces: Iterable[tuple[int, int]], algorithm: ChecksumName = ITEM_CHECKSUM) -> int:
    """Return the CRC of neighbouring pieces from their own.

    Args:
        pieces: For each piece, in order, its CRC and its length in bytes.
        algorithm: The CRC they were computed with.
    """
    join, value = _ALGORITHMS[algorithm].combine, 0
    for crc, size_bytes in pieces:
        value = join(value, crc, size_bytes)
    return value


def encoded(checksum: Checksum) -> str:
    """Return a checksum as S3's headers carry it: base64 of its bytes, big end first."""
    size = _ALGORITHMS[checksum.algorithm].size_bytes
    return base64.b64encode(checksum.value.to_bytes(size, "big")).decode()


def decoded(algorithm: ChecksumName, text: str) -> Checksum | None:
    """Return the checksum that S3 writes so, or None if it is none."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    if len(raw) != _ALGORITHMS[algorithm].size_bytes:
        return None
    return Checksum(algorithm, int.from_bytes(raw, "big"))


def damaged(name: str, uri: S3Uri, start: int, end: int) -> IntegrityError:
    """Return the error for an object's bytes [start, end) that are not what was saved."""
    return IntegrityError(
        f"{name}: bytes [{start}, {end}) of {uri} differ from those that were saved (CRC64NVME): "
        "load an older checkpoint",
        bucket=uri.bucket,
        key=uri.key,
    )
