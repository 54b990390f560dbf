"""Prefix strategies: which part of the key space each rank writes to.

S3 scales by key prefix, so ranks that differ in the first characters of their keys spread over
more of its partitions. A strategy only computes names; the writer calls it with a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeGuard

import torch.distributed as dist

from s3dcp._errors import S3ConfigError


class S3PrefixStrategyBase(ABC):
    """Names the objects of a rank. Subclasses override `generate_prefix`; instances are callables.

    A strategy travels with its writer to other processes, so it has to pickle.
    """

    def __call__(self, rank: int) -> str:
        """Return the prefix of a rank's objects."""
        return self.generate_prefix(rank)

    @abstractmethod
    def generate_prefix(self, rank: int) -> str:
        """Return the prefix of a rank's objects, relative to the checkpoint."""


class DefaultPrefixStrategy(S3PrefixStrategyBase):
    """Names objects by rank alone: `__{rank}_`."""

    def generate_prefix(self, rank: int) -> str:
        """Return `__{rank}_`."""
        return _rank_name(rank, None)


class NumericPrefixStrategy(S3PrefixStrategyBase):
    """Puts the reversed digits of a number in front: `{digits}/[epoch_{n}/]__{rank}_`.

    Reversed, because then neighbouring ranks differ in the first character already.

    Args:
        base: The numbers' base.
        epoch_num: An epoch to name, if any.
        min_prefix_length: Least number of digits; filled up with zeros at the end.
        prefix_count: Number of different prefixes, which ranks share in turn. Default: the world
            size, or 1 outside of a process group. Fixed at construction.

    Raises:
        S3ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        base: int,
        epoch_num: int | None = None,
        min_prefix_length: int = 10,
        prefix_count: int | None = None,
    ) -> None:
        super().__init__()
        _check_whole_number("base", base, at_least=2)
        _check_whole_number("min_prefix_length", min_prefix_length, at_least=1)
        _check_epoch(epoch_num)
        if prefix_count is None:
            prefix_count = _world_size()
        _check_whole_number("prefix_count", prefix_count, at_least=1)
        self.base = base
        self.epoch_num = epoch_num
        self.min_prefix_len = min_prefix_length
        self.prefix_count = prefix_count

    @property
    def prefix_map(self) -> list[str]:
        """All the digits, by number. Made anew on each access: there can be very many."""
        return [self._digits(number) for number in range(self.prefix_count)]

    def generate_prefix(self, rank: int) -> str:
        """Return `{digits}/[epoch_{n}/]__{rank}_`."""
        return f"{self._digits(rank % self.prefix_count)}/{_rank_name(rank, self.epoch_num)}"

    def _digits(self, number: int) -> str:
        return self._format_number(number, self._digit_count())[::-1]

    def _digit_count(self) -> int:
        needed, numbers = 1, self.base
        while numbers < self.prefix_count:
            needed += 1
            numbers *= self.base
        return max(needed, self.min_prefix_len)

    @abstractmethod
    def _format_number(self, number: int, length: int) -> str:
        """Return `number` in the strategy's base, with zeros in front up to `length` digits."""


class BinaryPrefixStrategy(NumericPrefixStrategy):
    """Numeric prefixes of the digits 0 and 1; see `NumericPrefixStrategy`."""

    def __init__(
        self,
        epoch_num: int | None = None,
        min_prefix_length: int = 10,
        prefix_count: int | None = None,
    ) -> None:
        super().__init__(2, epoch_num, min_prefix_length, prefix_count)

    def _format_number(self, number: int, length: int) -> str:
        return f"{number:0{length}b}"


class HexPrefixStrategy(NumericPrefixStrategy):
    """Numeric prefixes of the digits 0 to f; see `NumericPrefixStrategy`."""

    def __init__(
        self,
        epoch_num: int | None = None,
        min_prefix_length: int = 10,
        prefix_count: int | None = None,
    ) -> None:
        super().__init__(16, epoch_num, min_prefix_length, prefix_count)

    def _format_number(self, number: int, length: int) -> str:
        return f"{number:0{length}x}"


class RoundRobinPrefixStrategy(S3PrefixStrategyBase):
    """Deals the user's own prefixes out to the ranks: `{prefix}/[epoch_{n}/]__{rank}_`.

    Args:
        user_prefixes: The prefixes, at least one.
        epoch_num: An epoch to name, if any.

    Raises:
        S3ConfigError: no prefix, a single string instead of several, or no epoch number.
    """

    def __init__(self, user_prefixes: Sequence[str], epoch_num: int | None = None) -> None:
        super().__init__()
        if not user_prefixes:
            raise S3ConfigError("user_prefixes must name at least one prefix")
        if isinstance(user_prefixes, str):
            raise S3ConfigError(
                f"user_prefixes must be a list of prefixes: write [{user_prefixes!r}]"
            )
        _check_epoch(epoch_num)
        self.user_prefixes = list(user_prefixes)
        self.epoch_num = epoch_num

    def generate_prefix(self, rank: int) -> str:
        """Return `{prefix}/[epoch_{n}/]__{rank}_`."""
        prefix = self.user_prefixes[rank % len(self.user_prefixes)]
        return f"{prefix}/{_rank_name(rank, self.epoch_num)}"


def _rank_name(rank: int, epoch_num: int | None) -> str:
    epoch = "" if epoch_num is None else f"epoch_{epoch_num}/"
    return f"{epoch}__{rank}_"


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_epoch(epoch_num: object) -> None:
    # A negative epoch is odd, but names a folder as well as any other.
    if epoch_num is not None and not _is_whole(epoch_num):
        raise S3ConfigError(f"epoch_num must be a whole number or None, got {epoch_num!r}")


def _check_whole_number(name: str, value: object, *, at_least: int) -> None:
    if not _is_whole(value) or value < at_least:
        raise S3ConfigError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


def _is_whole(value: object) -> TypeGuard[int]:
    # True would make a folder named `epoch_True`.
    return isinstance(value, int) and not isinstance(value, bool)
