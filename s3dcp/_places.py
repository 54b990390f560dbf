"""Where a checkpoint is copied from and to: a folder in a bucket, or one on a disk.

Both go by the names that commits use, and both are asked on the portal's loop, which they do not
block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from s3dcp._copies import PARTIAL_SUFFIX, changed
from s3dcp._disk import fill, lock, naming, own, partial_of, publish_file, sync_folder, version_of
from s3dcp._downloads import Downloads
from s3dcp._errors import DiskError, InvalidS3UriError, ObjectNotFoundError, S3ServiceError
from s3dcp._flow import Channel, wait_all
from s3dcp._formats import CLAIM_NAME, Format
from s3dcp._inventory import commits_by_folder, place_of
from s3dcp._keys import S3Uri, child_key
from s3dcp._portal import offload
from s3dcp._publish import publish, read
from s3dcp._s3client import delete, list_all
from s3dcp._store import Condition, ObjectInfo
from s3dcp._survey import commits_in
from s3dcp._uploads import Upload


class Place(Protocol):
    """A checkpoint's folder."""

    @property
    def where(self) -> S3Uri | Path:
        """Where it is."""

    def check(self, name: str) -> None:
        """Refuse a name under which nothing in the folder can be written. On a worker thread.

        Raises:
            InvalidS3UriError: it leads outside of the folder, or no file can be called so.
            DiskError: something else is in its way.
        """

    async def commits(self, format_: Format) -> tuple[ObjectInfo, ...]:
        """Return the commits of a format that lie directly in the folder."""

    async def companions(self, format_: Format) -> list[str]:
        """Return the names of the files that lie in the folder and go with its checkpoint."""

    async def files(self, names: Iterable[str]) -> dict[str, ObjectInfo]:
        """Return those of these names that are there; an ETag stands for a version of the bytes."""

    async def read(self, name: str) -> bytes | None:
        """Return the bytes of a small file, or None where there is none."""

    async def fetch(self, info: ObjectInfo, start: int, into: memoryview) -> None:
        """Fill memory with a file's bytes, from an offset on.

        Raises:
            CheckpointChangedError: it is another version of it, or gone.
        """

    async def crc(self, info: ObjectInfo) -> int | None:
        """Return a file's CRC64NVME, if it is known without reading all of it."""

    async def remove(self, names: Iterable[str]) -> None:
        """Remove files, whole or not; those that are absent are no error."""

    async def parts(self, names: Iterable[str]) -> list[str]:
        """Return those of these names of which there is a file that is not whole."""

    async def discard(self, names: Iterable[str]) -> None:
        """Remove what is not whole, and may be taken for a part of these files."""

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which no other process copies to this place, as far as it can tell.

        Raises:
            CommitConflictError: one does.
        """

    async def claim(self, body: bytes) -> None:
        """Say of what this is going to be a copy."""

    async def commit(self, name: str, body: bytes, *, overwrite: bool) -> None:
        """Publish a commit. All that was written before is there from then on, after a crash too.

        Raises:
            CheckpointExistsError: there is another, and `overwrite` is false.
        """


class Bucket:
    """A folder in a bucket.

    Args:
        channel: The client's.
        folder: Its key ends with a slash.
    """

    def __init__(self, channel: Channel, folder: S3Uri) -> None:
        self.channel = channel
        self.folder = folder

    def __str__(self) -> str:
        return str(self.where)

    @property
    def where(self) -> S3Uri:
        return place_of(self.folder)

    def uri(self, name: str) -> S3Uri:
        """Return where a file is."""
        return S3Uri(self.folder.bucket, child_key(self.folder.key, name, source=str(self)))

    def check(self, name: str) -> None:
        self.uri(name)

    async def commits(self, format_: Format) -> tuple[ObjectInfo, ...]:
        return tuple(map(self._named, await commits_in(self.channel, self.folder, format_)))

    async def companions(self, format_: Format) -> list[str]:
        if format_.companion is None:
            return []
        listing = await list_all(self.channel, self.folder, delimiter="/")
        return [self._named(info).key for info in listing if format_.is_companion(info.key)]

    async def files(self, names: Iterable[str]) -> dict[str, ObjectInfo]:
        wanted = {self.uri(name).key: name for name in names}
        listing = await list_all(self.channel, self.folder)
        return {wanted[info.key]: self._named(info) for info in listing if info.key in wanted}

    async def read(self, name: str) -> bytes | None:
        found = await read(self.channel, self.uri(name))
        return None if found is None else bytes(found.body)

    async def fetch(self, info: ObjectInfo, start: int, into: memoryview) -> None:
        uri = self.uri(info.key)
        downloads = Downloads(self.channel)
        downloads.pin(uri, info.etag)
        try:
            await downloads.fetch(uri, start, [into])
        except ObjectNotFoundError as exc:
            raise changed(uri) from exc

    async def crc(self, info: ObjectInfo) -> int | None:
        found = await self.head(info.key)
        return found.crc if found.etag == info.etag else None

    async def head(self, name: str) -> ObjectInfo:
        """Return what the store says of an object now, its CRC64NVME too.

        Raises:
            CheckpointChangedError: it is gone.
        """
        uri = self.uri(name)
        head = partial(self.channel.store.head, uri, with_crc=True)
        try:
            return await self.channel.request("HeadObject", uri, head)
        except ObjectNotFoundError as exc:
            raise changed(uri) from exc

    async def remove(self, names: Iterable[str]) -> None:
        await wait_all([partial(delete, self.channel, self.uri(name)) for name in names])

    async def parts(self, names: Iterable[str]) -> list[str]:  # noqa: ARG002
        return []  # those of uploads are no objects,

    async def discard(self, names: Iterable[str]) -> None:
        pass  # and are compared before they are used

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def claim(self, body: bytes) -> None:
        uri, view = self.uri(CLAIM_NAME), memoryview(body)
        await Upload(self.channel, uri).put([view])
        store = self.channel.store
        if store.conditional_writes is None:
            # Once more, if there is none: a store that honours conditions refuses it, and so is
            # known to before the commit. Any other writes the same bytes again.
            again = partial(store.put, uri, [view], condition=Condition(absent=True))
            with suppress(S3ServiceError):
                await self.channel.request("PutObject", uri, again)

    async def commit(self, name: str, body: bytes, *, overwrite: bool) -> None:
        await publish(self.channel, self.uri(name), body, overwrite=overwrite)

    def _named(self, info: ObjectInfo) -> ObjectInfo:
        name = info.key.removeprefix(self.folder.key)
        return ObjectInfo(key=name, size_bytes=info.size_bytes, etag=info.etag)


class Folder:
    """A folder on a disk.

    Files are written under a name with `.partial` at its end, and renamed when they are whole and
    on the disk.

    Args:
        path: It need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced: set[Path] = set()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def where(self) -> Path:
        return self.path

    def file(self, name: str) -> Path:
        """Return where a file is.

        Raises:
            InvalidS3UriError: no file in the folder can have this name.
        """
        parts = name.split("/")
        foreign = set("\0") if os.sep == "/" else set("\0\\:")
        if (
            not {"", ".", ".."}.isdisjoint(parts)
            or not foreign.isdisjoint(name)
            or name.endswith(PARTIAL_SUFFIX)
        ):
            raise InvalidS3UriError(
                f"The checkpoint names {name!r}, which no file below {self.path} can be called"
            )
        return self.path.joinpath(*parts)

    def check(self, name: str) -> None:
        path = self.file(name)
        for folder in path.parents[: name.count("/")]:
            if folder.is_symlink():
                raise DiskError(
                    f"{folder} is a link, and a copy neither writes nor removes what lies outside "
                    "of its folder: copy to another folder, or remove the link"
                )
            if folder.exists() and not folder.is_dir():
                raise DiskError(f"{folder} is no folder: copy to another folder, or remove it")
        if path.is_dir():
            raise DiskError(
                f"{path} is a folder, and the checkpoint has a file of this name: copy to "
                "another folder, or remove it"
            )

    async def commits(self, format_: Format) -> tuple[ObjectInfo, ...]:
        names = await offload(self._names, format_.is_commit)
        found = await self.files(names)
        return commits_by_folder(found.values(), format_).get("", ())

    async def companions(self, format_: Format) -> list[str]:
        return await offload(self._names, format_.is_companion)

    def _names(self, chosen: Callable[[str], bool]) -> list[str]:
        """Return the names of files that lie directly in the folder."""
        if not self.path.is_dir():
            return []
        return [path.name for path in self.path.iterdir() if chosen(path.name) and path.is_file()]

    async def files(self, names: Iterable[str]) -> dict[str, ObjectInfo]:
        return await offload(self._files, list(names))

    def _files(self, names: Iterable[str]) -> dict[str, ObjectInfo]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = _info(name, self.file(name).stat())
        return found

    async def read(self, name: str) -> bytes | None:
        return await offload(self._read, self.file(name))

    @staticmethod
    def _read(path: Path) -> bytes | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return path.read_bytes()
        return None

    async def fetch(self, info: ObjectInfo, start: int, into: memoryview) -> None:
        await offload(self.fill, info, start, into)

    def fill(self, info: ObjectInfo, start: int, into: memoryview) -> None:
        """Do as `fetch`, on a worker thread."""
        path = self.file(info.key)
        try:
            with path.open("rb", buffering=0) as file:
                fill(file, start, into)
                version = version_of(os.fstat(file.fileno()))
        except (FileNotFoundError, EOFError) as exc:
            raise changed(path) from exc
        if version != info.etag:
            raise changed(path)

    async def crc(self, info: ObjectInfo) -> int | None:  # noqa: ARG002
        return None

    async def remove(self, names: Iterable[str]) -> None:
        paths = [self.file(name) for name in names]
        await offload(self._remove, [*paths, *map(partial_of, paths)])

    async def parts(self, names: Iterable[str]) -> list[str]:
        return await offload(self._parts, list(names))

    def _parts(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if partial_of(self.file(name)).exists()]

    async def discard(self, names: Iterable[str]) -> None:
        await offload(self._remove, [partial_of(self.file(name)) for name in names])

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                self._changed(path)
        self._sync_folders()

    @contextmanager
    def alone(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / CLAIM_NAME
        with open(path, "ab", opener=own) as claim:
            lock(claim, self.path)
            try:
                yield
            finally:
                with suppress(FileNotFoundError):
                    if not path.stat().st_size:  # it came to nothing
                        path.unlink()

    async def claim(self, body: bytes) -> None:
        # In place, as it is locked; one that is cut short claims nothing.
        await offload(self._claim, body)

    def _claim(self, body: bytes) -> None:
        path = self.path / CLAIM_NAME
        with naming(path), open(path, "wb", opener=own) as claim:
            claim.write(body)

    async def commit(self, name: str, body: bytes, *, overwrite: bool) -> None:  # noqa: ARG002
        await offload(self._commit, name, body)

    def _commit(self, name: str, body: bytes) -> None:
        self._sync_folders()  # so that the names of all files are on the disk before this one's
        path = partial_of(self.file(name))
        with naming(path), open(path, "wb", opener=own) as file:
            file.write(body)
            publish_file(file, self.file(name))
        self._changed(self.file(name))
        self._sync_folders()

    def publish(self, file: BinaryIO, name: str) -> None:
        """Give a file that is whole its name, once it is on the disk."""
        path = self.file(name)
        with naming(path):
            publish_file(file, path)
        self._changed(path)

    def _changed(self, path: Path) -> None:
        """Take note of a file that was renamed or removed: its folders' entries are to be kept."""
        self._unsynced.update(path.parents[: len(path.relative_to(self.path.parent).parts)])

    def _sync_folders(self) -> None:
        while self._unsynced:
            sync_folder(self._unsynced.pop())


def _info(name: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key=name, size_bytes=status.st_size, etag=version_of(status))
