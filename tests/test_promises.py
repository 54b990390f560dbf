"""The page of promises: its tests exist, and there are as many as it says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.test_crash import KILLS_IN_A_ROW, KILLS_OF_ONE, KILLS_OF_TWO, LATE_COMMITS, TARGETS

_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "PROMISES.md"
_NAME = re.compile(r"`(test_\w+)`")
_COUNTED = re.compile(r"^\|[^|]+\| (\d+) tests \| (.+) \|$", re.MULTILINE)


_CRASHES = re.compile(r"^\| crashes survived: [^|]+ \| (\d+) \|", re.MULTILINE)


def test_as_many_crashes_as_it_counts() -> None:
    at_requests, others = map(int, _CRASHES.findall(_PAGE.read_text(encoding="utf-8")))
    kills = sum(KILLS_OF_ONE.values()) + sum(KILLS_OF_TWO.values())
    assert at_requests == len(TARGETS) * kills
    assert others == len(TARGETS) * KILLS_IN_A_ROW + len(LATE_COMMITS)


def test_every_test_that_it_names_exists() -> None:
    names = set(_NAME.findall(_PAGE.read_text(encoding="utf-8")))
    assert names
    assert [name for name in names if not (_ROOT / "tests" / f"{name}.py").is_file()] == []


def test_every_promise_names_a_test() -> None:
    text = _PAGE.read_text(encoding="utf-8")
    rows = text.partition("## Promises")[2].partition("## ")[0].splitlines()
    promises = [row for row in rows if row.startswith("| **")]
    assert promises
    assert all(_NAME.search(row) for row in promises)


def test_there_are_as_many_as_it_counts() -> None:
    rows = [
        (int(count), _NAME.findall(names))
        for count, names in _COUNTED.findall(_PAGE.read_text(encoding="utf-8"))
    ]
    assert rows
    files = [str(_ROOT / "tests" / f"{name}.py") for _, names in rows for name in names]
    found: Counter[str] = Counter()

    class Counting:
        def pytest_itemcollected(self, item: pytest.Item) -> None:
            found[item.path.stem] += 1

    # In this process, which has imported them if it runs them, too.
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", *files]
    assert pytest.main(arguments, plugins=[Counting()]) == pytest.ExitCode.OK
    assert [(sum(found[name] for name in names), names) for _, names in rows] == rows
