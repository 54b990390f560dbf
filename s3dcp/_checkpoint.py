"""Checkpoints in one call: DCP's `save`, `load` and `async_save` with an S3 URI.

What differs from DCP with a storage writer or reader: the error of a save or load is raised as
itself, where DCP raises a `CheckpointException`; items that are no tensors are not executed; and
all can be awaited.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from s3dcp._cancellation import in_thread
from s3dcp._config import S3ClientConfig
from s3dcp._constructors import DCPS3ReaderConstructorProtocol, S3ReaderConstructorProtocol
from s3dcp._devices import on_this_device
from s3dcp._errors import S3ConfigError
from s3dcp._giving_way import give_way
from s3dcp._group_reader import GroupReader, MetadataError
from s3dcp._planner import WeightsOnlyLoadPlanner
from s3dcp._prefixes import S3PrefixStrategyBase
from s3dcp._progress import ProgressCallback
from s3dcp._reader import S3StorageReader
from s3dcp._recording import ReportCallback
from s3dcp._writer import S3StorageWriter

T = TypeVar("T")

_UNGROUPED = "torch.distributed is disabled, unavailable or uninitialized"


def save(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    prefix_strategy: S3PrefixStrategyBase | None = None,
    thread_count: int = 1,
    overwrite: bool = True,
    progress: bool | ProgressCallback = False,
    on_report: ReportCallback | None = None,
) -> Metadata:
    """Save a checkpoint to S3. All ranks of a process group call this together.

    Args:
        state_dict: What to save.
        uri: The checkpoint's place, `s3://bucket/prefix`.
        planner: As in `dcp.save`.
        process_group: As in `dcp.save`.
        no_dist: As in `dcp.save`. True by itself where there is no process group.
        use_collectives: As in `dcp.save`.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.
        prefix_strategy: Spreads the data objects over key prefixes.
        thread_count: Objects that a rank writes, at once.
        overwrite: Whether a checkpoint that is there may be replaced.
        progress: As in `S3StorageWriter`: True for a bar, or a callback.
        on_report: As in `S3StorageWriter`: is given this rank's report.

    Returns:
        The checkpoint's metadata.

    Raises:
        S3Exception: nothing was published. The error of all ranks that failed; its cause, a
            `CheckpointException`, has each rank's.
        KeyboardInterrupt: on this rank or another.
        CheckpointException: ranks failed with different errors.
    """
    _check_state_dict(state_dict)
    writer = S3StorageWriter(
        region,
        uri,
        s3client_config,
        prefix_strategy,
        thread_count,
        progress=progress,
        on_report=on_report,
        overwrite=overwrite,
    )
    _expect_no_group(no_dist=no_dist)
    with _unwrapped(writer):
        saved: Metadata = dcp.save(
            state_dict,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
    return saved


def load(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    weights_only: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    reader_constructor: (
        S3ReaderConstructorProtocol | DCPS3ReaderConstructorProtocol | None
    ) = None,
    progress: bool | ProgressCallback = False,
    on_report: ReportCallback | None = None,
) -> None:
    """Load a checkpoint from S3 into a state dict. All ranks of a group call this together.

    Its `.metadata` is read by the group's first rank, and sent to the others.

    Args:
        state_dict: Says what to load and where to: tensors are filled, all else is replaced.
        uri: The checkpoint's place, `s3://bucket/prefix`.
        planner: As in `dcp.load`; it then decides about `weights_only`.
        process_group: As in `dcp.load`.
        no_dist: As in `dcp.load`. True by itself where there is no process group.
        weights_only: Refuse items whose pickles could run code. False executes them.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.
        reader_constructor: As in `S3StorageReader`.
        progress: As in `S3StorageReader`: True for a bar, or a callback.
        on_report: As in `S3StorageReader`: is given this rank's report.

    Raises:
        UnsafeItemError: an item's pickle could run code.
        S3Exception: the state dict's contents are undefined. The error of all ranks that failed;
            its cause, a `CheckpointException`, has each rank's.
        KeyboardInterrupt: on this rank or another.
        CheckpointException: ranks failed with different errors.
    """
    _check_state_dict(state_dict)
    reader = GroupReader(
        region,
        uri,
        s3client_config,
        reader_constructor,
        progress=progress,
        on_report=on_report,
    )
    if _grouped(no_dist=no_dist):
        reader.share(process_group)
    ours = planner is None
    if planner is None:
        planner = WeightsOnlyLoadPlanner() if weights_only else DefaultLoadPlanner()
    _expect_no_group(no_dist=no_dist)
    with _unwrapped(reader):
        dcp.load(
            state_dict,
            storage_reader=reader,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
        )
    if ours:  # others may look at the metadata afterwards
        reader.let_go()


@overload
def async_save(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: SavePlanner | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    async_checkpointer_type: AsyncCheckpointerType = ...,
    async_stager: None = ...,
    no_dist: bool = ...,
    use_collectives: bool = ...,
    region: str | None = ...,
    s3client_config: S3ClientConfig | None = ...,
    prefix_strategy: S3PrefixStrategyBase | None = ...,
    thread_count: int = ...,
    overwrite: bool = ...,
    progress: bool | ProgressCallback = ...,
    on_report: ReportCallback | None = ...,
) -> Future[Metadata]: ...


@overload
def async_save(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: SavePlanner | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    async_checkpointer_type: AsyncCheckpointerType = ...,
    async_stager: AsyncStager,
    no_dist: bool = ...,
    use_collectives: bool = ...,
    region: str | None = ...,
    s3client_config: S3ClientConfig | None = ...,
    prefix_strategy: S3PrefixStrategyBase | None = ...,
    thread_count: int = ...,
    overwrite: bool = ...,
    progress: bool | ProgressCallback = ...,
    on_report: ReportCallback | None = ...,
) -> Future[Metadata] | AsyncSaveResponse: ...


def async_save(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    prefix_strategy: S3PrefixStrategyBase | None = None,
    thread_count: int = 1,
    overwrite: bool = True,
    progress: bool | ProgressCallback = False,
    on_report: ReportCallback | None = None,
) -> Future[Metadata] | AsyncSaveResponse:
    """Copy a state dict, and save the copy to S3 while the caller goes on.

    Args:
        state_dict: What to save.
        uri: The checkpoint's place, `s3://bucket/prefix`.
        planner: As in `dcp.async_save`.
        process_group: As in `dcp.async_save`.
        async_checkpointer_type: As in `dcp.async_save`.
        async_stager: As in `dcp.async_save`.
        no_dist: As in `dcp.async_save`. True by itself where there is no process group.
        use_collectives: As in `dcp.async_save`.
        region: The bucket's region; None as in `S3Client`.
        s3client_config: Settings of the client.
        prefix_strategy: Spreads the data objects over key prefixes.
        thread_count: Objects that a rank writes, at once.
        overwrite: Whether a checkpoint that is there may be replaced.
        progress: As in `S3StorageWriter`: True for a bar, or a callback.
        on_report: As in `S3StorageWriter`: is given this rank's report. Both callbacks are called
            where the save goes on: on its thread, or in its process, to which they are pickled.

    Returns:
        As `dcp.async_save`: a future of the metadata, or two futures where an `async_stager` stages
        in the background. The save's raises what `save` would.

    Raises:
        S3Exception: an argument that cannot work.
    """
    _check_state_dict(state_dict)
    writer = S3StorageWriter(
        region,
        uri,
        s3client_config,
        prefix_strategy,
        thread_count,
        progress=progress,
        on_report=on_report,
        overwrite=overwrite,
    )
    _expect_no_group(no_dist=no_dist)
    with _unwrapped(writer):
        response: Future[Metadata] | AsyncSaveResponse = dcp.async_save(
            state_dict,
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            async_checkpointer_type=async_checkpointer_type,
            async_stager=async_stager,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )
    if isinstance(response, AsyncSaveResponse):
        return AsyncSaveResponse(
            staging_completion=response.staging_completion,
            upload_completion=_unwrapping(response.upload_completion, writer),
        )
    return _unwrapping(response, writer)


async def asave(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    prefix_strategy: S3PrefixStrategyBase | None = None,
    thread_count: int = 1,
    overwrite: bool = True,
    progress: bool | ProgressCallback = False,
    on_report: ReportCallback | None = None,
) -> Metadata:
    """Await `save`, from any event loop, which goes on meanwhile.

    The state dict is not copied: change nothing of it before this returns. Cancelling ends the
    save's requests, and `CancelledError` is raised when nothing reads from the tensors any more: in
    a process group, once the other ranks have come to where they tell each other. As with any
    interrupt, a save that was just being committed may have been.

    Its arguments, and what it returns and raises, are those of `save`.
    """
    _check_state_dict(state_dict)
    return await in_thread(
        on_this_device(save),
        _Unhurried(state_dict.items()),
        uri,
        planner=planner,
        process_group=process_group,
        no_dist=no_dist,
        use_collectives=use_collectives,
        region=region,
        s3client_config=s3client_config,
        prefix_strategy=prefix_strategy,
        thread_count=thread_count,
        overwrite=overwrite,
        progress=progress,
        on_report=on_report,
    )


async def aload(
    state_dict: dict[str, Any],
    uri: str | os.PathLike[str],
    *,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    weights_only: bool = True,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    reader_constructor: (
        S3ReaderConstructorProtocol | DCPS3ReaderConstructorProtocol | None
    ) = None,
    progress: bool | ProgressCallback = False,
    on_report: ReportCallback | None = None,
) -> None:
    """Await `load`, from any event loop, which goes on meanwhile.

    The tensors change until this returns. Cancelling ends the load's requests, and
    `CancelledError` is raised when nothing writes to the tensors any more, whose contents are then
    undefined: in a process group, once the other ranks have come to where they tell each other.

    Its arguments, and what it raises, are those of `load`.
    """
    await in_thread(
        on_this_device(load),
        state_dict,
        uri,
        planner=planner,
        process_group=process_group,
        no_dist=no_dist,
        weights_only=weights_only,
        region=region,
        s3client_config=s3client_config,
        reader_constructor=reader_constructor,
        progress=progress,
        on_report=on_report,
    )


def _check_state_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise S3ConfigError(
            f"state_dict must be a dict, got {type(state_dict).__name__}: pass {{'model': "
            "model.state_dict()}, and the URI behind it"
        )


@contextmanager
def _unwrapped(storage: S3StorageWriter | S3StorageReader) -> Iterator[None]:
    try:
        yield
    except CheckpointException as exc:
        wrapped = plain(exc)
        error = shared_error(wrapped)
        storage.recording.end(error or wrapped)
        if error is None:
            raise wrapped from None
        raise error from wrapped
    except BaseException as exc:
        storage.recording.end(exc)
        raise


def plain(exc: CheckpointException) -> CheckpointException:
    """Return the exception with the errors themselves where some were carried out by another."""
    failures = {
        rank: (error.error if isinstance(error, MetadataError) else error, stack)
        for rank, (error, stack) in exc.failures.items()
    }
    return CheckpointException(exc.args[0], failures).with_traceback(exc.__traceback__)


def shared_error(exc: CheckpointException) -> BaseException | None:
    """Return the error that stands for all that ranks raised, or None.

    That is an interrupt, or else the one kind of error that there is, of the lowest rank: so all
    ranks raise the same.
    """
    errors = [error for _, (error, _) in sorted(exc.failures.items())]
    interrupts = [error for error in errors if isinstance(error, KeyboardInterrupt)]
    if interrupts:
        return interrupts[0]
    return errors[0] if len({type(error) for error in errors}) == 1 else None


def _unwrapping(saving: Future[T], writer: S3StorageWriter) -> Future[T]:
    """Return a future that ends as another does, but for a `CheckpointException`."""
    unwrapped: Future[T] = Future()
    unwrapped.set_running_or_notify_cancel()  # neither can be cancelled

    def end(done: Future[T]) -> None:
        try:
            with _unwrapped(writer):
                unwrapped.set_result(done.result())
        except BaseException as exc:  # noqa: BLE001 - it belongs to whoever waits
            unwrapped.set_exception(exc)

    saving.add_done_callback(end)
    return unwrapped


def _expect_no_group(*, no_dist: bool) -> None:
    """Ignore torch's warning of a save or load without a process group, which is no mistake here.

    For good, as `async_save` warns on a thread of torch's: filters are the process's, and none can
    be taken back while other threads may have changed them.
    """
    if _grouped(no_dist=no_dist):
        return
    entry = ("ignore", re.compile(_UNGROUPED, re.IGNORECASE), UserWarning, None, 0)
    if list(warnings.filters[:1]) != [entry]:
        warnings.filterwarnings("ignore", _UNGROUPED, UserWarning)


def _grouped(*, no_dist: bool) -> bool:
    return not no_dist and dist.is_available() and dist.is_initialized()


class _Unhurried(dict[str, Any]):
    """A state dict that gives way while DCP goes through its elements, of each of which it logs."""

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override] # DCP goes through it
        for item in super().items():
            give_way()
            yield item
