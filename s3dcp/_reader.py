"""`S3StorageReader`: where `dcp.load` reads from."""

from __future__ import annotations

import dataclasses
import io
import os
from contextlib import suppress
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from s3dcp._checksums import crc_of, damaged
from s3dcp._commit import Found, metadata_name
from s3dcp._config import S3ClientConfig
from s3dcp._constructors import (
    DCPOptimizedConstructor,
    DCPS3ReaderConstructorProtocol,
    S3ReaderConstructor,
    S3ReaderConstructorProtocol,
)
from s3dcp._errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    IntegrityError,
    ObjectNotFoundError,
    S3Exception,
)
from s3dcp._filesystem import S3FileSystem
from s3dcp._formats import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME
from s3dcp._giving_way import free_later
from s3dcp._keys import S3Uri, child_key, join, parse_s3_uri
from s3dcp._loading import LoadedItems
from s3dcp._metadata import crcs_of, load_metadata
from s3dcp._progress import ProgressCallback
from s3dcp._publish import exists, read
from s3dcp._recording import Audience, Recording, ReportCallback
from s3dcp._report import Report
from s3dcp._tally import Totals
from s3dcp._torch_internals import _StorageInfo


@dataclasses.dataclass(frozen=True)
class LoadIdentity:
    """Which `.metadata` a rank planned with, so that ranks can tell whether it was the same."""

    path: str
    etag: str | None
    save_id: str | None


class S3StorageReader(FileSystemReader):
    """Reads checkpoints from S3.

    By default all ranges that a rank needs are fetched together, straight into its tensors.

    Args:
        region: The bucket's region; None as in `S3Client`.
        path: The checkpoint's place, `s3://bucket/prefix`.
        s3client_config: Settings of the client.
        reader_constructor: `S3ReaderConstructor.dcp_optimized()` (the default), or a constructor of
            readers for other access patterns, which are used file by file.
        trusted_metadata: Unpickle `.metadata` with plain pickle, which runs what it says: for a
            planner that puts types of its own there, where nobody else can write to the bucket.
        progress: True for a bar, on rank 0; or a callback, on every rank.
        on_report: Is given every load's report, on every rank, when the rank's part has ended, well
            or not. Called on the thread that loads; what it raises is logged.

    Raises:
        S3ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        region: str | None,
        path: str | os.PathLike[str],
        s3client_config: S3ClientConfig | None = None,
        reader_constructor: (
            S3ReaderConstructorProtocol | DCPS3ReaderConstructorProtocol | None
        ) = None,
        *,
        trusted_metadata: bool = False,
        progress: bool | ProgressCallback = False,
        on_report: ReportCallback | None = None,
    ) -> None:
        self._reader_constructor = reader_constructor or S3ReaderConstructor.dcp_optimized()
        fs = S3FileSystem(
            region, s3client_config=s3client_config, reader_constructor=self._reader_constructor
        )
        path = fs.init_path(path)
        super().__init__(path)
        self.fs: S3FileSystem = fs  # type: ignore[assignment]  # in place of torch's own
        self.path = path
        self.sync_files = False
        self._trusted_metadata = trusted_metadata
        self._found: Found | None = None
        self._metadata: Metadata | None = None
        self._global_failure: Exception | None = None
        self._slicing_bytes = 0
        self._audience = Audience(progress, on_report)
        self.recording = self._new_recording()

    @property
    def report(self) -> Report:
        """What this rank did in the last load, or has done so far."""
        return self.recording.report()

    @property
    def totals(self) -> Totals:
        """This rank's requests in the last load: how many, how long, and what went wrong."""
        return self.recording.tally.totals()

    def __getstate__(self) -> dict[str, Any]:
        # What a load found out is neither small nor another process's business.
        return self.__dict__ | {
            "storage_data": {},
            "_found": None,
            "_metadata": None,
            "_global_failure": None,
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the last load, and go to another checkpoint if one is given."""
        super().reset(checkpoint_id)
        self._found = self._metadata = self._global_failure = None

    def read_metadata(self, *_args: Any, **kwargs: Any) -> Metadata:
        """Read the checkpoint's metadata.

        Raises:
            CheckpointNotFoundError: no checkpoint was committed there.
            CorruptMetadataError: it is truncated, foreign or hostile.
            S3Exception: as the store.
        """
        rank = kwargs.get("rank")
        if rank is None:
            self.recording = self._new_recording()  # a load begins
        try:
            metadata = self._read_metadata(rank)
        except Exception as exc:
            self.recording.lap("metadata")
            if rank is None:
                self._global_failure = exc
            else:
                self.recording.end(exc)
            raise
        self.recording.lap("metadata")
        self._global_failure = None
        self.recording.planning_pause.begin()
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take note of the metadata that the plan will be made from."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._metadata = metadata
        self.recording.identify(self, str(self.path), self.rank, is_coordinator=is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Sort the plan by where its items lie, and tell a DCP reader constructor the ranges.

        Raises:
            CorruptMetadataError: the metadata does not say where an item is stored.
        """
        free_later(plan.items)
        with self.recording.during("plan"):
            prepared = self._prepared(plan)
        self.recording.planning_pause.end_if_others_plan()
        return prepared

    def _prepared(self, plan: LoadPlan) -> LoadPlan:
        plan.items.sort(key=self._place)
        if isinstance(self._reader_constructor, DCPS3ReaderConstructorProtocol):
            self._reader_constructor.set_item_ranges_by_file(
                plan.items, self.storage_data, self.path
            )
        if self._found is not None and self._metadata is not None and plan.storage_data is None:
            meta = self._metadata.storage_meta
            # Without collectives every rank has read a `.metadata` of its own; that it has, when
            # another has not, is a difference too.
            own = not self.use_collectives
            identity = (None, None) if own else (self._found.etag, meta.save_id if meta else None)
            plan.storage_data = LoadIdentity(str(self.path), *identity)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that every rank has planned with the same checkpoint.

        Raises:
            CheckpointChangedError: it was replaced between two ranks' reads.
        """
        identities = {
            plan.storage_data for plan in plans if isinstance(plan.storage_data, LoadIdentity)
        }
        if len(identities) > 1:
            changed = CheckpointChangedError(
                f"The checkpoint at {self.path} was replaced while ranks were reading its "
                "metadata: load it again"
            )
            self.recording.end(changed)
            raise changed
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into the planner's tensors.

        Raises:
            CheckpointChangedError: the checkpoint was replaced meanwhile.
            IntegrityError: stored bytes differ from those that were saved.
            S3Exception: as the store. The targets' contents are then undefined.
        """
        self.recording.planning_pause.end()
        self.recording.lap("plan")
        with self.recording.during("read"):
            self._read(plan, planner)
            self.recording.finish_bytes()
        self.recording.end()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is the URI of a place in S3."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def _new_recording(self) -> Recording:
        return Recording("load", str(self.path), self._audience)

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        base = parse_s3_uri(self.path)
        try:
            if isinstance(self._reader_constructor, DCPOptimizedConstructor):
                self._read_ranges(plan, planner, base, self._reader_constructor.max_gap_size)
            else:
                self._read_files(plan, planner, base)
        except (ObjectNotFoundError, CheckpointChangedError) as exc:
            raise self._explained(exc) from exc

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        """Return an item's stream for the readers that go file by file, verified if it can be."""
        self.recording.meter.advance(self._slicing_bytes)  # of the item before, which is done
        self._slicing_bytes = sinfo.length
        item: IO[bytes] = super()._slice_file(file, sinfo)
        crcs = crcs_of(sinfo)
        if crcs is None:
            return item
        data = item.read(sinfo.length)
        if crc_of([memoryview(data)]) != crcs.item:
            raise self._damaged(sinfo)
        return io.BytesIO(data)

    def _read_files(self, plan: LoadPlan, planner: LoadPlanner, base: S3Uri) -> None:
        source = str(self._metadata_uri(None))
        places = [self.storage_data[item.storage_index] for item in plan.items]
        # Names outside of the checkpoint are refused before a file is opened.
        for name in {place.relative_path for place in places}:
            child_key(base.key, name, source=source)
        meter, self.fs.tally = self.recording.meter, self.recording.tally
        self._slicing_bytes = 0
        meter.expect(sum(place.length for place in places))
        super().read_data(plan, planner)
        meter.advance(self._slicing_bytes)

    def _damaged(self, sinfo: _StorageInfo) -> IntegrityError:
        # torch does not say whose item it asks for.
        names = [index.fqn for index, info in self.storage_data.items() if info is sinfo]
        uri = self._uri_of(sinfo.relative_path)
        return damaged(", ".join(names), uri, sinfo.offset, sinfo.offset + sinfo.length)

    def _read_ranges(
        self, plan: LoadPlan, planner: LoadPlanner, base: S3Uri, max_gap_bytes: float
    ) -> None:
        portal, channel = self.fs.client.connect(self.recording.tally)
        LoadedItems(
            portal,
            channel,
            self.fs.client.s3client_config,
            planner,
            self.transforms,
            max_gap_bytes=max_gap_bytes,
            meter=self.recording.meter,
        ).read(plan.items, cast("Metadata", self._metadata), base)

    def _find(self, rank: int | None) -> Found | None:
        """Return the bytes of `.metadata`, or of a rank's own."""
        tally = self.recording.tally
        try:
            return self.fs.client.call_counted(tally, read, self._metadata_uri(rank))
        except AccessDeniedError as exc:
            exc.message += self._instead()
            raise

    def _instead(self) -> str:
        """Return what else could be loaded from here, as a sentence to add, or nothing."""
        if not self._holds_any(INDEX_NAME, MANIFEST_NAME, SINGLE_NAME):
            return ""
        return ". There is one of safetensors: load it with dcp.load and S3HuggingFaceStorageReader"

    def _holds_any(self, *names: str) -> bool:
        """Return whether one of these objects is there, and may be read."""
        tally = self.recording.tally
        for name in names:
            with suppress(S3Exception):
                if self.fs.client.call_counted(tally, exists, self._uri_of(name)):
                    return True
        return False

    def _read_metadata(self, rank: int | None) -> Metadata:
        if rank is not None and not isinstance(
            self._global_failure, CheckpointNotFoundError | None
        ):
            # torch asks for a rank's own metadata after any failure to read the global one, and
            # would report only that there is none.
            raise self._global_failure
        uri = self._metadata_uri(rank)
        found = self._find(rank)
        if found is None:
            if self._global_failure is not None:  # in whose place torch asks for a rank's own
                uri = self._metadata_uri(None)
            # One rank looks for all, once there is no name left that the checkpoint may have.
            instead = self._instead() if rank == 0 else ""
            raise CheckpointNotFoundError(
                f"No checkpoint at {self.path}: there is no {uri}"
                + (instead or ". A save that did not finish leaves none; load another one"),
                bucket=uri.bucket,
                key=uri.key,
            )
        metadata = load_metadata(found.body, source=str(uri), trusted=self._trusted_metadata)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._found = dataclasses.replace(found, body=b"")
        return metadata

    def _metadata_uri(self, rank: int | None) -> S3Uri:
        return self._uri_of(metadata_name(rank))

    def _uri_of(self, name: str) -> S3Uri:
        base = parse_s3_uri(self.path)
        return S3Uri(base.bucket, join(base.key, name))

    def _place(self, item: ReadItem) -> tuple[str, int]:
        try:
            info = self.storage_data[item.storage_index]
        except KeyError as exc:
            raise CorruptMetadataError(
                f"The metadata of {self.path} does not say where {item.storage_index} is "
                "stored: load an older checkpoint"
            ) from exc
        return info.relative_path, info.offset

    def _explained(self, exc: S3Exception) -> S3Exception:
        """Return the error to raise for an object that is gone or not the one that was read."""
        if self._found is None:
            return exc
        rank = None if self.use_collectives else self.rank
        now = self.fs.client.call(read, self._metadata_uri(rank))
        if now is not None and now.etag == self._found.etag:
            return exc
        return CheckpointChangedError(
            f"The checkpoint at {self.path} was replaced while it was being read: load it again "
            f"({exc})",
            bucket=exc.bucket,
            key=exc.key,
        )
