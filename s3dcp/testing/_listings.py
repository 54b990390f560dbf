"""Listings: pages of keys, common prefixes, uploads and parts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from s3dcp.testing._answers import Response, encoded_key, raw_tag, tag, xml, xml_time
from s3dcp.testing._objects import Bucket, Upload
from s3dcp.testing._requests import S3Error


@dataclass(slots=True)
class _Page:
    """Names in order, those with a common prefix rolled up.

    Attributes:
        last: The last name or prefix on it, from which the next page goes on; "" at the end.
    """

    names: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    last: str = ""


def _page(
    names: Iterable[str], query: Mapping[str, str], size: int, after: str, after_prefix: str
) -> _Page:
    if not size:
        return _Page()
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    page, latest = _Page(), ""
    # By code point, which is the order of their UTF-8 too.
    for name in sorted(name for name in names if name.startswith(prefix)):
        head, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else ("",) * 3
        rolled = prefix + head + found if found else ""
        if name <= after or (rolled and rolled in {latest, after_prefix}):
            continue
        if len(page.names) + len(page.prefixes) == size:
            page.last = latest
            break
        (page.prefixes if rolled else page.names).append(rolled or name)
        latest = rolled or name
    return page


def _size(query: Mapping[str, str], name: str, most: int) -> int:
    text = query.get(name, str(most))
    if not text.isdecimal():
        raise S3Error("InvalidArgument", f"Provided {name} not an integer or within integer range")
    return min(int(text), most)


def _encoding(query: Mapping[str, str]) -> str | None:
    encoding = query.get("encoding-type")
    if encoding not in {None, "url"}:
        raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request")
    return encoding


def _asked(query: Mapping[str, str], encoding: str | None) -> list[str]:
    """What of the query a listing repeats."""
    return [
        tag("Prefix", encoded_key(query.get("prefix", ""), encoding)),
        *(
            [tag("Delimiter", encoded_key(query["delimiter"], encoding))]
            if "delimiter" in query
            else []
        ),
        *([tag("EncodingType", encoding)] if encoding else []),
    ]


def _prefixes(page: _Page, encoding: str | None) -> list[str]:
    return [
        raw_tag("CommonPrefixes", tag("Prefix", encoded_key(each, encoding)))
        for each in page.prefixes
    ]


def _flag(name: str, value: object) -> str:
    return tag(name, "true" if value else "false")


def buckets(found: Mapping[str, Bucket]) -> Response:
    """Answer ListBuckets, on one page."""
    return xml(
        "ListAllMyBucketsResult",
        raw_tag("Owner", tag("ID", "owner")),
        raw_tag(
            "Buckets",
            *(
                raw_tag("Bucket", tag("Name", name), tag("CreationDate", xml_time(each.created)))
                for name, each in sorted(found.items())
            ),
        ),
    )


def objects(name: str, bucket: Bucket, query: Mapping[str, str], most: int) -> Response:
    """Answer ListObjectsV2."""
    if query["list-type"] != "2":
        raise S3Error("InvalidArgument", "list-type is 2")
    encoding, size = _encoding(query), _size(query, "max-keys", most)
    token = query.get("continuation-token")
    after = _from_token(token) if token is not None else query.get("start-after", "")
    page = _page(bucket.objects, query, size, after, after)
    return xml(
        "ListBucketResult",
        tag("Name", name),
        *_asked(query, encoding),
        tag("MaxKeys", size),
        tag("KeyCount", len(page.names) + len(page.prefixes)),
        *([tag("ContinuationToken", token)] if token is not None else []),
        *(
            [tag("StartAfter", encoded_key(query["start-after"], encoding))]
            if "start-after" in query
            else []
        ),
        _flag("IsTruncated", page.last),
        *([tag("NextContinuationToken", _token(page.last))] if page.last else []),
        *(_contents(bucket, key, encoding) for key in page.names),
        *_prefixes(page, encoding),
    )


def _contents(bucket: Bucket, key: str, encoding: str | None) -> str:
    found = bucket.objects[key]
    return raw_tag(
        "Contents",
        tag("Key", encoded_key(key, encoding)),
        tag("LastModified", xml_time(found.modified)),
        tag("ETag", found.etag),
        *([tag("ChecksumAlgorithm", found.sum.algorithm)] if found.sum else []),
        tag("Size", found.blob.size),
        tag("StorageClass", found.headers.get("x-amz-storage-class", "STANDARD")),
    )


def _token(key: str) -> str:
    # Opaque, as S3's is: whoever takes it for a key is found out.
    return base64.urlsafe_b64encode(f"1:{key}".encode()).decode()


def _from_token(token: str) -> str:
    try:
        text = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        text = ""
    if not text.startswith("1:"):
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect")
    return text.removeprefix("1:")


def uploads(name: str, bucket: Bucket, query: Mapping[str, str], most: int) -> Response:
    """Answer ListMultipartUploads; a page may end between two uploads of one key."""
    encoding, size = _encoding(query), _size(query, "max-uploads", most)
    # One name for each upload: a NUL orders an upload after its key, before any longer key.
    named = {f"{each.key}\0{each.id}": each for each in bucket.uploads.values()}
    key, upload_id = query.get("key-marker", ""), query.get("upload-id-marker", "")
    after = f"{key}\0{upload_id or chr(0x10FFFF)}" if key else ""
    page = _page(named, query, size, after, key)
    last_key, _, last_id = page.last.partition("\0")
    return xml(
        "ListMultipartUploadsResult",
        tag("Bucket", name),
        *_asked(query, encoding),
        tag("KeyMarker", encoded_key(key, encoding)),
        tag("UploadIdMarker", upload_id),
        tag("MaxUploads", size),
        _flag("IsTruncated", page.last),
        *(
            [
                tag("NextKeyMarker", encoded_key(last_key, encoding)),
                tag("NextUploadIdMarker", last_id),
            ]
            if page.last
            else []
        ),
        *(_upload(named[each], encoding) for each in page.names),
        *_prefixes(page, encoding),
    )


def _upload(found: Upload, encoding: str | None) -> str:
    return raw_tag(
        "Upload",
        tag("Key", encoded_key(found.key, encoding)),
        tag("UploadId", found.id),
        tag("StorageClass", found.headers.get("x-amz-storage-class", "STANDARD")),
        tag("Initiated", xml_time(found.initiated)),
        *_created_for(found),
    )


def parts(bucket: str, found: Upload, query: Mapping[str, str], most: int) -> Response:
    """Answer ListParts."""
    size = _size(query, "max-parts", most)
    marker = _size(query, "part-number-marker", 10_000) if "part-number-marker" in query else 0
    rest = [number for number in sorted(found.parts) if number > marker]
    page = rest[:size]
    return xml(
        "ListPartsResult",
        tag("Bucket", bucket),
        tag("Key", found.key),
        tag("UploadId", found.id),
        tag("PartNumberMarker", marker),
        tag("NextPartNumberMarker", page[-1] if page else 0),
        tag("MaxParts", size),
        _flag("IsTruncated", len(rest) > len(page)),
        *_created_for(found),
        *(_part(found, number) for number in page),
    )


def _created_for(upload: Upload) -> list[str]:
    if upload.algorithm is None:
        return []
    return [tag("ChecksumAlgorithm", upload.algorithm), tag("ChecksumType", upload.kind)]


def _part(upload: Upload, number: int) -> str:
    found = upload.parts[number]
    return raw_tag(
        "Part",
        tag("PartNumber", number),
        tag("LastModified", xml_time(found.modified)),
        tag("ETag", found.etag),
        tag("Size", found.blob.size),
        *([tag(found.sum.element, found.sum.text)] if found.sum else []),
    )
