"""The checksums that S3 knows: of one body, of parts put together, and how headers say them."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from awscrt import checksums as _crt

from s3dcp.testing._answers import Blob
from s3dcp.testing._requests import S3Error

_PREFIX = "x-amz-checksum-"
_SETTINGS = {"algorithm", "mode", "type"}


@dataclass(frozen=True, slots=True)
class Sum:
    """A checksum's value.

    Attributes:
        algorithm: As the headers name it, in capitals: "CRC64NVME".
        raw: Its bytes, big end first.
        parts: How many parts' checksums it is made of; 0 where it is of the bytes themselves.
    """

    algorithm: str
    raw: bytes
    parts: int = 0

    @property
    def text(self) -> str:
        """The value as S3 writes it."""
        text = base64.b64encode(self.raw).decode()
        return f"{text}-{self.parts}" if self.parts else text

    @property
    def headers(self) -> dict[str, str]:
        """The headers that tell of it."""
        kind = "COMPOSITE" if self.parts else "FULL_OBJECT"
        return {_PREFIX + self.algorithm.lower(): self.text, _PREFIX + "type": kind}

    @property
    def element(self) -> str:
        """The name of the XML element that tells of it."""
        return f"Checksum{self.algorithm}"


_CRCS: dict[str, tuple[Callable[[memoryview, int], int], Callable[[int, int, int], int], int]] = {
    "CRC32": (_crt.crc32, _crt.combine_crc32, 4),
    "CRC32C": (_crt.crc32c, _crt.combine_crc32c, 4),
    "CRC64NVME": (_crt.crc64nvme, _crt.combine_crc64nvme, 8),
}
_DIGESTS = {"SHA1": hashlib.sha1, "SHA256": hashlib.sha256}
ALGORITHMS = frozenset({*_CRCS, *_DIGESTS})


def default_kind(algorithm: str) -> str:
    """Return what S3 makes of parts' checksums where the client does not say."""
    return "FULL_OBJECT" if algorithm == "CRC64NVME" else "COMPOSITE"


def kinds(algorithm: str) -> frozenset[str]:
    """Return what may be made of parts' checksums."""
    if algorithm == "CRC64NVME":
        return frozenset({"FULL_OBJECT"})
    return frozenset({"COMPOSITE"} | ({"FULL_OBJECT"} if algorithm in _CRCS else set()))


class RunningCrc:
    """A CRC of bytes as they come."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._update, _, self._size = _CRCS[algorithm]
        self._value = 0

    def update(self, view: memoryview) -> None:
        """Go on over more bytes."""
        self._value = self._update(view, self._value)

    def sum(self) -> Sum:
        """Return the checksum of what came up to now."""
        return Sum(self._algorithm, self._value.to_bytes(self._size, "big"))


def crc_to_verify(headers: Mapping[str, str]) -> str | None:
    """Return the algorithm of the CRC that is all that a body has to be read for.

    None where there is none, or where its signature or another hash needs the body too.
    """
    payload = headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD").removeprefix("STREAMING-")
    if "content-md5" in headers or not payload.startswith("UNSIGNED-PAYLOAD"):
        return None
    names = {*headers, headers.get("x-amz-trailer", "").lower()}
    found = [name for name in _CRCS if _PREFIX + name.lower() in names]
    return found[0] if len(found) == 1 else None


def compute(algorithm: str, blob: Blob) -> Sum:
    """Return a checksum of bytes."""
    if algorithm in _CRCS:
        running = RunningCrc(algorithm)
        for view in blob.views:
            running.update(view)
        return running.sum()
    return Sum(algorithm, digest(_DIGESTS[algorithm], blob))


def digest(kind: Callable[[], hashlib._Hash], blob: Blob) -> bytes:
    """Return a hash of bytes."""
    running = kind()
    for view in blob.views:
        running.update(view)
    return running.digest()


def full_object(algorithm: str, parts: Iterable[tuple[Sum, int]]) -> Sum:
    """Return the checksum of parts put together, from each one's own and its size."""
    _, combine, size = _CRCS[algorithm]
    value = 0
    for part, size_bytes in parts:
        value = combine(value, int.from_bytes(part.raw, "big"), size_bytes)
    return Sum(algorithm, value.to_bytes(size, "big"))


def composite(algorithm: str, parts: Iterable[Sum]) -> Sum:
    """Return the checksum of the parts' checksums."""
    raws = [part.raw for part in parts]
    whole = compute(algorithm, Blob.of(b"".join(raws)))
    return Sum(algorithm, whole.raw, len(raws))


def declared(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the algorithm and value of the checksum in some headers or trailers.

    Raises:
        S3Error: More than one is there, or one that S3 does not know.
    """
    found = [
        (name.removeprefix(_PREFIX).upper(), value)
        for name, value in headers.items()
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _SETTINGS
    ]
    if len(found) > 1:
        raise S3Error(
            "InvalidRequest", "Expecting a single x-amz-checksum- header. Multiple were found."
        )
    if found and found[0][0] not in ALGORITHMS:
        raise S3Error("InvalidRequest", f"This server does not know the checksum {found[0][0]}.")
    return found[0] if found else None


def verify(
    body: Blob, headers: Mapping[str, str], trailers: Mapping[str, str], known: Sum | None
) -> Sum | None:
    """Return the checksum that came with a body, having found it true.

    Args:
        body: What came.
        headers: Of the request.
        trailers: Those after the body.
        known: What was computed while the body came, by the algorithm of `crc_to_verify`.

    Raises:
        S3Error: It is not, or is announced and missing.
    """
    _verify_md5(body, headers.get("content-md5"))
    if (announced := headers.get("x-amz-trailer", "").lower()) and announced not in trailers:
        raise S3Error("MalformedTrailerError", f"The trailer {announced} did not come.")
    sent = declared(headers) or declared(trailers)
    if sent is None:
        if "x-amz-sdk-checksum-algorithm" in headers:
            raise S3Error(
                "InvalidRequest",
                "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* "
                "or x-amz-trailer headers were found.",
            )
        return None
    algorithm, value = sent
    found = known or compute(algorithm, body)
    if found.text != value:
        raise S3Error(
            "BadDigest",
            f"The {algorithm} you specified did not match the calculated checksum: "
            f"{value}, not {found.text}.",
        )
    return found


def _verify_md5(body: Blob, value: str | None) -> None:
    if value is None:
        return
    try:
        wanted = base64.b64decode(value, validate=True)
    except binascii.Error:
        wanted = b""
    if len(wanted) != 16:
        raise S3Error("InvalidDigest", "The Content-MD5 you specified was invalid.")
    if digest(hashlib.md5, body) != wanted:
        raise S3Error("BadDigest", "The Content-MD5 you specified did not match what we received.")
