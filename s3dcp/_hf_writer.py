"""`S3HuggingFaceStorageWriter`: `dcp.save` as safetensors files, which every library reads."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from s3dcp._config import S3ClientConfig
from s3dcp._consolidation import consolidate
from s3dcp._errors import S3ConfigError
from s3dcp._formats import INDEX_NAME, MANIFEST_NAME, SHARDED_FOLDER, SINGLE_NAME
from s3dcp._hf_files import begin, child_uri, commit
from s3dcp._hf_index import Index, SavedFile, file_name, numbered
from s3dcp._hf_saving import SafetensorsItems, plan_file
from s3dcp._keys import S3Uri, join, parse_s3_uri
from s3dcp._metadata import ItemCrcs, crcs_of
from s3dcp._progress import ProgressCallback
from s3dcp._publish import already_exists, exists
from s3dcp._recording import ReportCallback
from s3dcp._writer import S3StorageWriter, check_complete


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """What a rank tells of a tensor that it wrote: its file, that file's save, and its CRCs."""

    file: str
    save_id: str
    crcs: ItemCrcs | None


class S3HuggingFaceStorageWriter(S3StorageWriter):
    """Writes checkpoints to S3 as safetensors files with Hugging Face's names.

    The counterpart of torch's `HuggingFaceStorageWriter`. The last object to be written is the
    commit: `model.safetensors.index.json`; or, for a sharded save that is not consolidated,
    `model.safetensors.manifest.json`, which our reader and `consolidate_safetensors_files` need.

    File names are fixed, so a checkpoint that is replaced is gone as soon as the first new file is
    written: its index is deleted before that, and until the new one is there, there is none. Give
    every save a path of its own where that matters.

    Args:
        region: The bucket's region.
        path: The checkpoint's place, `s3://bucket/prefix`.
        s3client_config: Settings of the client.
        fqn_to_index_mapping: The number of each tensor's file, from 1 on; by default all are
            written to one file.
        thread_count: Accepted for torch's sake: all files of a rank are written at once.
        save_distributed: Whether every rank writes its own shards. If not, one rank has it all.
        enable_consolidation: Whether shards go to `path/sharded`, and the coordinator then makes
            full files of them in `path`.
        thread_count_consolidation: Accepted for torch's sake, as `thread_count`.
        overwrite: Whether a checkpoint that is there may be replaced.
        progress: As in `S3StorageWriter`.
        on_report: As in `S3StorageWriter`.

    Raises:
        S3ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        region: str | None,
        path: str | os.PathLike[str],
        s3client_config: S3ClientConfig | None = None,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
        *,
        overwrite: bool = True,
        progress: bool | ProgressCallback = False,
        on_report: ReportCallback | None = None,
    ) -> None:
        super().__init__(
            region,
            path,
            s3client_config,
            thread_count=thread_count,
            overwrite=overwrite,
            progress=progress,
            on_report=on_report,
        )
        if enable_consolidation and not save_distributed:
            raise S3ConfigError(
                "enable_consolidation=True makes full files of ranks' shards: it needs "
                "save_distributed=True"
            )
        numbered((), fqn_to_index_mapping or {})
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self._stale: set[str] = set()

    @property
    def consolidated_output_path(self) -> str | None:
        """Where full files are made of the shards, if they are."""
        return str(self.path) if self.enable_consolidation else None

    @property
    def metadata_path(self) -> str:
        """The name of the commit of a checkpoint of full files."""
        return INDEX_NAME

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take note of this rank's part in the save.

        Raises:
            S3ConfigError: a save without collectives.
        """
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        with self.recording.during("plan"):
            if not self.use_collectives:
                raise S3ConfigError(
                    "A safetensors checkpoint has one index, of all ranks' files: save with "
                    "use_collectives=True, or with S3StorageWriter"
                )

    def _prepared(self, plan: SavePlan) -> SavePlan:
        for items in self._by_file(plan.items).values():
            plan_file("", items, "")
        if self._is_coordinator and not self.overwrite:
            for base in {self._target, self._data}:
                for name in (INDEX_NAME, MANIFEST_NAME, SINGLE_NAME):
                    uri = child_uri(base, name)
                    if self.fs.client.call(exists, uri):
                        raise already_exists(uri)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks' shards, and give up the checkpoint that is to be replaced.

        Raises:
            S3ConfigError: several ranks would write one file.
        """
        with self.recording.during("plan"):
            if not self.save_distributed:
                files = [number for plan in plans for number in self._by_file(plan.items)]
                if len(set(files)) != len(files):
                    raise S3ConfigError(
                        "Several ranks have tensors for one file: pass save_distributed=True, and "
                        "enable_consolidation=True for full files"
                    )
            self._stale = self.fs.client.call_counted(
                self.recording.tally, begin, self._data, overwrite=self.overwrite
            )
            return [
                dataclasses.replace(plan, storage_data=rank if self.save_distributed else None)
                for rank, plan in enumerate(plans, start=1)
            ]

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # Minted here for every save: with plan caching the plan may be an earlier save's.
        save_id = uuid.uuid4().hex[:16]
        count = max((self.fqn_to_index_mapping or {"": 1}).values(), default=1)
        files = [
            plan_file(file_name(number, count, plan.storage_data), items, save_id)
            for number, items in self._by_file(plan.items).items()
        ]
        portal, channel = self.fs.client.connect(self.recording.tally)
        config, meter = self.fs.client.s3client_config, self.recording.meter
        saved = SafetensorsItems(portal, channel, config, planner, self.transforms, meter)
        return [
            dataclasses.replace(
                result,
                storage_data=_Written(
                    result.storage_data.relative_path, save_id, crcs_of(result.storage_data)
                ),
            )
            for result in saved.write_files(self._data, files)
        ]

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # Shards that were committed before their consolidation failed stay, for
        # `consolidate_safetensors_files`.
        written = [result for rank in results for result in rank]
        metadata.storage_data = {result.index: result.storage_data for result in written}
        check_complete(metadata)
        client, tally = self.fs.client, self.recording.tally
        index = self._index(written)
        client.call_counted(tally, commit, self._data, index, self._stale, overwrite=self.overwrite)
        if self.enable_consolidation:
            client.call_counted(
                tally,
                consolidate,
                client.s3client_config,
                self._data,
                self._target,
                self.fqn_to_index_mapping,
                overwrite=self.overwrite,
            )

    @property
    def _target(self) -> S3Uri:
        return parse_s3_uri(self.path)

    @property
    def _data(self) -> S3Uri:
        base = self._target
        if not self.enable_consolidation:
            return base
        return S3Uri(base.bucket, join(base.key, SHARDED_FOLDER))

    def _by_file(self, items: Sequence[WriteItem]) -> dict[int, list[WriteItem]]:
        fqns = [item.index.fqn for item in items]
        mapping = self.fqn_to_index_mapping
        numbers = dict.fromkeys(fqns, 1) if mapping is None else mapping
        numbered(fqns, numbers)
        found: defaultdict[int, list[WriteItem]] = defaultdict(list)
        for item in items:
            found[numbers[item.index.fqn]].append(item)
        return dict(sorted(found.items()))

    def _index(self, written: Sequence[WriteResult]) -> Index:
        save_ids: dict[str, str] = {}
        crcs: defaultdict[str, dict[str, ItemCrcs]] = defaultdict(dict)
        for result in written:
            place: _Written = result.storage_data
            save_ids[place.file] = place.save_id
            if place.crcs is not None:
                crcs[place.file][result.index.fqn] = place.crcs
        return Index(
            weight_map=(
                None
                if self.save_distributed
                else {result.index.fqn: result.storage_data.file for result in written}
            ),
            saved={file: SavedFile(save_id, crcs[file]) for file, save_id in save_ids.items()},
            total_bytes=sum(result.size_in_bytes for result in written),
        )
