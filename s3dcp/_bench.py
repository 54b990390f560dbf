"""Saves and loads measured against a store, with checkpoints that are made up for it."""

from __future__ import annotations

import logging
import secrets
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from s3dcp._catalog import abort_uploads
from s3dcp._checkpoint import shared_error
from s3dcp._config import S3ClientConfig
from s3dcp._errors import S3ConfigError, S3Exception
from s3dcp._flow import Channel, wait_all
from s3dcp._inventory import folder_of
from s3dcp._keys import S3Uri, join, parse_s3_uri
from s3dcp._node import free_memory_bytes
from s3dcp._ranges import GiB
from s3dcp._reader import S3StorageReader
from s3dcp._s3client import S3Client, delete, list_all
from s3dcp._tally import OperationTotals, Totals
from s3dcp._writer import S3StorageWriter

_log = logging.getLogger("s3dcp.bench")

# What plans and metadata take for a tensor, however small: 9.5 kB were seen.
_TENSOR_BYTES = 16 << 10

Operation: TypeAlias = Literal["save", "load"]
_State: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One save or load.

    Attributes:
        operation: Which of them.
        connections: How many there could be.
        part_bytes: The configured `part_size`.
        size_bytes: Of the tensors.
        wall_s: Seconds that it took.
        cpu_s: Seconds of processor time, of all threads of this process.
        requests: What is known of its requests.
    """

    operation: Operation
    connections: int
    part_bytes: int
    size_bytes: int
    wall_s: float
    cpu_s: float
    requests: OperationTotals

    @property
    def gib_per_s(self) -> float:
        """How fast it was."""
        return self.size_bytes / GiB / self.wall_s

    @property
    def cpu_s_per_gib(self) -> float:
        """What it cost this machine."""
        return self.cpu_s / (self.size_bytes / GiB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The trials of one operation with one setting.

    Attributes:
        trials: In the order in which they were made.
    """

    trials: Sequence[Trial]

    @property
    def first(self) -> Trial:
        """One that stands for what they have in common."""
        return self.trials[0]

    @property
    def gib_per_s(self) -> float:
        """The median."""
        return statistics.median(trial.gib_per_s for trial in self.trials)

    @property
    def cpu_s_per_gib(self) -> float:
        """The median."""
        return statistics.median(trial.cpu_s_per_gib for trial in self.trials)

    @property
    def requests(self) -> OperationTotals:
        """All of their requests."""
        return sum((trial.requests for trial in self.trials), OperationTotals())


def settings_of(
    config: S3ClientConfig, connections: Sequence[int], part_sizes: Sequence[int]
) -> list[S3ClientConfig]:
    """Return every combination of settings; where none are given, the configuration's own."""
    return [
        replace(config, max_connections=count, part_size=size)
        for count, size in product(
            connections or [config.connections()], part_sizes or [config.part_size]
        )
    ]


def summaries_of(trials: Sequence[Trial]) -> list[Summary]:
    """Group trials by setting and operation, in the order of the first of each."""
    groups: dict[tuple[int, int, str], list[Trial]] = {}
    for trial in trials:
        key = (trial.connections, trial.part_bytes, trial.operation)
        groups.setdefault(key, []).append(trial)
    return [Summary(trials=group) for group in groups.values()]


def fastest(summaries: Sequence[Summary], operation: Operation) -> Summary:
    """Return the setting that was the fastest for an operation."""
    own = [summary for summary in summaries if summary.first.operation == operation]
    return max(own, key=lambda summary: summary.gib_per_s)


def run_trials(
    uri: str,
    settings: Sequence[S3ClientConfig],
    *,
    size_bytes: int,
    tensors: int,
    repeats: int,
    region: str | None = None,
    progress: Callable[[int, int], None] = lambda _count, _total: None,
) -> list[Trial]:
    """Save and load checkpoints in a new folder below a URI, which is removed in any case.

    What cannot be removed is logged. Settings take turns, so that what changes meanwhile changes
    for all of them. One save and load of little goes first, whose seconds do not count: it imports
    and connects.

    Args:
        uri: A place that may be written to.
        settings: Those to try.
        size_bytes: Of a checkpoint.
        tensors: How many, all of one size.
        repeats: Saves and loads with each setting.
        region: The bucket's region.
        progress: Told how many bytes more were saved or loaded, and of how many in all.

    Raises:
        S3ConfigError: this machine has no memory for it.
        S3Exception: as `save` and `load`.
    """
    _check_memory(size_bytes, tensors)
    place = parse_s3_uri(uri)
    folder = S3Uri(place.bucket, join(place.key, f"s3dcp-bench-{secrets.token_hex(8)}"))
    state = _made_up(size_bytes, tensors)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    total_bytes = 2 * size_bytes * repeats * len(settings)
    trials: list[Trial] = []
    # Whom the store does not let look there could not remove it again.
    S3Client(region, settings[0]).call(list_all, folder_of(folder))
    with _removed(folder, region, settings[0]):
        progress(0, total_bytes)
        for config in settings:
            small = _made_up(1 << 16, 1)
            for _ in _save_and_load(str(folder), region, config, small, dict(small)):
                pass
        for _ in range(repeats):
            for config in settings:
                for trial in _save_and_load(str(folder), region, config, state, target):
                    trials.append(trial)
                    progress(size_bytes, total_bytes)
    return trials


def _check_memory(size_bytes: int, tensors: int) -> None:
    """Refuse what would end in the machine's memory, or only after hours."""
    free_bytes = free_memory_bytes()
    needed_bytes = 2 * size_bytes + tensors * _TENSOR_BYTES
    if free_bytes is not None and needed_bytes > free_bytes:
        raise S3ConfigError(
            f"{tensors} tensors of {size_bytes} bytes in all, once to save and once to load, take "
            f"{needed_bytes / GiB:.3g} GiB of memory, and {free_bytes / GiB:.3g} GiB are free: "
            "make the checkpoint smaller (--size, --tensors)"
        )


def _made_up(size_bytes: int, tensors: int) -> _State:
    """Return tensors of random bytes, which no store can compress."""
    each = max(1, size_bytes // tensors)
    return {
        f"tensor.{number}": torch.empty(each, dtype=torch.uint8).random_()
        for number in range(tensors)
    }


def _save_and_load(
    uri: str, region: str | None, config: S3ClientConfig, state: _State, target: _State
) -> Iterator[Trial]:
    writer = S3StorageWriter(region, uri, config)
    save = partial(dcp.save, state, storage_writer=writer, no_dist=True)
    yield _measured("save", config, state, save, lambda: writer.totals)
    reader = S3StorageReader(region, uri, config)
    load = partial(dcp.load, target, storage_reader=reader, no_dist=True)
    yield _measured("load", config, state, load, lambda: reader.totals)


def _measured(
    operation: Operation,
    config: S3ClientConfig,
    state: _State,
    call: Callable[[], object],
    totals: Callable[[], Totals],
) -> Trial:
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            call()
    except CheckpointException as exc:
        raise (shared_error(exc) or exc) from None
    return Trial(
        operation=operation,
        connections=config.connections(),
        part_bytes=config.part_size,
        size_bytes=sum(tensor.nbytes for tensor in state.values()),
        wall_s=time.perf_counter() - began_s,
        cpu_s=time.process_time() - cpu_began_s,
        requests=totals().overall,
    )


@contextmanager
def _removed(folder: S3Uri, region: str | None, config: S3ClientConfig) -> Iterator[None]:
    try:
        yield
    finally:
        try:
            S3Client(region, config).call(_remove, folder_of(folder))
            # A save that was interrupted has aborted its uploads, unless that failed.
            abort_uploads(
                str(folder), grace_s=0, dry_run=False, region=region, s3client_config=config
            )
        except S3Exception as exc:
            _log.warning("something may be left at %s: %s", folder, exc)


async def _remove(channel: Channel, folder: S3Uri) -> None:
    found = await list_all(channel, folder)
    await wait_all([partial(delete, channel, S3Uri(folder.bucket, info.key)) for info in found])
