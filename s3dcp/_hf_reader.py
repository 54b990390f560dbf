"""`S3HuggingFaceStorageReader`: `dcp.load` from safetensors files, whoever wrote them."""

from __future__ import annotations

import os

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from s3dcp._commit import metadata_name
from s3dcp._config import S3ClientConfig, check_thread_count
from s3dcp._errors import AccessDeniedError, CheckpointNotFoundError
from s3dcp._formats import INDEX_NAME
from s3dcp._hf_files import child_uri, find, metadata_of
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._progress import ProgressCallback
from s3dcp._reader import S3StorageReader
from s3dcp._recording import ReportCallback


class S3HuggingFaceStorageReader(S3StorageReader):
    """Reads safetensors checkpoints from S3, resharded and converted to the targets' dtypes.

    The counterpart of torch's `HuggingFaceStorageReader`. Reads a checkpoint with an index, one of
    shards with their manifest, and one of the single file `model.safetensors`; failing those, all
    files of the folder that end in `.safetensors`, as torch does. All ranges that a rank needs are
    fetched together, straight into its tensors. What s3dcp wrote is verified by its CRCs.

    Args:
        region: The bucket's region.
        path: The checkpoint's place, `s3://bucket/prefix`.
        s3client_config: Settings of the client.
        thread_count: Accepted for torch's sake: all files are read at once.
        progress: As in `S3StorageReader`.
        on_report: As in `S3StorageReader`.

    Raises:
        S3ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        region: str | None,
        path: str | os.PathLike[str],
        s3client_config: S3ClientConfig | None = None,
        thread_count: int = 1,
        *,
        progress: bool | ProgressCallback = False,
        on_report: ReportCallback | None = None,
    ) -> None:
        super().__init__(region, path, s3client_config, progress=progress, on_report=on_report)
        check_thread_count(thread_count)
        self.thread_count = thread_count
        self._commit_name = INDEX_NAME

    # Without torch's keyword arguments: there is no metadata of a single rank's.
    def read_metadata(self) -> Metadata:
        """Read what the checkpoint consists of, from its index and the headers of its files.

        Raises:
            CheckpointNotFoundError: there is none, or only a save that did not finish.
            CheckpointChangedError: it is being replaced.
            CorruptMetadataError: something in it is malformed, or does not fit together.
            S3Exception: as the store.
        """
        return super().read_metadata()

    def _read_metadata(self, rank: int | None) -> Metadata:  # noqa: ARG002 - there is one for all
        tally = self.recording.tally
        try:
            checkpoint = self.fs.client.call_counted(tally, find, parse_s3_uri(self.path))
        except (AccessDeniedError, CheckpointNotFoundError) as exc:
            exc.message += self._instead()
            raise
        if checkpoint.commit is not None:
            self._commit_name, self._found = checkpoint.commit
        metadata = metadata_of(checkpoint)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _instead(self) -> str:
        if not self._holds_any(metadata_name(), metadata_name(0)):
            return ""
        return ". There is one of DCP: load it with s3dcp.load, or dcp.load and S3StorageReader"

    def _metadata_uri(self, rank: int | None) -> S3Uri:  # noqa: ARG002 - there is one for all
        return child_uri(parse_s3_uri(self.path), self._commit_name)
