"""S3 URIs and the keys made from them.

A URI names bytes, not a file: the key is taken as written (spaces, `+`, `%`, unicode, double
and trailing slashes), never percent-decoded, never normalised. Refused is what S3 servers and
HTTP clients do not agree on: `.` and `..` as a segment, and what no key may hold.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass

from s3dcp._errors import InvalidS3UriError

_SCHEME = "s3://"
_MAX_KEY_BYTES = 1024
# An access point's ARN contains slashes of its own, an outpost's two more; a bucket's name cannot.
_ARN = re.compile(
    r"(?P<bucket>arn:[^/]*:(?:outpost/[^/]+/)?accesspoint[/:][^/]+)(?:/(?P<key>.*))?", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class S3Uri:
    """A bucket and a key (which may be empty, for the bucket itself)."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.key}"


def parse_s3_uri(path: str | os.PathLike[str]) -> S3Uri:
    """Split an S3 URI into bucket and key.

    `pathlib` folds `s3://b/k` into `s3:/b/k`; a path object is mended, since it can have meant
    nothing else.

    Args:
        path: `s3://bucket/key`, as text or as a path object.

    Raises:
        InvalidS3UriError: not an S3 URI, no bucket or none that can be, a `.` or `..` segment, or
            too long a key.
    """
    text = uri_text(path)
    if not text.startswith(_SCHEME):
        raise InvalidS3UriError(
            f"Only s3:// URIs are supported, got {text!r}: write s3://BUCKET/PREFIX"
        )
    rest = text[len(_SCHEME) :]
    if arn := _ARN.fullmatch(rest):
        bucket, key = arn["bucket"], arn["key"] or ""
    else:
        bucket, _, key = rest.partition("/")
    if "@" in bucket:  # as others have credentials in URIs, which errors must not show
        raise InvalidS3UriError(
            "A bucket's name has no @. Credentials are not for URIs: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and write s3://BUCKET/PREFIX"
        )
    if not bucket:
        raise InvalidS3UriError(
            f"Bucket name must be non-empty in {text!r}: write s3://BUCKET/PREFIX"
        )
    _check_key(key, text)
    return S3Uri(bucket, key)


def uri_text(path: str | os.PathLike[str]) -> str:
    """Return a path as text, mending what `pathlib` did to the scheme.

    Raises:
        InvalidS3UriError: neither text nor a path object.
    """
    if isinstance(path, str):
        return path
    try:
        text = os.fspath(path)
    except TypeError as exc:
        raise InvalidS3UriError(f"Expected an s3:// URI, got {type(path).__name__}") from exc
    if not isinstance(text, str):
        raise InvalidS3UriError(f"Expected an s3:// URI as text, got {type(path).__name__}")
    if text.startswith("s3:/") and not text.startswith(_SCHEME):
        text = _SCHEME + text[len("s3:/") :]
    return text


def join(base: str, suffix: str) -> str:
    """Put `suffix` under `base` with one slash between them, as DCP does for folders."""
    return posixpath.join(base, suffix)


def child_key(prefix: str, relative_path: str, *, source: str) -> str:
    """Return the key of a checkpoint's object from the name in its metadata.

    Args:
        prefix: The checkpoint's own key.
        relative_path: The object's name as its `.metadata` has it. Not trusted.
        source: Where the name was read, for the error.

    Raises:
        InvalidS3UriError: the name would lead outside of the prefix.
    """
    if not relative_path or relative_path.startswith("/"):
        raise InvalidS3UriError(f"{source} names {relative_path!r}, which is no path below it")
    key = join(prefix, relative_path)
    _check_key(key, f"{relative_path!r} in {source}")
    return key


def _check_key(key: str, shown: str) -> None:
    if any(segment in {".", ".."} for segment in key.split("/")):
        raise InvalidS3UriError(f"'.' and '..' are not allowed as a segment of a key: {shown}")
    if "\0" in key:
        raise InvalidS3UriError(f"A key cannot hold a NUL character: {shown!r}")
    try:
        size = len(key.encode())
    except UnicodeEncodeError as exc:
        raise InvalidS3UriError(f"A key must be valid unicode: {shown!r}") from exc
    if size > _MAX_KEY_BYTES:
        raise InvalidS3UriError(f"A key may have {_MAX_KEY_BYTES} bytes, this has {size}: {shown}")
