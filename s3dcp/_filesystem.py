"""S3 as the file system that torch's DCP file-system reader and writer expect."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import PurePath

from torch.distributed.checkpoint.filesystem import FileSystemBase

from s3dcp._config import S3ClientConfig, check_callable
from s3dcp._constructors import S3ReaderConstructor, S3ReaderConstructorProtocol
from s3dcp._downloads import Downloads
from s3dcp._errors import InvalidS3UriError, S3ConfigError
from s3dcp._keys import S3Uri, join, parse_s3_uri, uri_text
from s3dcp._publish import exists
from s3dcp._s3client import S3Client, delete, list_all
from s3dcp._store import ObjectInfo
from s3dcp._streams import S3Writer
from s3dcp._tally import Tally
from s3dcp._transfers import DownloadStream, UploadSink
from s3dcp._uploads import copy

_DELETE_ATTEMPTS = 3


class S3FileSystem(FileSystemBase):
    """S3 objects as DCP's files. Paths are `s3://bucket/key`, as text or path objects.

    Args:
        region: The bucket's region; None as in `S3Client`.
        s3_client: An existing handle; by default one is made from the other arguments.
        s3client_config: Settings of the client.
        reader_constructor: Makes the readers of `create_stream(path, "rb")`.

    Raises:
        S3ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        region: str | None,
        s3_client: S3Client | None = None,
        s3client_config: S3ClientConfig | None = None,
        reader_constructor: S3ReaderConstructorProtocol | None = None,
    ) -> None:
        check_callable("reader_constructor", reader_constructor)
        self._path: str = ""
        self.client = s3_client or S3Client(region, s3client_config)
        #: Counts the requests of the readers that are opened, if it is set.
        self.tally: Tally | None = None
        self._reader_constructor = reader_constructor or S3ReaderConstructor.default()

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """Open an object for reading (`rb`) or writing (`wb`).

        What is written becomes visible as a whole when the block ends, and not at all when it ends
        by an exception.

        Raises:
            ValueError: another mode.
            InvalidS3UriError: not the URI of an object.
            S3Exception: as the store.
        """
        if mode not in {"rb", "wb"}:
            raise S3ConfigError(
                f"Invalid mode {mode!r}: create_stream only supports 'rb' (read) and 'wb' (write)"
            )
        uri = _object_uri(path)
        if mode == "rb":
            with self._open_reader(uri) as reader:
                yield reader
            return
        sink = UploadSink(*self.client.connect(), uri, self.client.s3client_config)
        try:
            with S3Writer(sink) as writer:
                yield writer
        finally:
            sink.settle()

    def _open_reader(self, uri: S3Uri) -> io.IOBase:
        portal, channel = self.client.connect(self.tally)
        downloads = Downloads(channel)  # one for all of a reader's requests: they are of one object
        known: list[ObjectInfo] = []

        def info() -> ObjectInfo:
            if not known:
                known.append(portal.call(downloads.head, uri))
            return known[0]

        def get_stream(start: int | None = None, end: int | None = None) -> DownloadStream:
            return DownloadStream(
                portal,
                downloads,
                uri,
                start,
                end,
                chunk_bytes=self.client.s3client_config.part_size,
                info=info,
            )

        return self._reader_constructor(
            bucket=uri.bucket, key=uri.key, get_object_info=info, get_stream=get_stream
        )

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """Return `path/suffix`."""
        return join(uri_text(path), suffix)

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """Check a checkpoint's URI and return it as text.

        Raises:
            InvalidS3UriError: it is none.
        """
        parse_s3_uri(path)
        self._path = uri_text(path)
        return self._path

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Copy an object to another key of its bucket, then delete the original.

        Raises:
            ValueError: the paths are in different buckets.
            S3Exception: as the store. The copy stays if only the deletion failed, which is tried
                3 times.
        """
        source, target = _object_uri(path), _object_uri(new_path)
        if source.bucket != target.bucket:
            raise S3ConfigError(
                f"rename works inside one bucket: {source} and {target} are in different ones"
            )
        if source == target:
            return
        self.client.call(copy, source, target)
        self.client.call(delete, source, max_attempts=_DELETE_ATTEMPTS)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: S3 has no folders."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Return whether there is an object at `path`.

        Raises:
            S3Exception: the store could not tell, or there is no such bucket.
        """
        return self.client.call(exists, _object_uri(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Delete an object; an absent one is no error.

        Raises:
            S3Exception: it could not be deleted. (The reference library only logs this.)
        """
        self.client.call(delete, _object_uri(path))

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """Return the URIs of what lies directly under `path`: objects, and common prefixes.

        Raises:
            S3Exception: as the store. A prefix that nothing starts with gives an empty list.
        """
        uri = parse_s3_uri(path)
        folder = uri.key if not uri.key or uri.key.endswith("/") else f"{uri.key}/"
        found = self.client.call(list_all, S3Uri(uri.bucket, folder), delimiter="/")
        return [
            f"s3://{uri.bucket}/{info.key.removesuffix('/')}"
            for info in found
            if info.key != folder
        ]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is the URI of a place in S3.

        A path object that is not one is accepted too, as torch's own file system does.
        """
        if isinstance(checkpoint_id, PurePath):
            return True
        try:
            parse_s3_uri(checkpoint_id)
        except InvalidS3UriError:
            return False
        return True


def _object_uri(path: str | os.PathLike[str]) -> S3Uri:
    uri = parse_s3_uri(path)
    if not uri.key:
        raise InvalidS3UriError(f"{uri} names a bucket, not an object: add a key")
    return uri
