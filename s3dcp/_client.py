"""S3 over aiobotocore: one attempt a request, every error mapped once.

botocore signs, builds addresses and finds credentials. It is told not to retry (the engine does),
not to follow a bucket to another region than the one that the user gave (who is told), not to hash
or sum bodies (the engine has), and not to ask before it sends one.

Where the user gave no region, botocore follows a bucket to its own: the answer says which that is,
or a HeadBucket does. The request is sent once more, and the later ones go there at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.loaders import JSONFileLoader, create_loader
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

from s3dcp._checksums import ITEM_CHECKSUM, decoded, encoded
from s3dcp._config import ChecksumName, S3ClientConfig
from s3dcp._errors import PreconditionFailedError, S3Exception, S3ProtocolError, S3TimeoutError
from s3dcp._failures import mapped, setup_error
from s3dcp._keys import S3Uri
from s3dcp._payload import ViewsPayload
from s3dcp._portal import offload
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

_log = logging.getLogger("s3dcp.client")

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
                    client = await self._exit.enter_async_context(await self._make())
                    host = urlsplit(client.meta.endpoint_url).hostname or ""
                    if self.conditional_writes is None and _AWS_HOST.search(host):
                        self.conditional_writes = True
                    self._client = client
        return self._client

    async def _make(self) -> Any:
        config = self._config
        session = AioSession(profile=config.profile)
        self.max_attempts = config.attempts(session.get_config_variable("max_attempts"))
        loader = _loader(session.get_config_variable("data_path"))
        session.register_component("data_loader", loader)
        parsers = session.get_component("response_parser_factory")
        parsers.set_parser_defaults(timestamp_parser=_moment)
        # Parsing botocore's models takes 0.1 s, which the loop must not spend.
        await offload(_preload, loader)
        s3 = {"payload_signing_enabled": False}
        client = session.create_client(
            "s3",
            region_name=self._region or os.environ.get("AWS_REGION") or None,
            endpoint_url=config.endpoint_url,
            verify=str(config.ca_bundle) if config.ca_bundle else None,
            config=AioConfig(
                s3=s3 | ({"addressing_style": "path"} if config.force_path_style else {}),
                connect_timeout=config.connect_timeout_s,
                read_timeout=config.read_timeout_s,
                max_pool_connections=config.connections() + 8,  # the engine's slots are the limit
                retries={"total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                user_agent=_user_agent(session),
                user_agent_extra="lib/s3dcp",
                http_session_cls=_Session,
                **({"signature_version": UNSIGNED} if config.unsigned else {}),
            ),
        )
        return _Prepared(client, follows=not self._region)


class _Session(AIOHTTPSession):  # type: ignore[misc]  # it has no types
    """Requests that are sent once.

    aiohttp by itself sends a PUT again whose connection was lost. If the first was the commit, the
    second is refused with 412, as if another writer had come first.
    """

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False  # noqa: SLF001 - there is no argument for it
        return session


class _Prepared(contextlib.AbstractAsyncContextManager[Any]):
    """A client whose requests carry no `Expect` header, and may stay in their region."""

    def __init__(
        self, client: contextlib.AbstractAsyncContextManager[Any], *, follows: bool
    ) -> None:
        self._creator = client
        self._follows = follows

    async def __aenter__(self) -> Any:
        client = await self._creator.__aenter__()
        client.meta.events.register("before-sign.s3", _drop_expect)
        if not self._follows:
            client.meta.events.register("before-call.s3", _stay_in_region)
        return client

    async def __aexit__(self, *exc_info: Any) -> None:  # noqa: PYI036 - only passed on
        await self._creator.__aexit__(*exc_info)


@functools.cache
def _loader(data_path: str | None) -> Any:
    """Return what reads botocore's models: one for all clients, which each take 0.2 s less."""
    loader = create_loader(data_path)
    loader.file_loader = _ModelFiles()
    return loader


class _ModelFiles(JSONFileLoader):  # type: ignore[misc]  # it has no types
    """Reads botocore's models, and lets other threads run meanwhile.

    To decode a model is one call into C, and 22 ms for S3's, in which no thread runs that is not
    this one: some thread's loop would wait. Not so where each object is made by Python code.
    """

    def load_file(self, file_path: str) -> Any:
        """Return what a file without its extension holds, or None if there is no such file."""
        for path, opened in (
            (Path(f"{file_path}.json"), open),
            (Path(f"{file_path}.json.gz"), gzip.open),
        ):
            if path.is_file():
                with opened(path, "rb") as file:
                    return json.loads(file.read(), object_pairs_hook=_ordered)
        return None


def _ordered(pairs: list[tuple[str, Any]]) -> OrderedDict[str, Any]:
    return OrderedDict(pairs)


def _preload(loader: Any) -> None:
    for name in ("service-2", "endpoint-rule-set-1", "paginators-1"):
        loader.load_service_model("s3", name)
    for data in ("endpoints", "partitions", "sdk-default-configuration"):
        loader.load_data(data)


def _user_agent(session: Any) -> str | None:
    """Return a constant one: botocore puts its own together twice a request, a tenth of its time.

    None, which is botocore's own, where it is to carry the id of the user's application.
    """
    if session.get_config_variable("user_agent_appid"):
        return None
    agent: str = session.user_agent()
    session.user_agent_extra = ""  # is in it, and would be added again
    return agent


_ISO_8601 = re.compile(r"\d{4}-\d\d-\d\dT")


def _moment(text: object) -> datetime:
    """Parse a time in an answer. botocore's own errors would be taken for a setting's.

    What S3 sends takes a few microseconds. botocore's parser, which knows much more, takes 90, and
    a page of a list has a thousand.
    """
    try:
        if isinstance(text, str):
            with contextlib.suppress(ValueError):
                if _ISO_8601.match(text):
                    return datetime.fromisoformat(text)
                if text.endswith(" GMT"):
                    return parsedate_to_datetime(text)
        moment: datetime = parse_timestamp(text)
    except (RuntimeError, ValueError) as exc:
        raise ResponseParserError(str(exc)) from exc
    return moment


def _drop_expect(request: Any, **_: object) -> None:
    # A round trip for every part, and a wait without end where a store ignores it.
    if "Expect" in request.headers:
        del request.headers["Expect"]


def _stay_in_region(params: dict[str, Any], **_: object) -> None:
    # botocore's redirector skips what it takes for redirected already.
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


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
