"""Prefix strategies: a table of names, and the reference library's as a second opinion."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from s3dcp import _prefixes as ours
from s3dcp._errors import S3ConfigError


@pytest.fixture(scope="module")
def reference() -> Any:
    """The reference library's strategies; the package around them wants more installed."""
    package = pytest.importorskip("s3torchconnector")
    path = Path(package.__file__).parent / "dcp" / "s3_prefix_strategy.py"
    spec = spec_from_file_location("reference_prefix_strategies", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("strategy", "rank", "prefix"),
    [
        (ours.DefaultPrefixStrategy(), 7, "__7_"),
        (ours.BinaryPrefixStrategy(min_prefix_length=4, prefix_count=16), 8, "0001/__8_"),
        (ours.BinaryPrefixStrategy(min_prefix_length=1, prefix_count=4), 5, "10/__5_"),
        (ours.BinaryPrefixStrategy(3, 4, 2), 3, "1000/epoch_3/__3_"),
        (ours.HexPrefixStrategy(prefix_count=256), 0x1F, "f100000000/__31_"),
        (ours.HexPrefixStrategy(epoch_num=0, prefix_count=1), 9, "0000000000/epoch_0/__9_"),
        (ours.RoundRobinPrefixStrategy(["a", "b/c"]), 3, "b/c/__3_"),
        (ours.RoundRobinPrefixStrategy(["a"], epoch_num=2), 3, "a/epoch_2/__3_"),
    ],
)
def test_names(strategy: ours.S3PrefixStrategyBase, rank: int, prefix: str) -> None:
    assert strategy(rank) == strategy.generate_prefix(rank) == prefix
    assert pickle.loads(pickle.dumps(strategy))(rank) == prefix


@pytest.mark.parametrize("name", ["BinaryPrefixStrategy", "HexPrefixStrategy"])
def test_numeric_strategies_agree_with_the_reference(reference: Any, name: str) -> None:
    grid = itertools.product([None, 0, 7], [1, 3, 10], [None, 1, 2, 3, 16, 17, 300])
    for epoch, length, count in grid:
        mine = getattr(ours, name)(epoch, length, count)
        theirs = getattr(reference, name)(epoch, length, count)
        for attribute in ("base", "epoch_num", "min_prefix_len", "prefix_count", "prefix_map"):
            assert getattr(mine, attribute) == getattr(theirs, attribute)
        assert [mine(rank) for rank in range(40)] == [theirs(rank) for rank in range(40)]


@pytest.mark.parametrize("epoch", [None, 0, 7])
@pytest.mark.parametrize("prefixes", [["one"], ["a", "b", "c"]])
def test_round_robin_agrees_with_the_reference(
    reference: Any, prefixes: list[str], epoch: int | None
) -> None:
    mine = ours.RoundRobinPrefixStrategy(prefixes, epoch)
    theirs = reference.RoundRobinPrefixStrategy(prefixes, epoch)
    assert [mine(rank) for rank in range(9)] == [theirs(rank) for rank in range(9)]
    assert mine.user_prefixes == theirs.user_prefixes


class OctalPrefixStrategy(ours.NumericPrefixStrategy):
    """A user's own base."""

    def __init__(self) -> None:
        super().__init__(base=8, min_prefix_length=2, prefix_count=65)

    def _format_number(self, number: int, length: int) -> str:
        return f"{number:0{length}o}"


def test_a_base_of_ones_own() -> None:
    assert OctalPrefixStrategy()(9) == "110/__9_"


def test_a_strategy_of_ones_own_needs_no_constructor() -> None:
    class ByParity(ours.S3PrefixStrategyBase):
        def generate_prefix(self, rank: int) -> str:
            return f"{rank % 2}/{rank}_"

    assert ByParity()(3) == "1/3_"


def test_the_world_size_is_taken_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    strategy = ours.BinaryPrefixStrategy(min_prefix_length=1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    assert strategy.prefix_count == 4
    assert strategy(5) == "10/__5_"


def test_a_huge_count_costs_nothing() -> None:
    strategy = ours.HexPrefixStrategy(prefix_count=10**15)
    assert strategy(255) == "ff" + "0" * 11 + "/__255_"
    assert len(pickle.dumps(strategy)) < 1000


@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.BinaryPrefixStrategy(min_prefix_length=0),
        lambda: ours.BinaryPrefixStrategy(prefix_count=0),
        lambda: ours.BinaryPrefixStrategy(prefix_count=-1),
        lambda: ours.BinaryPrefixStrategy(prefix_count="3"),  # type: ignore[arg-type]
        lambda: ours.BinaryPrefixStrategy(epoch_num="3"),  # type: ignore[arg-type]
        lambda: ours.BinaryPrefixStrategy(epoch_num=1.5),  # type: ignore[arg-type]
        lambda: ours.BinaryPrefixStrategy(epoch_num=True),
        lambda: ours.RoundRobinPrefixStrategy([]),
        lambda: ours.RoundRobinPrefixStrategy("ab"),
        lambda: ours.RoundRobinPrefixStrategy(["a"], epoch_num=False),
    ],
)
def test_refused_arguments(make: Callable[[], Any]) -> None:
    with pytest.raises(S3ConfigError) as caught:
        make()
    assert isinstance(caught.value, ValueError)


def test_a_base_needs_two_digits() -> None:
    class Unary(OctalPrefixStrategy):
        def __init__(self) -> None:
            ours.NumericPrefixStrategy.__init__(self, base=1, prefix_count=2)

    with pytest.raises(S3ConfigError, match="base"):
        Unary()


def test_the_bases_are_abstract() -> None:
    for base in (ours.S3PrefixStrategyBase, ours.NumericPrefixStrategy):
        with pytest.raises(TypeError, match="abstract"):
            base()  # type: ignore[abstract, call-arg]
