"""`S3StorageWriter`: where `dcp.save` and `dcp.async_save` write to."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from s3dcp._calls import Call
from s3dcp._commit import Found, data_name, deletions, metadata_name, new_token
from s3dcp._config import S3ClientConfig, check_callable, check_thread_count
from s3dcp._errors import (
    CorruptMetadataError,
    IncompleteSaveError,
    InvalidS3UriError,
    S3ConfigError,
)
from s3dcp._filesystem import S3FileSystem
from s3dcp._giving_way import free_later
from s3dcp._keys import S3Uri, child_key, join, parse_s3_uri
from s3dcp._metadata import dismantle_metadata, dump_metadata, load_metadata
from s3dcp._portal import Calls
from s3dcp._prefixes import DefaultPrefixStrategy, S3PrefixStrategyBase
from s3dcp._progress import ProgressCallback
from s3dcp._publish import Look, already_exists, delete_replaced, exists, look, publish
from s3dcp._recording import Audience, Recording, ReportCallback
from s3dcp._report import Report
from s3dcp._saving import SavedItems
from s3dcp._tally import Totals
from s3dcp._torch_internals import CURRENT_DCP_VERSION, _split_by_size_and_type, _StorageInfo

_log = logging.getLogger("s3dcp.writer")


@dataclasses.dataclass
class StorageMetadata:
    """What a save plan carries to its rank: the prefix of its data objects' names."""

    prefix: str


class S3StorageWriter(FileSystemWriter):
    """Writes checkpoints to S3.

    Every save writes data objects under names of its own, then commits with one atomic PUT of
    `.metadata`. A checkpoint that was there stays loadable until then; what it alone used is
    deleted afterwards.

    Args:
        region: The bucket's region; None as in `S3Client`.
        path: The checkpoint's place, `s3://bucket/prefix`.
        s3client_config: Settings of the client.
        prefix_strategy: Spreads the data objects over key prefixes; by default they are all under
            `path`, as `__{rank}_...`.
        thread_count: Objects that a rank writes, at once.
        progress: True for a bar, on rank 0; or a callback, on every rank.
        on_report: Is given every save's report, on every rank, when the rank's part has ended,
            well or not; on those that do not commit, that is before the commit. Called on the
            thread that saves; what it raises is logged.
        **kwargs: For torch's `FileSystemWriter`: `overwrite`, `single_file_per_rank`,
            `cache_staged_state_dict`, `_extensions` and so on.

    Raises:
        S3ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        region: str | None,
        path: str | os.PathLike[str],
        s3client_config: S3ClientConfig | None = None,
        prefix_strategy: S3PrefixStrategyBase | None = None,
        thread_count: int = 1,
        *,
        progress: bool | ProgressCallback = False,
        on_report: ReportCallback | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("serialization_format") is SerializationFormat.SAFETENSORS:
            raise S3ConfigError(
                "serialization_format=SAFETENSORS has no reader in torch's DCP: save with the "
                "default format, or write safetensors with S3HuggingFaceStorageWriter"
            )
        check_thread_count(thread_count)
        check_callable("prefix_strategy", prefix_strategy)
        fs = S3FileSystem(region, s3client_config=s3client_config)
        path = fs.init_path(path)
        super().__init__(path=path, thread_count=thread_count, **{"sync_files": False, **kwargs})
        self.fs: S3FileSystem = fs  # type: ignore[assignment]  # in place of torch's own
        self.path = path
        self.prefix_strategy = prefix_strategy or DefaultPrefixStrategy()
        self._is_coordinator = True
        self._audience = Audience(progress, on_report)
        self._staged: Recording | None = None
        self._look: Call[Look] | None = None  # what the commit may replace
        self.recording = self._new_recording()

    @property
    def report(self) -> Report:
        """What this rank did in the last save, or has done so far."""
        return self.recording.report()

    @property
    def totals(self) -> Totals:
        """This rank's requests in the last save: how many, how long, and what went wrong."""
        return self.recording.tally.totals()

    def __getstate__(self) -> dict[str, Any]:
        # A process-based `async_save` pickles the writer for every save; what it has staged is
        # sent by itself.
        state = self.__dict__ | {"state_dict_cache": None, "_look": None}
        self._staged = None  # that save goes on over there
        return state

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take note of this rank's part in the save."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._is_coordinator = is_coordinator
        self.recording, self._staged = self._staged or self._new_recording(), None
        self.recording.identify(self, str(self.path), self.rank, is_coordinator=is_coordinator)
        self._look = None
        self.recording.planning_pause.begin()

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy the state dict to the CPU for an asynchronous save."""
        # The thread that will save may run while the interpreter exits, when no thread can be
        # started any more: the portal's are started now.
        self.fs.client.connect()
        recording = self._new_recording()  # an earlier save may not have ended
        with recording.during("stage"):
            staged: dict[str, Any] = super().stage(state_dict)
        self._staged = recording
        return staged

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Look whether there is a checkpoint already. Nothing is written before that is known.

        Raises:
            CheckpointExistsError: there is one, and `overwrite=False`.
            S3Exception: the bucket cannot be used. With `overwrite=True` that is raised later: by
                `write_data`, or by `prepare_global_plan` where other ranks are to hear of it.
        """
        free_later(plan.items)
        with self.recording.during("plan"):
            prepared = self._prepared(plan)
        self.recording.planning_pause.end_if_others_plan()
        return prepared

    def _prepared(self, plan: SavePlan) -> SavePlan:
        alone = not self.use_collectives
        if self._is_coordinator or alone:
            uri = self._metadata_uri()
            portal, channel = self.fs.client.connect(self.recording.tally)
            self._look = Calls(portal).submit(look, channel, uri)
            if not self.overwrite and portal.wait(self._look).found is not None:
                raise already_exists(uri)
            everybodys = self._metadata_uri(alone=False)
            if alone and self.fs.client.call_counted(self.recording.tally, exists, everybodys):
                _log.warning(
                    "%s holds a checkpoint that was saved with collectives, which loads will find "
                    "instead of this one: save to another path",
                    self.path,
                )
        if alone and self.rank is not None:
            plan = dataclasses.replace(
                plan, storage_data=StorageMetadata(self.prefix_strategy(self.rank))
            )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank the prefix of its objects' names.

        Raises:
            S3Exception: the bucket cannot be used.
        """
        with self.recording.during("plan"):
            if len(plans) > 1:
                self._looked()  # which fails all ranks, before any of them writes
            return [
                plan
                if isinstance(plan.storage_data, StorageMetadata) and not self.use_collectives
                else dataclasses.replace(
                    plan, storage_data=StorageMetadata(self.prefix_strategy(rank))
                )
                for rank, plan in enumerate(plans)
            ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items.

        Raises:
            S3Exception: one could not be written. Nothing of this plan is left behind.
        """
        self.recording.planning_pause.end()
        self.recording.lap("plan")
        free_later(plan.items)
        with self.recording.during("write"):
            saved = self._write(plan, planner)
            free_later(saved)
            self.recording.finish_bytes()
        if self.use_collectives and not self._is_coordinator:
            self.recording.end()  # others commit
        future: Future[list[WriteResult]] = Future()
        future.set_result(saved)
        return future

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        base = parse_s3_uri(self.path)
        # Minted here for every save: with plan caching the plan, and with it all else that could
        # tell saves apart, may be an earlier save's.
        token = new_token()
        files: list[tuple[S3Uri, str, list[WriteItem]]] = []
        for number, items in enumerate(self._buckets(plan)):
            name = data_name(plan.storage_data.prefix, number, token)
            key = child_key(base.key, name, source="the prefix strategy")
            files.append((S3Uri(base.bucket, key), name, items))
        portal, channel = self.fs.client.connect(self.recording.tally)
        config, meter = self.fs.client.s3client_config, self.recording.meter
        # Alone, the answer is on its way while uploads begin and the first parts are made.
        saving = SavedItems(portal, channel, config, planner, self.transforms, meter, self._look)
        saved = saving.write(files)
        # Objects without items are named as well: what is not named outlives its checkpoint.
        return saved + [
            WriteResult(MetadataIndex(name), 0, _StorageInfo(name, 0, 0))
            for _, name, items in files
            if not items
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the checkpoint: publish its `.metadata`.

        Raises:
            IncompleteSaveError: something that the metadata describes was not written.
            CheckpointExistsError: another writer committed first, and `overwrite=False`.
            CommitConflictError: another writer committed while our outcome was unknown.
            S3Exception: the store failed; nothing was published.
        """
        self.recording.lap("wait")
        with self.recording.during("commit"):
            replaced = self._commit(metadata, results)
        if replaced is not None:
            with self.recording.during("clean_up"):
                self._delete_replaced(replaced.body, metadata, self._metadata_uri())
        self.recording.end()

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> Found | None:
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {
            result.index: result.storage_data for rank in results for result in rank
        }
        metadata.storage_meta = self.storage_meta()
        check_complete(metadata)
        before, self._look = self._looked(), None
        return self.fs.client.call_counted(
            self.recording.tally,
            publish,
            self._metadata_uri(),
            dump_metadata(metadata),
            overwrite=self.overwrite,
            before=before,
            objects=self._uris({info.relative_path for info in metadata.storage_data.values()}),
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is the URI of a place in S3."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def _looked(self) -> Look | None:
        """Wait for what was there when the save began; None on ranks that do not ask."""
        return None if self._look is None else self.fs.client.connect()[0].wait(self._look)

    def _new_recording(self) -> Recording:
        return Recording("save", str(self.path), self._audience)

    def _metadata_uri(self, *, alone: bool = True) -> S3Uri:
        base = parse_s3_uri(self.path)
        rank = self.rank if alone and not self.use_collectives else None
        return S3Uri(base.bucket, join(base.key, metadata_name(rank)))

    def _buckets(self, plan: SavePlan) -> list[list[WriteItem]]:
        # As in stock checkpoints, what is no tensor lies in front of what is.
        items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)
        if not self.single_file_per_rank:
            return [[item] for item in items]
        return _split_by_size_and_type(self.thread_count, items)

    def _delete_replaced(self, body: bytes | bytearray, metadata: Metadata, uri: S3Uri) -> None:
        try:
            old = load_metadata(body, source=str(uri))
            names = deletions(
                (info.relative_path for info in old.storage_data.values()),
                (info.relative_path for info in metadata.storage_data.values()),
            )
            objects = dict(zip(names, self._uris(names), strict=True))
            dismantle_metadata(old)
        except (CorruptMetadataError, InvalidS3UriError) as exc:
            _log.warning("objects of the checkpoint that was replaced are left in place: %s", exc)
            return
        base = parse_s3_uri(self.path)
        self.fs.client.call_counted(self.recording.tally, delete_replaced, base, objects)

    def _uris(self, names: Iterable[str]) -> list[S3Uri]:
        base = parse_s3_uri(self.path)
        source = str(self._metadata_uri())
        return [S3Uri(base.bucket, child_key(base.key, name, source=source)) for name in names]


def check_complete(metadata: Metadata) -> None:
    """Refuse to publish metadata that describes what was not written."""
    missing = [
        index
        for fqn, entry in metadata.state_dict_metadata.items()
        for index in (
            [MetadataIndex(fqn, chunk.offsets) for chunk in entry.chunks]
            if isinstance(entry, TensorStorageMetadata)
            else [MetadataIndex(fqn)]
        )
        if index not in metadata.storage_data
    ]
    if missing:
        names = ", ".join(sorted({index.fqn for index in missing})[:3])
        raise IncompleteSaveError(
            f"{len(missing)} items were planned but not written, {names} among them: nothing was "
            "published, save again"
        )
