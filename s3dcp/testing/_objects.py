"""What is stored: buckets, objects and uploads; and the conditions that requests put on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from s3dcp.testing._answers import Blob
from s3dcp.testing._requests import S3Error
from s3dcp.testing._sums import Sum

_RANGE = re.compile(r"bytes=(?:(?P<first>\d+)-(?P<last>\d*)|-(?P<suffix>\d+))")


def now() -> datetime:
    """Return the time, as exactly as S3 keeps it."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What S3 allows; smaller, for tests that reach the limits with less.

    Attributes:
        min_part_bytes: Of every part but the last.
        max_put_bytes: Of one PUT, part or copy.
        max_keys: Of a page of any listing, and of one DeleteObjects.
    """

    min_part_bytes: int = 5 << 20
    max_put_bytes: int = 5 << 30
    max_parts: int = 10_000
    max_keys: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """An object's bytes and what is known of them; replaced, never changed.

    Attributes:
        etag: With its quotes.
        headers: What GET and HEAD hand back besides: type, metadata, storage class, encryption.
        part_bytes: The sizes of its parts, if it was uploaded in parts.
    """

    blob: Blob
    etag: str
    headers: Mapping[str, str]
    sum: Sum | None = None
    part_bytes: tuple[int, ...] = ()
    modified: datetime = field(default_factory=now)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A part of an upload."""

    blob: Blob
    etag: str
    sum: Sum | None
    modified: datetime = field(default_factory=now)


@dataclass(slots=True, kw_only=True)
class Upload:
    """A multipart upload that is under way.

    Attributes:
        algorithm: The checksum it was created for, if any.
        kind: "FULL_OBJECT" or "COMPOSITE".
    """

    id: str
    key: str
    headers: Mapping[str, str]
    algorithm: str | None
    kind: str
    parts: dict[int, StoredPart] = field(default_factory=dict)
    initiated: datetime = field(default_factory=now)


@dataclass(slots=True)
class Bucket:
    """Objects and uploads by key and by id.

    Attributes:
        region: Where it is.
    """

    region: str
    created: datetime = field(default_factory=now)
    objects: dict[str, StoredObject] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)


def _names(condition: str, etag: str) -> bool:
    return any(each.strip() in {"*", etag, etag.strip('"')} for each in condition.split(","))


def check_read(found: StoredObject, headers: Mapping[str, str], prefix: str = "") -> None:
    """Check the conditions of a GET, a HEAD, or a copy's source.

    Args:
        found: What is to be read.
        headers: The request's.
        prefix: Comes before the conditions' names: "x-amz-copy-source-" for a copy's source.

    Raises:
        S3Error: Not modified, or a precondition failed; both are failures to a copy.
    """
    unchanged = S3Error(
        "PreconditionFailed" if prefix else "NotModified", headers={"ETag": found.etag}
    )
    if (wanted := headers.get(f"{prefix}if-match")) is not None:
        if not _names(wanted, found.etag):
            raise _failed("If-Match")
    elif (since := _time(headers.get(f"{prefix}if-unmodified-since"))) and found.modified > since:
        raise _failed("If-Unmodified-Since")
    if (unwanted := headers.get(f"{prefix}if-none-match")) is not None:
        if _names(unwanted, found.etag):
            raise unchanged
    elif (since := _time(headers.get(f"{prefix}if-modified-since"))) and found.modified <= since:
        raise unchanged


def check_write(found: StoredObject | None, headers: Mapping[str, str]) -> None:
    """Check the conditions of a request that replaces or deletes an object.

    Raises:
        S3Error: One of them failed, or is one that S3 does not have.
    """
    absent, wanted = headers.get("if-none-match"), headers.get("if-match")
    if absent is not None and (absent != "*" or wanted is not None):
        raise S3Error("NotImplemented", "If-None-Match takes * alone, and no If-Match beside it.")
    if absent and found:
        raise _failed("If-None-Match")
    if wanted is None:
        return
    if found is None:
        raise S3Error("NoSuchKey", "The specified key does not exist.")
    if not _names(wanted, found.etag):
        raise _failed("If-Match")


def _failed(name: str) -> S3Error:
    return S3Error(
        "PreconditionFailed",
        "At least one of the pre-conditions you specified did not hold",
        Condition=name,
    )


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return parsedate_to_datetime(text)
    except ValueError:
        return None


def check_sense(operation: str, headers: Mapping[str, str]) -> None:
    """Refuse what S3 lets pass although it cannot do what the client means by it.

    Raises:
        S3Error: A range that would be ignored, a condition that never holds or is not looked at.
    """
    if (asked := headers.get("range")) is not None and (
        operation not in {"GetObject", "HeadObject"} or parse_range(asked, 1 << 62) is None
    ):
        raise S3Error("InvalidArgument", f"S3 would ignore the range {asked!r}.")
    conditions = {name: headers[name] for name in ("if-match", "if-none-match") if name in headers}
    if conditions and operation not in {
        "GetObject",
        "HeadObject",
        "PutObject",
        "CopyObject",
        "CompleteMultipartUpload",
        "DeleteObject",
    }:
        raise S3Error("InvalidArgument", f"S3 would ignore the condition of this {operation}.")
    for name, value in conditions.items():
        if not all(re.fullmatch(r'\s*(\*|"[^"]+")\s*', each) for each in value.split(",")):
            raise S3Error("InvalidArgument", f"No object has the ETag {value!r} of {name}.")


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Return where a Range header starts and stops, or None for what S3 ignores.

    Raises:
        S3Error: The range lies beyond the object's end.
    """
    if (found := _RANGE.fullmatch(text)) is None:
        return None
    if found["suffix"] is not None:
        start, stop = max(size - int(found["suffix"]), 0), size
    else:
        start = int(found["first"])
        stop = min(int(found["last"]) + 1, size) if found["last"] else size
        if found["last"] and int(found["last"]) < start:
            return None
    if start >= stop:
        raise S3Error(
            "InvalidRange",
            "The requested range is not satisfiable",
            headers={"Content-Range": f"bytes */{size}"},
            RangeRequested=text,
            ActualObjectSize=str(size),
        )
    return start, stop
