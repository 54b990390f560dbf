"""S3 over aiobotocore: one attempt a request, every error mapped once, bodies without copies."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, get_args
from urllib.parse import urlsplit

import aiohttp

from s3dcp._botocore import new_client, new_session
from s3dcp._checksums import ITEM_CHECKSUM, decoded, encoded
from s3dcp._config import ChecksumName, S3ClientConfig
from s3dcp._errors import PreconditionFailedError, S3Exception, S3ProtocolError, S3TimeoutError
from s3dcp._failures import mapped, setup_error
from s3dcp._keys import S3Uri
from s3dcp._payload import ViewsPayload
from s3dcp._receive import receive
from s3dcp._store import (
    Checksum,
    Condition,
    Moved,
    ObjectInfo,
    Part,
    PartList,
    Receipt,
    Scatter,
    UploadInfo,
    Views,
    matchable,
)
from s3dcp._turns import Turns

_AWS_HOST = re.compile(r"(^|\.)(amazonaws\.com|amazonaws\.com\.cn)$")


class S3Store:
    """A `Store` over one aiobotocore client, for use on the loop that opened it.

    Once it is open, `max_attempts` is what the engine is to go by.

    Args:
        region: The bucket's region. None: `AWS_REGION`, botocore's own sources, or else the bucket.
        config: The client's settings.
    """

    def __init__(self, region: str | None, config: S3ClientConfig) -> None:
        self._region = region
        self._config = config
        self._exit = contextlib.AsyncExitStack()
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._turns = Turns()
        self.conditional_writes = config.conditional_writes
        self.max_attempts = config.max_attempts

    async def open(self) -> None:
        """Find the settings and make the client, which connects with the first request.

        Raises:
            S3ConfigError: a profile or a setting that does not exist or cannot work.
        """
        try:
            await self._opened()
        except Exception as exc:
            raise setup_error(exc) from exc

    @property
    def is_encrypted(self) -> bool:
        """Whether requests go over TLS; once opened."""
        return bool(urlsplit(self._client.meta.endpoint_url).scheme == "https")

    async def close(self) -> None:
        """Close the connections."""
        async with self._opening:
            self._client = None
            await self._exit.aclose()

    async def get(self, uri: S3Uri) -> tuple[bytes | bytearray, ObjectInfo]:
        with mapped("GetObject", uri):
            answer = await self._call("get_object", uri, **self._read_args())
            response: aiohttp.ClientResponse = answer["Body"].raw_stream
            if "ContentLength" not in answer:
                async with response:
                    body = await response.read()
                return body, _info(uri, answer, len(body))
            size = int(answer["ContentLength"])
            buffer = bytearray(size)
            await receive(response, Scatter([memoryview(buffer)]), self._idle_s)
            return buffer, _info(uri, answer, size)

    async def get_range(
        self, uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> ObjectInfo:
        end = start + into.remaining
        with mapped("GetObject", uri):
            answer = await self._call(
                "get_object",
                uri,
                Range=f"bytes={start}-{end - 1}",
                **_given(IfMatch=matchable(if_match)),
                **self._read_args(),
            )
            response: aiohttp.ClientResponse = answer["Body"].raw_stream
            try:
                size = _checked_range(answer, start, end)
            except S3ProtocolError:
                response.close()
                raise
            into.etag = answer.get("ETag")
            await receive(response, into, self._idle_s)
            return _info(uri, answer, size)

    async def head(self, uri: S3Uri, *, with_crc: bool = False) -> ObjectInfo:
        with mapped("HeadObject", uri):
            mode = {"ChecksumMode": "ENABLED"} if with_crc else {}
            answer = await self._call("head_object", uri, **mode, **self._read_args())
            if "ContentLength" not in answer:
                raise S3ProtocolError("The answer does not say how large the object is")
            info = _info(uri, answer, int(answer["ContentLength"]))
            checksum = decoded(ITEM_CHECKSUM, answer.get(f"Checksum{ITEM_CHECKSUM}", ""))
            return replace(info, crc=checksum.value) if checksum else info

    async def list(self, uri: S3Uri, *, delimiter: str = "") -> AsyncIterator[ObjectInfo]:
        client = await self._opened()
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=uri.bucket, Prefix=uri.key, Delimiter=delimiter, **self._read_args()
        )
        with mapped("ListObjectsV2", uri):
            async for page in pages:
                for prefix in page.get("CommonPrefixes", ()):
                    yield ObjectInfo(key=prefix["Prefix"], size_bytes=0, etag=None)
                for entry in page.get("Contents", ()):
                    yield ObjectInfo(
                        key=entry["Key"],
                        size_bytes=int(entry["Size"]),
                        etag=_quoted(entry.get("ETag")),
                        last_modified=entry.get("LastModified"),
                    )

    async def put(
        self,
        uri: S3Uri,
        body: Views,
        *,
        checksum: Checksum | None = None,
        condition: Condition | None = None,
        moved: Moved | None = None,
    ) -> Receipt:
        condition = condition or Condition()
        try:
            answer = await self._send(
                "PutObject",
                "put_object",
                uri,
                body,
                moved,
                **_checksum_args(checksum),
                **_given(IfMatch=condition.etag, IfNoneMatch="*" if condition.absent else None),
                **self._write_args(),
            )
        except PreconditionFailedError:
            self.conditional_writes = True
            raise
        return _receipt(answer, checksum)

    async def create_upload(self, uri: S3Uri, *, checksum: ChecksumName | None) -> str:
        sums = {"ChecksumAlgorithm": checksum, "ChecksumType": "FULL_OBJECT"} if checksum else {}
        with mapped("CreateMultipartUpload", uri):
            answer = await self._call("create_multipart_upload", uri, **sums, **self._write_args())
            upload_id = answer.get("UploadId")
            if not upload_id:
                raise S3ProtocolError("The answer has no upload id")
            return str(upload_id)

    async def upload_part(
        self,
        uri: S3Uri,
        upload_id: str,
        number: int,
        body: Views,
        *,
        checksum: Checksum | None,
        moved: Moved | None = None,
    ) -> Receipt:
        answer = await self._send(
            "UploadPart",
            "upload_part",
            uri,
            body,
            moved,
            UploadId=upload_id,
            PartNumber=number,
            **_checksum_args(checksum),
            **self._read_args(),
        )
        return _receipt(answer, checksum)

    async def complete_upload(
        self, uri: S3Uri, upload_id: str, parts: Sequence[Part], *, checksum: Checksum | None
    ) -> Receipt:
        named = [
            {"PartNumber": part.number, "ETag": part.etag, **_checksum_args(part.checksum)}
            for part in parts
        ]
        sums = {**_checksum_args(checksum), "ChecksumType": "FULL_OBJECT"} if checksum else {}
        with mapped("CompleteMultipartUpload", uri):
            answer = await self._call(
                "complete_multipart_upload",
                uri,
                UploadId=upload_id,
                MultipartUpload={"Parts": named},
                **sums,
                **self._read_args(),
            )
            return _receipt(answer, checksum)

    async def abort_upload(self, uri: S3Uri, upload_id: str) -> None:
        with mapped("AbortMultipartUpload", uri):
            await self._call("abort_multipart_upload", uri, UploadId=upload_id, **self._read_args())

    async def list_uploads(self, uri: S3Uri) -> AsyncIterator[UploadInfo]:
        client = await self._opened()
        pages = client.get_paginator("list_multipart_uploads").paginate(
            Bucket=uri.bucket, Prefix=uri.key, **self._read_args()
        )
        with mapped("ListMultipartUploads", uri):
            async for page in pages:
                for entry in page.get("Uploads", ()):
                    yield UploadInfo(
                        key=entry["Key"],
                        upload_id=entry["UploadId"],
                        initiated=entry.get("Initiated"),
                    )

    async def list_parts(self, uri: S3Uri, upload_id: str) -> PartList:
        client = await self._opened()
        pages = client.get_paginator("list_parts").paginate(
            Bucket=uri.bucket, Key=uri.key, UploadId=upload_id, **self._read_args()
        )
        head: dict[str, Any] = {}
        parts: list[Part] = []
        with mapped("ListParts", uri):
            async for page in pages:
                head = head or page
                parts += map(_part, page.get("Parts", ()))
        return PartList(
            algorithm=head.get("ChecksumAlgorithm"),
            composite=head.get("ChecksumType") == "COMPOSITE",
            parts=tuple(sorted(parts, key=lambda part: part.number)),
        )

    async def delete(self, uri: S3Uri, *, if_match: str | None = None) -> None:
        condition = matchable(if_match) if self.conditional_writes else None
        with mapped("DeleteObject", uri):
            await self._call("delete_object", uri, **_given(IfMatch=condition), **self._read_args())

    async def copy(self, source: S3Uri, target: S3Uri, *, if_match: str | None) -> None:
        with mapped("CopyObject", target):
            await self._call(
                "copy_object", target, **_copied(source, if_match), **self._write_args()
            )

    async def copy_part(
        self,
        source: S3Uri,
        start: int,
        end: int,
        target: S3Uri,
        upload_id: str,
        number: int,
        *,
        if_match: str | None,
    ) -> Part:
        with mapped("UploadPartCopy", target):
            answer = await self._call(
                "upload_part_copy",
                target,
                UploadId=upload_id,
                PartNumber=number,
                CopySourceRange=f"bytes={start}-{end - 1}",
                **_copied(source, if_match),
                **self._read_args(),
            )
            etag = answer.get("CopyPartResult", {}).get("ETag")
            if not etag:
                # rclone takes it for an UploadPart without a body, and says so with a 200.
                failure = S3ProtocolError("The store does not copy parts: the answer has no ETag")
                failure.retryable = False
                raise failure
            return Part(number=number, size_bytes=end - start, etag=etag, checksum=None)

    @property
    def _idle_s(self) -> float:
        return self._config.read_timeout_s

    def _read_args(self) -> dict[str, str]:
        return _given(
            ExpectedBucketOwner=self._config.expected_bucket_owner,
            RequestPayer="requester" if self._config.requester_pays else None,
        )

    def _write_args(self) -> dict[str, str]:
        return self._read_args() | _given(
            StorageClass=self._config.storage_class,
            ServerSideEncryption=self._config.server_side_encryption,
            SSEKMSKeyId=self._config.sse_kms_key_id,
        )

    async def _send(
        self,
        operation: str,
        method: str,
        uri: S3Uri,
        body: Views,
        moved: Moved | None,
        **args: object,
    ) -> dict[str, Any]:
        payload = ViewsPayload(body, self._idle_s, self._turns, moved)
        try:
            with mapped(operation, uri):
                # aiohttp writes nothing for a payload of no bytes, and botocore wants a body.
                answer = await self._call(
                    method, uri, Body=payload if len(payload) else b"", **args
                )
                if payload.unsent_bytes:
                    raise S3ProtocolError(
                        f"The store answered {answer['ResponseMetadata']['HTTPStatusCode']} when "
                        f"{payload.unsent_bytes} of {len(payload)} bytes were not sent yet"
                    )
                return answer
        except S3Exception as exc:
            if not payload.stalled:
                raise
            raise S3TimeoutError(
                f"{operation} {uri}: the store took no bytes for {self._idle_s:g} s: check "
                "the network, or raise read_timeout_s",
                operation=operation,
                bucket=uri.bucket,
                key=uri.key,
            ) from exc

    async def _call(self, method: str, uri: S3Uri, **args: object) -> dict[str, Any]:
        client = await self._opened()
        await self._turns.make()
        answer: dict[str, Any] = await getattr(client, method)(
            Bucket=uri.bucket, Key=uri.key, **args
        )
        return answer

    async def _opened(self) -> Any:
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    self._client = await self._make()
        return self._client

    async def _make(self) -> Any:
        session = await new_session(self._config)
        self.max_attempts = self._config.attempts(session.get_config_variable("max_attempts"))
        client = await self._exit.enter_async_context(
            new_client(session, self._region, self._config)
        )
        host = urlsplit(client.meta.endpoint_url).hostname or ""
        if self.conditional_writes is None and _AWS_HOST.search(host):
            self.conditional_writes = True
        return client


def _given(**args: str | None) -> dict[str, str]:
    return {name: value for name, value in args.items() if value is not None}


def _checksum_args(checksum: Checksum | None) -> dict[str, str]:
    return {f"Checksum{checksum.algorithm}": encoded(checksum)} if checksum else {}


def _receipt(answer: dict[str, Any], checksum: Checksum | None) -> Receipt:
    echoed = answer.get(f"Checksum{checksum.algorithm}") if checksum else None
    if echoed is not None and checksum is not None and echoed != encoded(checksum):
        raise S3ProtocolError(
            f"The store's checksum {echoed} is not that of the bytes sent, {encoded(checksum)}"
        )
    return Receipt(etag=answer.get("ETag"), checksum_echoed=echoed is not None)


def _part(entry: dict[str, Any]) -> Part:
    sums = (
        decoded(name, entry[f"Checksum{name}"])
        for name in get_args(ChecksumName)
        if f"Checksum{name}" in entry
    )
    return Part(
        number=int(entry["PartNumber"]),
        size_bytes=int(entry["Size"]),
        etag=_quoted(entry.get("ETag")),
        checksum=next(sums, None),
    )


def _copied(source: S3Uri, if_match: str | None) -> dict[str, Any]:
    return {
        "CopySource": {"Bucket": source.bucket, "Key": source.key},
        **_given(CopySourceIfMatch=matchable(if_match)),
    }


def _quoted(etag: str | None) -> str | None:
    """Return a listed ETag as it is everywhere else: rclone lists them without their quotes."""
    return etag if etag is None or etag.endswith('"') else f'"{etag}"'


def _info(uri: S3Uri, answer: dict[str, Any], size_bytes: int | None) -> ObjectInfo:
    return ObjectInfo(
        key=uri.key,
        size_bytes=size_bytes or 0,
        etag=answer.get("ETag"),
        last_modified=answer.get("LastModified"),
    )


_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


def _checked_range(answer: dict[str, Any], start: int, end: int) -> int:
    """Return the object's size, having checked that the answer is the range asked for."""
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    length = answer.get("ContentLength")
    shown = answer.get("ContentRange")
    # A store that states the range is believed whatever its status: rclone's is 200.
    if status in {200, 206} and shown and (match := _CONTENT_RANGE.fullmatch(shown)):
        first, last, size = (int(number) for number in match.groups())
        if (first, last + 1) == (start, end) and length == end - start:
            return size
    elif status == 200 and not shown and start == 0 and length == end:
        return end
    raise S3ProtocolError(
        f"Asked for bytes [{start}, {end}), the store answered {status} with "
        f"Content-Range {shown!r} and Content-Length {length}"
    )
