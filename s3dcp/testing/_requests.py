"""What a request asks of S3: its operation, bucket and key; and how S3 refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, unquote_plus

from s3dcp.testing._http import Head

_STATUS = {
    "AccessDenied": 403,
    "BucketAlreadyOwnedByYou": 409,
    "BucketNotEmpty": 409,
    "ConditionalRequestConflict": 409,
    "ExpiredToken": 400,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "InvalidRange": 416,
    "MethodNotAllowed": 405,
    "MissingContentLength": 411,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "NotModified": 304,
    "PermanentRedirect": 301,
    "PreconditionFailed": 412,
    "RequestTimeTooSkewed": 403,
    "SignatureDoesNotMatch": 403,
    "SlowDown": 503,
}
# What a client may well run into. All else that S3 refuses is a fault of the client's.
_ORDINARY = frozenset(
    {
        "BucketAlreadyOwnedByYou",
        "BucketNotEmpty",
        "InvalidRange",
        "NoSuchBucket",
        "NoSuchKey",
        "NoSuchUpload",
        "NotModified",
        "PermanentRedirect",
        "PreconditionFailed",
    }
)


class S3Error(Exception):
    """An answer that is an error.

    Args:
        code: S3's name for it.
        message: For people.
        status: The HTTP status; that of the code by default, or 400.
        headers: Added to the answer's.
        fields: Elements added to the answer's XML.
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: str,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status or _STATUS.get(code, 400)
        self.headers = dict(headers or {})
        self.fields = fields

    @property
    def ordinary(self) -> bool:
        """Whether a client without faults may be answered like this."""
        # Where a bucket is may be found out by asking in the wrong region.
        return self.code in _ORDINARY or "Region" in self.fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request, as far as its head tells.

    Attributes:
        operation: S3's name for it; "Unknown" where this server has none.
        bucket: Empty for requests to the service.
        key: Percent-decoded once; empty for requests to the bucket.
        query: Decoded; "" for parameters without a value.
        raw_query: As sent, for the signature.
        problem: Why it cannot be served, if so.
    """

    method: str
    operation: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    path: str
    raw_query: str
    problem: S3Error | None = None


@dataclass(frozen=True, slots=True)
class _Route:
    operation: str
    method: str
    level: str
    needs: frozenset[str] = frozenset()
    allows: frozenset[str] = frozenset()
    header: str | None = None


def _route(
    operation: str, method: str, level: str, needs: str = "", allows: str = "", **kwargs: str
) -> _Route:
    return _Route(
        operation, method, level, frozenset(needs.split()), frozenset(allows.split()), **kwargs
    )


_COPY = "x-amz-copy-source"
_LISTING = "prefix delimiter encoding-type"
# The first that fits; what a route needs is in the query.
_ROUTES = (
    _route("ListBuckets", "GET", "service", "", "max-buckets prefix continuation-token"),
    _route("ListParts", "GET", "object", "uploadId", "max-parts part-number-marker"),
    _route("GetObject", "GET", "object", "", "partNumber"),
    _route("HeadObject", "HEAD", "object", "", "partNumber"),
    _route("UploadPartCopy", "PUT", "object", "uploadId partNumber", header=_COPY),
    _route("UploadPart", "PUT", "object", "uploadId partNumber"),
    _route("CopyObject", "PUT", "object", header=_COPY),
    _route("PutObject", "PUT", "object"),
    _route("CreateMultipartUpload", "POST", "object", "uploads"),
    _route("CompleteMultipartUpload", "POST", "object", "uploadId"),
    _route("AbortMultipartUpload", "DELETE", "object", "uploadId"),
    _route("DeleteObject", "DELETE", "object"),
    _route(
        "ListMultipartUploads",
        "GET",
        "bucket",
        "uploads",
        f"{_LISTING} key-marker max-uploads upload-id-marker",
    ),
    _route(
        "ListObjectsV2",
        "GET",
        "bucket",
        "list-type",
        f"{_LISTING} continuation-token fetch-owner max-keys start-after",
    ),
    _route("GetBucketLocation", "GET", "bucket", "location"),
    _route("HeadBucket", "HEAD", "bucket"),
    _route("CreateBucket", "PUT", "bucket"),
    _route("DeleteObjects", "POST", "bucket", "delete"),
    _route("DeleteBucket", "DELETE", "bucket"),
)
_AWS_HOST = re.compile(r"(?:(?P<bucket>.+)\.)?s3(?:[.-][a-z0-9-]+)*\.amazonaws\.com")


@dataclass(frozen=True, slots=True)
class Router:
    """Reads requests.

    Args:
        hosts: The names under which `bucket.name` is a bucket's own host.
    """

    hosts: frozenset[str] = field(default=frozenset({"127.0.0.1", "localhost"}))

    def route(self, head: Head) -> Request:
        """Return what a head asks for; what is wrong with it is told by `problem`."""
        path, _, raw_query = head.target.partition("?")
        query = _query(raw_query)
        problem: S3Error | None = None
        try:
            bucket, key = self._place(head, path)
        except UnicodeDecodeError:
            bucket, key = "", ""
            problem = S3Error("InvalidURI", "Couldn't parse the specified URI.")
        if "host" not in head.headers:
            problem = S3Error("InvalidRequest", "Missing required header for this request: host")
        operation, unserved = _operation(head, bucket, key, query)
        return Request(
            method=head.method,
            operation=operation,
            bucket=bucket,
            key=key,
            query=query,
            headers=head.headers,
            path=path,
            raw_query=raw_query,
            problem=problem or unserved,
        )

    def _place(self, head: Head, path: str) -> tuple[str, str]:
        if bucket := self._bucket_of_host(head.headers.get("host", "")):
            return bucket, unquote(path[1:], errors="strict")
        bucket, _, key = path[1:].partition("/")
        return unquote(bucket, errors="strict"), unquote(key, errors="strict")

    def _bucket_of_host(self, host: str) -> str:
        name = re.sub(r":\d+$", "", host).lower()
        if found := _AWS_HOST.fullmatch(name):
            return found["bucket"] or ""
        for base in self.hosts:
            if name.endswith("." + base):
                return name.removesuffix("." + base)
        return ""


def _query(raw: str) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in raw.split("&") if pair)
    return {unquote_plus(name): unquote_plus(value) for name, _, value in pairs}


def _operation(
    head: Head, bucket: str, key: str, query: Mapping[str, str]
) -> tuple[str, S3Error | None]:
    level = "object" if key else "bucket" if bucket else "service"
    asked = set(query) - {"x-id"}  # the SDKs' own label
    known = False
    for route in _ROUTES:
        if (route.method, route.level) != (head.method, level):
            continue
        known = True
        if route.needs <= asked and (route.header is None or route.header in head.headers):
            if not (strange := asked - route.needs - route.allows):
                return route.operation, None
            names = ", ".join(sorted(strange))
            return "Unknown", S3Error("NotImplemented", f"This server does not know ?{names}")
    if known:
        return "Unknown", S3Error("NotImplemented", f"This server has no such {head.method}")
    return "Unknown", S3Error("MethodNotAllowed", f"{head.method} on a {level}")
