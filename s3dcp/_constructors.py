"""Reader constructors: what `reader_constructor=` takes, a choice of reader that can travel.

A constructor is any callable that turns a bucket, a key and the store's two functions into an
`S3Reader`. Those made here pickle and serve any number of objects.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from s3dcp._dcp_reader import (
    DEFAULT_MAX_GAP_SIZE,
    GUIDANCE,
    DCPOptimizedS3Reader,
    ItemRange,
    check_max_gap_size,
)
from s3dcp._errors import S3ConfigError
from s3dcp._keys import S3Uri, join, uri_text
from s3dcp._ranged_reader import RangedS3Reader
from s3dcp._readers import S3Reader, SequentialS3Reader
from s3dcp._streams import GetStreamCallable, ObjectInfoLike

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import ReadItem

_logger = logging.getLogger("s3dcp.readers")


class StoredItem(Protocol):
    """Where an item lies; torch's `_StorageInfo` is one."""

    @property
    def relative_path(self) -> str:
        """The object, relative to the checkpoint."""

    @property
    def offset(self) -> int:
        """The item's first byte."""

    @property
    def length(self) -> int:
        """The item's size in bytes."""


@runtime_checkable
class S3ReaderConstructorProtocol(Protocol):
    """Makes a reader for an object."""

    def __call__(
        self,
        bucket: str,
        key: str,
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
    ) -> S3Reader:
        """Return a reader of the object."""


@runtime_checkable
class DCPS3ReaderConstructorProtocol(Protocol):
    """Makes a reader for an object of a checkpoint, and is told first what will be read."""

    def __call__(
        self,
        bucket: str,
        key: str,
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
    ) -> S3Reader:
        """Return a reader of the object."""

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[ReadItem],
        storage_data: Mapping[MetadataIndex, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Take note of the ranges that a plan will read, in place of those of an earlier plan."""


class DCPOptimizedConstructor:
    """Makes a `DCPOptimizedS3Reader` for each object whose ranges were injected.

    `.metadata`, which is read before there is a plan, gets a `SequentialS3Reader`.

    Args:
        max_gap_size: See `DCPOptimizedS3Reader`.

    Raises:
        S3ConfigError: `max_gap_size` is negative.
        TypeError: `max_gap_size` is not a number.
    """

    def __init__(self, max_gap_size: float = DEFAULT_MAX_GAP_SIZE) -> None:
        check_max_gap_size(max_gap_size)
        self.max_gap_size = max_gap_size
        self._plan: tuple[Sequence[ReadItem], Mapping[MetadataIndex, StoredItem], str]
        self._plan = (), {}, ""
        self._item_ranges_by_file: dict[str, list[ItemRange]] | None = None

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[ReadItem],
        storage_data: Mapping[MetadataIndex, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Take note of the ranges that a plan will read, in place of those of an earlier plan.

        Args:
            plan_items: The plan's items, in the order in which they will be read. A rank that
                loads nothing has none.
            storage_data: Where each item lies, from the checkpoint's metadata.
            base_path: The checkpoint's URI.

        Raises:
            S3ConfigError: there are items, but `storage_data` is empty.
        """
        if plan_items and not storage_data:
            raise S3ConfigError("storage_data is empty: read the checkpoint's metadata first")
        self._plan = plan_items, storage_data, uri_text(base_path)
        self._item_ranges_by_file = None

    def _ranges(self) -> dict[str, list[ItemRange]]:
        # Made when the first reader is: the storage reader has the plan itself, and asks for none.
        if self._item_ranges_by_file is None:
            items, storage_data, base = self._plan
            ranges: dict[str, list[ItemRange]] = {}
            for item in items:
                stored = storage_data[item.storage_index]
                uri = join(base, stored.relative_path)
                span = ItemRange(stored.offset, stored.offset + stored.length)
                ranges.setdefault(uri, []).append(span)
            self._item_ranges_by_file = ranges
            _logger.debug("%d items in %d objects will be read", len(items), len(ranges))
        return self._item_ranges_by_file

    def __call__(
        self,
        bucket: str,
        key: str,
        get_object_info: Callable[[], ObjectInfoLike],
        get_stream: GetStreamCallable,
    ) -> S3Reader:
        """Return a reader of the object.

        Raises:
            S3ConfigError: no ranges were injected for it.
        """
        if key.endswith(".metadata"):
            return SequentialS3Reader(bucket, key, get_object_info, get_stream)
        uri = str(S3Uri(bucket, key))
        item_ranges = self._ranges().get(uri)
        if item_ranges is None:
            raise S3ConfigError(
                f"No ranges were injected for {uri}. {GUIDANCE}", bucket=bucket, key=key
            )
        return DCPOptimizedS3Reader(
            bucket, key, item_ranges, get_object_info, get_stream, self.max_gap_size
        )


class S3ReaderConstructor:
    """The choice of readers."""

    @staticmethod
    def sequential() -> S3ReaderConstructorProtocol:
        """Return a constructor for whole objects in any access pattern: `SequentialS3Reader`."""
        return partial(SequentialS3Reader)

    @staticmethod
    def range_based(buffer_size: int | None = None) -> S3ReaderConstructorProtocol:
        """Return a constructor for a few parts of large objects: `RangedS3Reader`.

        Args:
            buffer_size: Bytes to fetch for a small read. Default: 8 MiB; 0: no buffer.
        """
        return partial(RangedS3Reader, buffer_size=buffer_size)

    @staticmethod
    def dcp_optimized(
        max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    ) -> DCPS3ReaderConstructorProtocol:
        """Return a constructor for the items of a load plan: `DCPOptimizedS3Reader`.

        Args:
            max_gap_size: The most bytes to read in vain to save a request. A ceiling: more than
                a request costs are never wasted.

        Raises:
            S3ConfigError: `max_gap_size` is negative.
            TypeError: `max_gap_size` is not a number.
        """
        return DCPOptimizedConstructor(max_gap_size)

    @staticmethod
    def default() -> S3ReaderConstructorProtocol:
        """Return the constructor for when nothing is known of the accesses: `sequential()`."""
        return S3ReaderConstructor.sequential()

    @staticmethod
    def get_reader_type_string(constructor: S3ReaderConstructorProtocol | None) -> str:
        """Name a constructor's reader, for logs and the user agent.

        Returns:
            `sequential` (also for None), `range_based`, `dcp_optimized` or `unknown`.
        """
        if constructor is None:
            return "sequential"
        if isinstance(constructor, DCPOptimizedConstructor):
            return "dcp_optimized"
        if isinstance(constructor, partial):
            if constructor.func is SequentialS3Reader:
                return "sequential"
            if constructor.func is RangedS3Reader:
                return "range_based"
        return "unknown"
