"""S3's operations on buckets and objects, over dicts; uploads and listings are in their own files.

Every operation is one synchronous step: it has happened, or it has not.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from s3dcp.testing import _listings as listings
from s3dcp.testing import _sums as sums
from s3dcp.testing._answers import Blob, Response, http_time, tag, xml, xml_time
from s3dcp.testing._bodies import Body, parse_xml
from s3dcp.testing._objects import (
    Bucket,
    Limits,
    StoredObject,
    check_read,
    check_sense,
    check_write,
    parse_range,
)
from s3dcp.testing._requests import Request, S3Error
from s3dcp.testing._uploads import Uploads

_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MAX_KEY_BYTES = 1024
# What S3 keeps with an object, and hands back with it.
_KEPT_HEADERS = {
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "expires",
    "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-aws-kms-key-id",
    "x-amz-storage-class",
}
# Beneath the dropped prefix too, what is small is kept: a checkpoint's metadata is read again.
_KEPT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an S3 behaves.

    Attributes:
        strict: Refuse what S3 lets pass although the client cannot mean it.
        checksums: Verify checksums and echo them; as old stores do, ignore them otherwise.
        conditional_writes: Honour If-Match and If-None-Match on writes; ignore them otherwise.
        md5_etags: ETags are MD5 sums, as S3's are; else they are unique, and cost nothing.
        discard: Bodies of over 4 MiB put under keys with this prefix are dropped: they read as
            zeros.
    """

    region: str
    owner: str
    strict: bool
    checksums: bool
    conditional_writes: bool
    md5_etags: bool
    discard: str | None
    limits: Limits


@dataclass(slots=True)
class S3:
    """The buckets, and what requests do to them."""

    options: Options
    buckets: dict[str, Bucket] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _instance: int = field(default_factory=lambda: secrets.randbits(64))

    def check(self, request: Request) -> None:
        """Refuse what a request's head alone shows to be wrong.

        Raises:
            S3Error: That it is.
        """
        if request.problem is not None:
            raise request.problem
        if len(request.key.encode()) > _MAX_KEY_BYTES:
            raise S3Error("KeyTooLongError", "Your key is too long")
        if request.headers.get("x-amz-expected-bucket-owner", self.options.owner) != (
            self.options.owner
        ):
            raise S3Error("AccessDenied", "The bucket has another owner.")
        if self.options.strict:
            check_sense(request.operation, request.headers)

    def perform(self, request: Request, body: Body) -> Response:
        """Do what a request asks for.

        Raises:
            S3Error: S3 would refuse; nothing has changed.
        """
        uploads = Uploads(self)
        operations: Mapping[str, Callable[[Request, Body], Response]] = {
            "GetObject": self._get,
            "HeadObject": self._get,
            "PutObject": self._put,
            "CopyObject": self._copy,
            "DeleteObject": self._delete,
            "DeleteObjects": self._delete_many,
            "CreateBucket": self._create_bucket,
            "DeleteBucket": self._delete_bucket,
            "HeadBucket": self._head_bucket,
            "GetBucketLocation": self._location,
            "ListBuckets": self._list_buckets,
            "ListObjectsV2": self._list,
            "ListMultipartUploads": uploads.list_all,
            "ListParts": uploads.list_parts,
            "CreateMultipartUpload": uploads.create,
            "UploadPart": uploads.put_part,
            "UploadPartCopy": uploads.copy_part,
            "CompleteMultipartUpload": uploads.complete,
            "AbortMultipartUpload": uploads.abort,
        }
        return operations[request.operation](request, body)

    # What the operations have in common.

    def bucket(self, name: str) -> Bucket:
        """Return a bucket that must be there."""
        try:
            return self.buckets[name]
        except KeyError:
            raise S3Error(
                "NoSuchBucket", "The specified bucket does not exist", BucketName=name
            ) from None

    def region_of(self, name: str) -> str:
        """Return where a bucket is; here, if there is none."""
        found = self.buckets.get(name)
        return found.region if found else self.options.region

    def object(self, bucket: str, key: str) -> StoredObject:
        """Return an object that must be there."""
        try:
            return self.bucket(bucket).objects[key]
        except KeyError:
            raise S3Error("NoSuchKey", "The specified key does not exist.", Key=key) from None

    def etag(self, blob: Blob) -> str:
        """Return the ETag of new bytes."""
        if self.options.md5_etags:
            return f'"{sums.digest(hashlib.md5, blob).hex()}"'
        return f'"{self._instance:016x}{next(self._numbers):016x}"'

    def received(self, request: Request, body: Body) -> tuple[Blob, sums.Sum | None]:
        """Return what is to be kept of a body, and its checksum, which was found true."""
        blob, found = body.blob, None
        if self.options.checksums:
            found = sums.verify(blob, request.headers, body.trailers, body.crc)
        return (blob if self._kept(request.key, blob.size) else Blob.zeros(blob.size)), found

    def drops(self, request: Request, size_bytes: int) -> bool:
        """Return whether a body of that size is not kept, nor an ETag made of it."""
        return not self.options.md5_etags and not self._kept(request.key, size_bytes)

    def source(self, request: Request) -> StoredObject:
        """Return the object that a request copies from, its conditions being met."""
        name = unquote(request.headers["x-amz-copy-source"]).removeprefix("/")
        bucket, _, key = name.partition("/")
        found = self.object(bucket, key)
        check_read(found, request.headers, "x-amz-copy-source-")
        return found

    def check_write(self, request: Request) -> StoredObject | None:
        """Check the conditions of a write, and return what it replaces."""
        found = self.bucket(request.bucket).objects.get(request.key)
        if self.options.conditional_writes:
            check_write(found, request.headers)
        return found

    @staticmethod
    def kept_headers(request: Request) -> dict[str, str]:
        """Return the headers that S3 keeps with a new object."""
        kept = {
            name: value
            for name, value in request.headers.items()
            if name in _KEPT_HEADERS or name.startswith("x-amz-meta-")
        }
        encodings = [each.strip() for each in kept.pop("content-encoding", "").split(",")]
        if real := ",".join(each for each in encodings if each and each != "aws-chunked"):
            kept["content-encoding"] = real
        return {"content-type": "binary/octet-stream"} | kept

    def _kept(self, key: str, size: int) -> bool:
        prefix = self.options.discard
        return prefix is None or size <= _KEPT_BYTES or not key.startswith(prefix)

    # Objects.

    def _get(self, request: Request, _: Body) -> Response:
        found = self.object(request.bucket, request.key)
        check_read(found, request.headers)
        size = found.blob.size
        headers = {
            "ETag": found.etag,
            "Last-Modified": http_time(found.modified),
            "Accept-Ranges": "bytes",
            **found.headers,
        }
        span = None
        if "partNumber" in request.query:
            span = _part_span(found, request.query["partNumber"])
            headers["x-amz-mp-parts-count"] = str(len(found.part_bytes) or 1)
        elif (asked := request.headers.get("range")) is not None:
            span = parse_range(asked, size)
        if span is None:
            if found.sum and request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED":
                headers |= found.sum.headers
            return Response(200, headers, found.blob)
        start, stop = span
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(206, headers, found.blob.slice(start, stop))

    def _put(self, request: Request, body: Body) -> Response:
        self.check_write(request)
        if body.blob.size > self.options.limits.max_put_bytes:
            raise S3Error("EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
        blob, found = self.received(request, body)
        stored = StoredObject(
            blob=blob, etag=self.etag(blob), headers=self.kept_headers(request), sum=found
        )
        self.bucket(request.bucket).objects[request.key] = stored
        return Response(200, {"ETag": stored.etag, **(found.headers if found else {})})

    def _copy(self, request: Request, _: Body) -> Response:
        source = self.source(request)
        self.check_write(request)
        replaced = request.headers.get("x-amz-metadata-directive", "COPY").upper() == "REPLACE"
        if not replaced and source is self.bucket(request.bucket).objects.get(request.key):
            raise S3Error(
                "InvalidRequest",
                "This copy request is illegal because it is trying to copy an object to itself "
                "without changing the object's metadata",
            )
        if source.blob.size > self.options.limits.max_put_bytes:
            raise S3Error("InvalidRequest", "The copy source is larger than what one copy may be")
        given = self.kept_headers(request)
        stored = StoredObject(
            blob=source.blob,
            etag=self.etag(source.blob),
            headers=given if replaced else _copied_headers(source.headers, given),
            sum=source.sum if source.sum and not source.sum.parts else None,
        )
        self.bucket(request.bucket).objects[request.key] = stored
        return xml(
            "CopyObjectResult",
            tag("ETag", stored.etag),
            tag("LastModified", xml_time(stored.modified)),
            *([tag(stored.sum.element, stored.sum.text)] if stored.sum else ()),
        )

    def _delete(self, request: Request, _: Body) -> Response:
        found = self.bucket(request.bucket).objects
        if request.key in found or "if-match" in request.headers:
            self.check_write(request)
        found.pop(request.key, None)
        return Response(204)

    def _delete_many(self, request: Request, body: Body) -> Response:
        found = self.bucket(request.bucket)
        if sums.declared(request.headers) is None and "content-md5" not in request.headers:
            raise S3Error("InvalidRequest", "Missing required header for this request: Content-MD5")
        self.received(request, body)
        document = parse_xml(body)
        keys = [each.text or "" for each in document.iterfind("{*}Object/{*}Key")]
        if not 0 < len(keys) <= self.options.limits.max_keys:
            raise S3Error("MalformedXML", f"{len(keys)} keys to delete")
        for key in keys:
            found.objects.pop(key, None)
        quiet = document.findtext("{*}Quiet", "").lower() == "true"
        return xml(
            "DeleteResult", *(f"<Deleted>{tag('Key', key)}</Deleted>" for key in keys if not quiet)
        )

    # Buckets.

    def _create_bucket(self, request: Request, _: Body) -> Response:
        if not valid_bucket(request.bucket):
            raise S3Error("InvalidBucketName", "The specified bucket is not valid.")
        if request.bucket in self.buckets:
            raise S3Error("BucketAlreadyOwnedByYou", "You already own it.")
        self.buckets[request.bucket] = Bucket(self.options.region)
        return Response(200, {"Location": f"/{request.bucket}"})

    def _delete_bucket(self, request: Request, _: Body) -> Response:
        if self.bucket(request.bucket).objects:
            raise S3Error("BucketNotEmpty", "The bucket you tried to delete is not empty")
        del self.buckets[request.bucket]
        return Response(204)

    def _head_bucket(self, request: Request, _: Body) -> Response:
        return Response(200, {"x-amz-bucket-region": self.bucket(request.bucket).region})

    def _location(self, request: Request, _: Body) -> Response:
        return xml("LocationConstraint", self.bucket(request.bucket).region)

    def _list_buckets(self, request: Request, _: Body) -> Response:
        prefix = request.query.get("prefix", "")
        return listings.buckets(
            {name: each for name, each in self.buckets.items() if name.startswith(prefix)}
        )

    def _list(self, request: Request, _: Body) -> Response:
        found = self.bucket(request.bucket)
        return listings.objects(request.bucket, found, request.query, self.options.limits.max_keys)


def valid_bucket(name: str) -> bool:
    """Return whether S3 allows a bucket to be called so."""
    return bool(_BUCKET_NAME.fullmatch(name)) and ".." not in name


def _part_span(found: StoredObject, number: str) -> tuple[int, int] | None:
    sizes = found.part_bytes or (found.blob.size,)
    if not number.isdecimal() or not 1 <= int(number) <= len(sizes):
        raise S3Error(
            "InvalidPartNumber", "The requested partnumber is not satisfiable", status=416
        )
    start = sum(sizes[: int(number) - 1])
    return (start, start + sizes[int(number) - 1]) if found.blob.size else None


def _copied_headers(source: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    # Where it is kept, and how, is the copy's own; what it is, is the source's.
    own = {"x-amz-storage-class"} | {
        name for name in _KEPT_HEADERS if name.startswith("x-amz-server-side")
    }
    return {name: value for name, value in source.items() if name not in own} | {
        name: value for name, value in given.items() if name in own
    }
