"""Multipart uploads: parts of the right size and order, checksums that fit, one atomic end."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from s3dcp.testing import _listings as listings
from s3dcp.testing import _sums as sums
from s3dcp.testing._answers import Blob, Response, tag, xml, xml_time
from s3dcp.testing._bodies import Body, parse_xml
from s3dcp.testing._objects import StoredObject, StoredPart, Upload
from s3dcp.testing._requests import Request, S3Error

if TYPE_CHECKING:
    from s3dcp.testing._s3 import S3

_COPY_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Uploads:
    """The operations on uploads of one S3."""

    s3: S3

    def list_all(self, request: Request, _: Body) -> Response:
        """ListMultipartUploads."""
        bucket = self.s3.bucket(request.bucket)
        return listings.uploads(
            request.bucket, bucket, request.query, self.s3.options.limits.max_keys
        )

    def list_parts(self, request: Request, _: Body) -> Response:
        """ListParts."""
        found, most = self._upload(request), self.s3.options.limits.max_keys
        return listings.parts(request.bucket, found, request.query, most)

    def create(self, request: Request, _: Body) -> Response:
        """CreateMultipartUpload."""
        bucket = self.s3.bucket(request.bucket)
        algorithm, kind = self._asked_sum(request)
        upload = Upload(
            id=secrets.token_hex(24),
            key=request.key,
            headers=self.s3.kept_headers(request),
            algorithm=algorithm,
            kind=kind,
        )
        bucket.uploads[upload.id] = upload
        answer = xml(
            "InitiateMultipartUploadResult",
            tag("Bucket", request.bucket),
            tag("Key", request.key),
            tag("UploadId", upload.id),
        )
        if algorithm:
            answer.headers["x-amz-checksum-algorithm"] = algorithm
            answer.headers["x-amz-checksum-type"] = kind
        return answer

    def put_part(self, request: Request, body: Body) -> Response:
        """UploadPart."""
        upload, number = self._upload(request), self._number(request)
        if body.blob.size > self.s3.options.limits.max_put_bytes:
            raise S3Error("EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
        blob, found = self.s3.received(request, body)
        if found and found.algorithm != upload.algorithm:
            raise S3Error(
                "InvalidRequest",
                "Checksum Type mismatch occurred, expected checksum Type: "
                f"{(upload.algorithm or 'null').lower()}, actual checksum Type: "
                f"{found.algorithm.lower()}",
            )
        if upload.algorithm and not found:
            if self.s3.options.strict:
                raise S3Error(
                    "InvalidRequest",
                    f"The upload is one with {upload.algorithm}, the part has none.",
                )
            found = sums.compute(upload.algorithm, body.blob)
        part = StoredPart(blob=blob, etag=self.s3.etag(blob), sum=found)
        upload.parts[number] = part
        return Response(200, {"ETag": part.etag, **(_part_headers(found) if found else {})})

    def copy_part(self, request: Request, _: Body) -> Response:
        """UploadPartCopy."""
        upload, number = self._upload(request), self._number(request)
        blob = self.s3.source(request).blob
        if (asked := request.headers.get("x-amz-copy-source-range")) is not None:
            found = _COPY_RANGE.fullmatch(asked)
            start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, 0)
            if not start < stop <= blob.size:
                raise S3Error("InvalidArgument", f"The range {asked!r} is not in the source.")
            blob = blob.slice(start, stop)
        if blob.size > self.s3.options.limits.max_put_bytes:
            raise S3Error("InvalidRequest", "The copy source is larger than what one copy may be")
        own = sums.compute(upload.algorithm, blob) if upload.algorithm else None
        part = StoredPart(blob=blob, etag=self.s3.etag(blob), sum=own)
        upload.parts[number] = part
        return xml(
            "CopyPartResult",
            tag("ETag", part.etag),
            tag("LastModified", xml_time(part.modified)),
            *([tag(own.element, own.text)] if own else ()),
        )

    def complete(self, request: Request, body: Body) -> Response:
        """CompleteMultipartUpload."""
        upload = self._upload(request)
        named = self._named_parts(upload, parse_xml(body))
        self.s3.check_write(request)
        parts = list(named.values())
        if any(part.blob.size < self.s3.options.limits.min_part_bytes for part in parts[:-1]):
            raise S3Error(
                "EntityTooSmall",
                "Your proposed upload is smaller than the minimum allowed size",
                MinSizeAllowed=str(self.s3.options.limits.min_part_bytes),
            )
        blob = Blob.of(*(view for part in parts for view in part.blob.views))
        said = request.headers.get("x-amz-mp-object-size", str(blob.size))
        if said != str(blob.size):
            raise S3Error("InvalidRequest", f"The parts are {blob.size} bytes, not {said}.")
        whole = self._whole_sum(upload, parts, request) if self.s3.options.checksums else None
        stored = StoredObject(
            blob=blob,
            etag=self._etag(parts),
            headers=upload.headers,
            sum=whole,
            part_bytes=tuple(part.blob.size for part in parts),
        )
        bucket = self.s3.bucket(request.bucket)
        bucket.objects[request.key] = stored
        del bucket.uploads[upload.id]
        kind = "COMPOSITE" if whole and whole.parts else "FULL_OBJECT"
        return xml(
            "CompleteMultipartUploadResult",
            tag("Location", f"/{request.bucket}/{request.key}"),
            tag("Bucket", request.bucket),
            tag("Key", request.key),
            tag("ETag", stored.etag),
            *([tag(whole.element, whole.text), tag("ChecksumType", kind)] if whole else ()),
        )

    def abort(self, request: Request, _: Body) -> Response:
        """AbortMultipartUpload."""
        upload = self._upload(request)
        del self.s3.bucket(request.bucket).uploads[upload.id]
        return Response(204)

    def _upload(self, request: Request) -> Upload:
        found = self.s3.bucket(request.bucket).uploads.get(request.query["uploadId"])
        if found is None or found.key != request.key:
            raise S3Error(
                "NoSuchUpload",
                "The specified multipart upload does not exist. The upload ID may be invalid, "
                "or the upload may have been aborted or completed.",
            )
        return found

    def _number(self, request: Request) -> int:
        text, most = request.query["partNumber"], self.s3.options.limits.max_parts
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise S3Error(
                "InvalidArgument", f"Part number must be an integer between 1 and {most}, inclusive"
            )
        return int(text)

    def _asked_sum(self, request: Request) -> tuple[str | None, str]:
        asked = request.headers.get("x-amz-checksum-algorithm")
        kind = request.headers.get("x-amz-checksum-type")
        if asked is None or not self.s3.options.checksums:
            if kind is not None and self.s3.options.checksums:
                raise S3Error("InvalidRequest", "A checksum type needs a checksum algorithm.")
            return None, "FULL_OBJECT"
        algorithm = asked.upper()
        if algorithm not in sums.ALGORITHMS:
            raise S3Error("InvalidRequest", "Checksum algorithm provided is unsupported.")
        kind = (kind or sums.default_kind(algorithm)).upper()
        if kind not in sums.kinds(algorithm):
            raise S3Error(
                "InvalidRequest", f"The {kind} checksum type cannot be used with {asked.lower()}."
            )
        return algorithm, kind

    def _named_parts(self, upload: Upload, document: Element) -> dict[int, StoredPart]:
        """The parts that a completion names, each being the one that was uploaded."""
        found: dict[int, StoredPart] = {}
        for element in document.iterfind("{*}Part"):
            text = element.findtext("{*}PartNumber", "").strip()
            number = int(text) if text.isdecimal() else 0
            if found and number <= max(found):
                raise S3Error("InvalidPartOrder", "The list of parts was not in ascending order.")
            part = upload.parts.get(number)
            etag = element.findtext("{*}ETag", "").strip().strip('"')
            if (
                part is None
                or etag != part.etag.strip('"')
                or not self._fits(element, upload, part)
            ):
                raise S3Error(
                    "InvalidPart",
                    "One or more of the specified parts could not be found. The part may not have "
                    "been uploaded, or the specified entity tag may not match the part's.",
                    PartNumber=text,
                )
            found[number] = part
        if not found:
            raise S3Error("MalformedXML", "The completion names no parts.")
        return found

    def _fits(self, element: Element, upload: Upload, part: StoredPart) -> bool:
        if not self.s3.options.checksums:
            return True
        said = {
            each.tag.rpartition("}")[2]: each.text for each in element if "Checksum" in each.tag
        }
        if upload.kind == "COMPOSITE" and not said:
            raise S3Error(
                "InvalidRequest",
                f"The upload was created using a {upload.algorithm} checksum. The complete request "
                "must include the checksum for each part.",
            )
        return not said or (part.sum is not None and said == {part.sum.element: part.sum.text})

    @staticmethod
    def _whole_sum(upload: Upload, parts: list[StoredPart], request: Request) -> sums.Sum | None:
        """The object's checksum, equal to the one that the request tells, if it does."""
        told = sums.declared(request.headers)
        algorithm = upload.algorithm or (told[0] if told else None)
        if algorithm is None:
            return None
        kind = request.headers.get("x-amz-checksum-type", upload.kind).upper()
        if kind != upload.kind or (told and told[0] != algorithm):
            raise S3Error("InvalidRequest", f"The upload is one with a {upload.kind} {algorithm}.")
        own = [part.sum or sums.compute(algorithm, part.blob) for part in parts]
        if upload.kind == "COMPOSITE":
            whole = sums.composite(algorithm, own)
        else:
            sized = ((each, part.blob.size) for each, part in zip(own, parts, strict=True))
            whole = sums.full_object(algorithm, sized)
        # Of a composite checksum the number of parts may be left out.
        if told and told[1] not in {whole.text, whole.text.partition("-")[0]}:
            raise S3Error(
                "BadDigest", f"The {algorithm} you specified did not match what we calculated."
            )
        return whole

    def _etag(self, parts: list[StoredPart]) -> str:
        raw = b"".join(bytes.fromhex(part.etag.strip('"')) for part in parts)
        if self.s3.options.md5_etags:
            return f'"{hashlib.md5(raw, usedforsecurity=False).hexdigest()}-{len(parts)}"'
        return f'{self.s3.etag(Blob())[:-1]}-{len(parts)}"'


def _part_headers(found: sums.Sum) -> dict[str, str]:
    return {name: value for name, value in found.headers.items() if not name.endswith("-type")}
