"""One object going up: in one request, or as the parts of a multipart upload; and copies.

Nothing is visible under the key before the last request, and an upload that fails or is cancelled
is aborted, so that no parts are left to pay for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from s3dcp._checksums import INLINE_CHECKSUM_BYTES, ITEM_CHECKSUM, combine, crc_of, crcs_of
from s3dcp._config import ChecksumName
from s3dcp._errors import IncompleteSaveError, ObjectNotFoundError, S3Exception
from s3dcp._flow import Channel, wait_all
from s3dcp._keys import S3Uri
from s3dcp._portal import offload
from s3dcp._ranges import MAX_PART_BYTES, GiB, even_ranges
from s3dcp._store import Checksum, Moved, Part, Receipt, Store, Views

_log = logging.getLogger("s3dcp.uploads")

# Seconds that an upload which is dropped waits for its id. What takes longer goes on by itself, and
# is aborted when it is there.
_ID_GRACE_S = 1.0

# A copy in one request may be 5 GiB; parts of one are made on the store's side, so large ones.
_COPY_PART_BYTES = GiB

#: Tries of a request that only tidies up after a failure, whose cause may still be there.
CLEANUP_ATTEMPTS = 3


class Upload:
    """One object on its way up. Used on the portal's loop.

    Args:
        channel: The client's.
        uri: Where the object goes.
        after: What has to end well before the first byte is sent; what it raises, `put` and `send`
            raise.
    """

    def __init__(
        self, channel: Channel, uri: S3Uri, after: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        self.uri = uri
        self._channel = channel
        self._after = after
        self._checksum = channel.checksum
        self._upload_id: asyncio.Future[str] | None = None
        self._parts: dict[int, Part] = {}
        self._sending: set[asyncio.Task[object]] = set()
        self._asked = False  # for the upload's id, and not answered yet
        self._closed = False
        #: Whether there may be an object under the key.
        self.touched = False
        #: Whether the store compared all that it holds with the checksums that came along.
        self.vouched = False

    @property
    def has_parts(self) -> bool:
        """Whether there is something for another to go on with."""
        return bool(self._parts)

    def go_on(self, upload_id: str, parts: Iterable[Part], checksum: ChecksumName | None) -> None:
        """Go on with an upload that was left unfinished, instead of creating one.

        Args:
            upload_id: Its id.
            parts: Those that it holds, and that are known to be right.
            checksum: What it was created for, which is what its other parts must have.
        """
        self._upload_id = asyncio.get_running_loop().create_future()
        self._upload_id.set_result(upload_id)
        self._parts = {part.number: part for part in parts}
        self._checksum = checksum

    async def put(self, body: Views, moved: Moved | None = None) -> list[int]:
        """Write the whole object in one request; return the item CRC of each view."""
        crcs, checksum = await self._checksums(body)
        await self._cleared()

        self.touched = True
        put = partial(self._channel.store.put, self.uri, body, checksum=checksum, moved=moved)
        size = sum(view.nbytes for view in body)
        receipt = await self._channel.request("PutObject", self.uri, put, size_bytes=size)
        heed(receipt, self._channel.store, self.uri, checksum)
        self.vouched = checksum is not None and receipt.checksum_echoed
        self._closed = True
        return crcs

    async def begin(self) -> None:
        """Ask for the upload's id, if that has not been done: parts need it."""
        await asyncio.shield(self._started())

    async def send(self, number: int, body: Views, moved: Moved | None = None) -> list[int]:
        """Send part `number` (from 1 on); return the item CRC of each view.

        Parts may be sent in any order, many at once. `body` is held until this returns or raises.
        """
        with self._adding():
            return await self._send(number, body, moved)

    async def copy(
        self, number: int, source: S3Uri, start: int, end: int, *, if_match: str | None
    ) -> None:
        """Make bytes [start, end) of another object part `number`, without a checksum."""
        with self._adding():
            upload_id = await asyncio.shield(self._started())
            copy = partial(
                self._channel.store.copy_part,
                *(source, start, end),
                *(self.uri, upload_id, number),
                if_match=if_match,
            )
            self._parts[number] = await self._channel.request("UploadPartCopy", self.uri, copy)

    @contextlib.contextmanager
    def _adding(self) -> Iterator[None]:
        """A part is on its way, until this task is cancelled by `abort`."""
        if self._closed:
            raise IncompleteSaveError(f"The upload of {self.uri} has ended")
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._sending.add(task)
        try:
            yield
        finally:
            self._sending.discard(task)

    async def _send(self, number: int, body: Views, moved: Moved | None) -> list[int]:
        started = self._started()  # while the checksums are computed
        crcs, checksum = await self._checksums(body)
        upload_id = await asyncio.shield(started)
        await self._cleared()

        send = partial(
            self._channel.store.upload_part,
            self.uri,
            upload_id,
            number,
            body,
            checksum=checksum,
            moved=moved,
        )
        size = sum(view.nbytes for view in body)
        receipt = await self._channel.request("UploadPart", self.uri, send, size_bytes=size)
        heed(receipt, self._channel.store, self.uri, checksum)
        # A checksum that the store did not echo is not named again on completion.
        named = checksum if receipt.checksum_echoed else None
        self._parts[number] = Part(
            number=number, size_bytes=size, etag=receipt.etag, checksum=named
        )
        return crcs

    async def _cleared(self) -> None:
        if self._after is not None:
            await self._after()

    async def send_all(self, parts: Sequence[memoryview]) -> None:
        """Send all parts at once and publish the object; abort the upload if any fails."""
        await self._all([partial(self.send, n, [part]) for n, part in enumerate(parts, 1)])

    async def copy_all(self, source: S3Uri, size_bytes: int, *, if_match: str | None) -> None:
        """Copy another object in parts, as `send_all` sends them."""
        ranges = even_ranges(0, size_bytes, _COPY_PART_BYTES)
        await self._all(
            [
                partial(self.copy, number, source, start, end, if_match=if_match)
                for number, (start, end) in enumerate(ranges, 1)
            ]
        )

    async def _all(self, parts: Sequence[Callable[[], Awaitable[object]]]) -> None:
        try:
            await wait_all(parts)
            await self.complete(len(parts))
        except BaseException:
            await self.abort()
            raise

    async def complete(self, count: int) -> None:
        """Publish the object, made of parts 1 to `count`.

        Raises:
            IncompleteSaveError: a part is missing.
        """
        if sorted(self._parts) != list(range(1, count + 1)):
            raise IncompleteSaveError(f"{self.uri} has {len(self._parts)} of {count} parts")
        upload_id = await asyncio.shield(self._started())
        parts = [self._parts[number] for number in range(1, count + 1)]
        checksum = _whole(parts, self._checksum)

        self.touched = True
        lost = False  # whether an attempt's answer was

        async def complete() -> None:
            nonlocal lost
            try:
                await self._channel.store.complete_upload(
                    self.uri, upload_id, parts, checksum=checksum
                )
            except S3Exception as exc:
                lost = lost or exc.retryable
                raise

        try:
            await self._channel.request("CompleteMultipartUpload", self.uri, complete)
        except ObjectNotFoundError:
            # The upload is gone. If an answer was lost, it was that of the attempt that made it so.
            head = partial(self._channel.store.head, self.uri)
            size = sum(part.size_bytes for part in parts)
            if not lost:
                raise
            if (await self._channel.request("HeadObject", self.uri, head)).size_bytes != size:
                raise
        self.vouched = checksum is not None
        self._closed = True

    async def abort(self) -> None:
        """Stop what is being sent and drop the upload. Idempotent; never raises S3's errors."""
        self._closed = True
        sending = [task for task in self._sending if task is not asyncio.current_task()]
        for task in sending:
            task.cancel()
        if sending:
            await asyncio.wait(sending)
        if (started := self._upload_id) is None:
            return
        self._upload_id = None
        if not self._asked:
            started.cancel()  # it waits for its turn, or to be tried again; or is done
        dropping = asyncio.create_task(self._drop(started))
        _dropping.add(dropping)
        dropping.add_done_callback(_dropping.discard)
        await asyncio.wait({started}, timeout=_ID_GRACE_S)
        if started.done():
            await asyncio.shield(dropping)

    async def _drop(self, started: asyncio.Future[str]) -> None:
        try:
            upload_id = await started
        except (S3Exception, asyncio.CancelledError):
            return

        abort = partial(self._channel.store.abort_upload, self.uri, upload_id)
        try:
            await self._channel.request(
                "AbortMultipartUpload", self.uri, abort, max_attempts=CLEANUP_ATTEMPTS
            )
        except ObjectNotFoundError:
            pass
        except S3Exception as exc:
            _log.warning(
                "could not abort upload %s of %s, its parts stay until they are removed: %s",
                upload_id,
                self.uri,
                exc,
            )

    def _started(self) -> asyncio.Future[str]:
        """Return the task of creating the upload, which no single part cancels for the others."""
        if self._upload_id is None:
            self._upload_id = asyncio.create_task(self._create())
        return self._upload_id

    async def _create(self) -> str:
        async def create() -> str:
            self._asked = True
            try:
                return await self._channel.store.create_upload(self.uri, checksum=self._checksum)
            except S3Exception as exc:
                exc.retryable = exc.retryable and not self._closed
                raise
            finally:
                self._asked = False

        return await self._channel.request("CreateMultipartUpload", self.uri, create)

    async def _checksums(self, body: Views) -> tuple[list[int], Checksum | None]:
        if sum(view.nbytes for view in body) < INLINE_CHECKSUM_BYTES:
            return checksums_of(body, self._checksum)
        return await offload(checksums_of, body, self._checksum)


async def copy(
    channel: Channel, source: S3Uri, target: S3Uri, *, if_match: str | None = None
) -> None:
    """Copy an object of any size inside the store: whole, or not at all.

    Args:
        channel: The client's.
        source: What is copied.
        target: Where to.
        if_match: The ETag of the version that is meant; None for the present one.

    Raises:
        S3Exception: as the store; nothing was written.
    """
    head = partial(channel.store.head, source)
    info = await channel.request("HeadObject", source, head)
    etag = if_match or info.etag
    if info.size_bytes > MAX_PART_BYTES:
        upload = Upload(replace(channel, checksum=None), target)
        await upload.copy_all(source, info.size_bytes, if_match=etag)
    else:
        copy_whole = partial(channel.store.copy, source, target, if_match=etag)
        await channel.request("CopyObject", target, copy_whole)


def checksums_of(body: Views, algorithm: ChecksumName | None) -> tuple[list[int], Checksum | None]:
    """Return each view's item CRC, and the checksum of the whole body that the store is sent.

    One pass over the memory serves both, where both are the same CRC.
    """
    crcs = crcs_of(body)
    if algorithm is None:
        return crcs, None
    if algorithm == ITEM_CHECKSUM:
        sizes = (view.nbytes for view in body)
        return crcs, Checksum(algorithm, combine(zip(crcs, sizes, strict=True)))
    return crcs, Checksum(algorithm, crc_of(body, algorithm))


# The loop itself does not hold on to its tasks.
_dropping: set[asyncio.Task[None]] = set()
_warned: weakref.WeakSet[Store] = weakref.WeakSet()


def heed(receipt: Receipt, store: Store, uri: S3Uri, checksum: Checksum | None) -> None:
    """Warn, once a store, if it took a body and said nothing of the checksum that came along."""
    if checksum is None or receipt.checksum_echoed or store in _warned:
        return
    _warned.add(store)
    _log.warning(
        "the store behind bucket %r does not verify %s checksums: what is damaged on its way there "
        "is found on load, by the CRCs in .metadata; S3ClientConfig(checksum=None) sends none",
        uri.bucket,
        checksum.algorithm,
    )


def _whole(parts: Sequence[Part], algorithm: ChecksumName | None) -> Checksum | None:
    pieces = [(part.checksum.value, part.size_bytes) for part in parts if part.checksum]
    if algorithm is None or len(pieces) != len(parts):
        return None
    return Checksum(algorithm, combine(pieces, algorithm))
