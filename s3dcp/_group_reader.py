"""The reader of `s3dcp.load`: `.metadata` is read by one rank for all, and its errors are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from s3dcp._commit import Found
from s3dcp._errors import CheckpointNotFoundError
from s3dcp._metadata import dismantle_metadata
from s3dcp._reader import S3StorageReader

T = TypeVar("T")

_COORDINATOR = 0  # DCP's own, as a rank of the group


class MetadataError(BaseException):
    """Carries an error out of `read_metadata`.

    torch makes one text of all that is an `Exception` there.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class GroupReader(S3StorageReader):
    """A reader whose errors in reading `.metadata` are not lost, and that may read it for a group.

    `S3StorageReader` itself cannot: torch does not tell it of the group before it reads, nor
    whether the others read as well.
    """

    _shared = False
    _group: dist.ProcessGroup | None = None

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Have `.metadata` read once, by the group's coordinator: all ranks read it together."""
        self._shared, self._group = True, group

    def _find(self, rank: int | None) -> Found | None:
        find = partial(super()._find, rank)
        if self._shared and rank is None:
            return from_coordinator(find, self._group)
        return find()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return super().read_metadata(*args, **kwargs)
        except CheckpointNotFoundError as exc:
            if kwargs.get("rank") is None:
                # torch asks for the rank's own then, as it does after an error, which it would log
                # with its traceback.
                return None  # type: ignore[return-value]
            raise MetadataError(exc) from exc
        except Exception as exc:
            raise MetadataError(exc) from exc

    def let_go(self) -> None:
        """Free the metadata bit by bit, once nobody else has a use for it."""
        if self._metadata is not None:
            dismantle_metadata(self._metadata)


def from_coordinator(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Return on every rank of a group what a function returns on its coordinator.

    All ranks come here together, and all leave: what the coordinator's raises is sent as well.

    Args:
        function: What it returns and raises can be pickled. Other ranks do not call it.
        group: None for the default one.

    Raises:
        BaseException: whatever the function raised, on every rank.
    """
    outcome: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if dist.get_rank(group) == _COORDINATOR:
        outcome = [_outcome(function)]
    dist.broadcast_object_list(outcome, group=group, group_src=_COORDINATOR)
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # without an error, there is one


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return function(), None
    except BaseException as exc:  # noqa: BLE001 - an interrupt, too, must not leave others waiting
        return None, exc
