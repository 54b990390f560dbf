"""`S3Client`: a handle to one region and configuration, for asyncio code and for the facades.

A handle holds no sockets. Its I/O runs on the process's portal, over a connection pool that all
handles with the same region, settings and AWS environment share; so a handle pickles, survives a
fork, and may be used from any number of event loops.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from s3dcp._collector import CollectorPause, spare_young
from s3dcp._config import S3ClientConfig
from s3dcp._downloads import Downloads
from s3dcp._errors import InvalidS3UriError, ObjectNotFoundError, S3ConfigError
from s3dcp._flow import Channel, Pacer, RetryPolicy, Slots
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._portal import Portal, offload, portal
from s3dcp._ranges import cut, upload_part_bytes
from s3dcp._store import ObjectInfo, UploadInfo
from s3dcp._tally import Tally
from s3dcp._uploads import Upload, copy

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

P = ParamSpec("P")
T = TypeVar("T")


class S3Client:
    """Asynchronous access to S3 objects, with the engine of the checkpoint reader and writer.

    Every method may be awaited from any event loop; cancelling one ends its requests.

        async with S3Client("eu-west-1") as client:
            await client.put_object("bucket", "key", b"bytes")
            data = await client.get_object("bucket", "key")

    Args:
        region: The bucket's region, which is kept to. None: `AWS_REGION`, `AWS_DEFAULT_REGION` or
            the profile's; and where there is none, or the bucket is elsewhere, the bucket's own.
        s3client_config: Settings; the defaults otherwise.

    Raises:
        S3ConfigError: the settings are something else.
    """

    def __init__(
        self, region: str | None = None, s3client_config: S3ClientConfig | None = None
    ) -> None:
        if not isinstance(s3client_config, S3ClientConfig | None):
            raise S3ConfigError(
                "s3client_config must be an S3ClientConfig of s3dcp, got one of "
                f"{type(s3client_config).__module__}: {type(s3client_config).__name__}"
            )
        self._region = region or None
        self._config = s3client_config or S3ClientConfig()
        self._open: tuple[Portal, Hashable, Channel] | None = None

    @property
    def region(self) -> str | None:
        """The region that was given, or that `AWS_REGION` names."""
        return self._region or os.environ.get("AWS_REGION") or None

    @property
    def s3client_config(self) -> S3ClientConfig:
        """The settings."""
        return self._config

    def __repr__(self) -> str:
        return f"{type(self).__name__}(region={self.region!r})"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": None}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the pool open: it belongs to the process, and closes with it."""

    async def get_object(
        self, bucket: str, key: str, start: int = 0, end: int | None = None
    ) -> bytearray:
        """Return an object's bytes [start, end), read in parallel ranges.

        Raises:
            S3Exception: as the store.
        """
        uri = _object_uri(bucket, key)

        async def get(channel: Channel) -> bytearray:
            downloads = Downloads(channel)
            stop = end
            if stop is None:
                stop = (await downloads.head(uri)).size_bytes
            data = bytearray(max(stop - start, 0))
            await downloads.fetch_parallel(uri, start, memoryview(data), self._config.part_size)
            return data

        return await self._run(get)

    async def put_object(self, bucket: str, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write an object, in parallel parts where it is large. Atomic: whole, or not at all.

        Raises:
            S3Exception: as the store; nothing was written.
        """
        uri = _object_uri(bucket, key)
        view = memoryview(data).cast("B")

        async def put(channel: Channel) -> None:
            size = upload_part_bytes(view.nbytes, self._config.part_size, channel.slots.count)
            upload = Upload(channel, uri)
            if view.nbytes <= size:
                await upload.put([view])
            else:
                await upload.send_all([view[a:b] for a, b in cut(0, view.nbytes, size)])

        await self._run(put)

    async def head_object(self, bucket: str, key: str) -> ObjectInfo:
        """Return an object's size, ETag and time of change.

        Raises:
            ObjectNotFoundError: there is none, or no such bucket, which a HEAD cannot tell apart.
        """
        uri = _object_uri(bucket, key)
        return await self._run(partial(head, uri=uri))

    async def list_objects(
        self, bucket: str, prefix: str = "", delimiter: str = ""
    ) -> AsyncIterator[ObjectInfo]:
        """Iterate over the objects (and, with a delimiter, prefixes) that start with `prefix`."""
        uri = _uri(bucket, prefix)

        for info in await self._run(partial(list_all, uri=uri, delimiter=delimiter)):
            yield info

    async def delete_object(self, bucket: str, key: str) -> None:
        """Delete an object; an absent one is no error."""
        uri = _object_uri(bucket, key)
        await self._run(partial(delete, uri=uri))

    async def copy_object(
        self, src_bucket: str, src_key: str, dst_bucket: str, dst_key: str
    ) -> None:
        """Copy an object of any size inside the store."""
        source, target = _object_uri(src_bucket, src_key), _object_uri(dst_bucket, dst_key)
        await self._run(partial(copy, source=source, target=target))

    async def _run(self, function: Callable[[Channel], Awaitable[T]]) -> T:
        here = portal()

        async def on_portal() -> T:
            return await function(await _channel(here, self._region, self._config))

        return await here.run(on_portal)

    # What follows is for the synchronous facades, which submit to the portal themselves.

    def connect(self, tally: Tally | None = None) -> tuple[Portal, Channel]:
        """Return the portal and this handle's pool on it; `tally` counts the pool's requests."""
        environment = _aws_environment()
        here = portal()
        if self._open is None or self._open[0] is not here or self._open[1] != environment:
            channel = here.call(_channel, here, self._region, self._config)
            self._open = here, environment, channel
        channel = self._open[2]
        return here, channel.counting(tally) if tally is not None else channel

    def call(
        self,
        function: Callable[Concatenate[Channel, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an engine function that takes a `Channel` first, and wait for it."""
        return self.call_counted(None, function, *args, **kwargs)

    def call_counted(
        self,
        tally: Tally | None,
        function: Callable[Concatenate[Channel, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Do as `call` does, with `tally` for the pool's own."""
        here, channel = self.connect(tally)
        return here.call(function, channel, *args, **kwargs)


async def head(channel: Channel, uri: S3Uri) -> ObjectInfo:
    """Return what the store says of an object."""
    return await channel.request("HeadObject", uri, partial(channel.store.head, uri))


async def delete(channel: Channel, uri: S3Uri, *, max_attempts: int | None = None) -> None:
    """Delete an object; an absent one is no error."""
    send = partial(channel.store.delete, uri)
    await channel.request("DeleteObject", uri, send, max_attempts=max_attempts)


async def list_all(channel: Channel, uri: S3Uri, *, delimiter: str = "") -> list[ObjectInfo]:
    """List what starts with the URI's key."""

    async def collect() -> list[ObjectInfo]:
        return [info async for info in channel.store.list(uri, delimiter=delimiter)]

    return await channel.request("ListObjectsV2", uri, collect)


async def list_uploads(channel: Channel, uri: S3Uri) -> list[UploadInfo]:
    """List the unfinished uploads to keys that start with the URI's key."""

    async def collect() -> list[UploadInfo]:
        return [info async for info in channel.store.list_uploads(uri)]

    try:
        return await channel.request("ListMultipartUploads", uri, collect)
    except ObjectNotFoundError:  # as rclone puts it that there are none
        return []


def _object_uri(bucket: str, key: str) -> S3Uri:
    uri = _uri(bucket, key)
    if not uri.key:
        raise InvalidS3UriError(f"An object needs a key: s3://{bucket}/")
    return uri


def _uri(bucket: str, key: str) -> S3Uri:
    uri = parse_s3_uri(f"s3://{bucket}/{key}")
    if uri.bucket != bucket:
        raise InvalidS3UriError(f"Not the name of a bucket: {bucket!r}")
    return uri


class _Pools:
    """What the clients of one portal share: a channel for all settings, a pacer for an endpoint."""

    def __init__(self) -> None:
        self.opening = asyncio.Lock()
        self.channels: dict[Hashable, Channel] = {}
        self.pacers: dict[Hashable, Pacer] = {}


# By portal, which takes its pools along when it is gone.
_pools: weakref.WeakKeyDictionary[Portal, _Pools] = weakref.WeakKeyDictionary()


async def _channel(here: Portal, region: str | None, config: S3ClientConfig) -> Channel:
    """Return the pool for these settings, on `here`, the portal that runs this."""
    pools = _pools.setdefault(here, _Pools())
    key = (region, config, _aws_environment())
    async with pools.opening:
        if key not in pools.channels:
            # botocore takes most of a second to import, which the loop must not spend. What is
            # imported makes the collector walk all objects, which no other loop may wait for.
            with CollectorPause():
                module = await offload(import_module, "s3dcp._spread")
                store = module.SpreadStore(region, config)
                await store.open()
                spare_young()
            here.at_close(store.close)
            pools.channels[key] = Channel(
                store=store,
                slots=Slots(config.connections()),
                retry=RetryPolicy(
                    max_attempts=store.max_attempts, timeout_s=config.retry_timeout_s
                ),
                checksum=config.checksum,
                pacer=pools.pacers.setdefault(_endpoint(config), Pacer()),
            )
    return pools.channels[key]


def _endpoint(config: S3ClientConfig) -> Hashable:
    """Return what tells endpoints apart: the URL, or the profile, which may set one.

    Not the region, since a bucket is in one. Two that are the same under different names learn
    by themselves what throttles them, so none of this has to be exact.
    """
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    urls = [config.endpoint_url, *(os.environ.get(name) for name in variables)]
    profile = config.profile or os.environ.get("AWS_PROFILE")
    return next((url.rstrip("/") for url in urls if url), ("profile", profile))


def _aws_environment() -> Hashable:
    """Return what of the environment decides where and as whom requests are sent, as a digest.

    A digest, since secrets are among it.
    """
    names = [name for name in os.environ if name.upper().startswith("AWS_")]
    names += [name for name in os.environ if name.upper().endswith("_PROXY")]
    return hash(tuple((name, os.environ[name]) for name in sorted(set(names))))
