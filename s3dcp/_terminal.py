"""What the command line prints: tables, JSON, sizes, bars."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from s3dcp._tally import OperationTotals

if TYPE_CHECKING:
    from typing import Self


class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    """Shown on a terminal while something is under way, and taken away at its end."""

    monitor_interval = 0  # no thread that looks after bars

    def __init__(self, unit: str = "B") -> None:  # bytes, unless it says otherwise
        super().__init__(unit=unit, unit_scale=True, unit_divisor=1024, disable=None, leave=False)
        self._logging = ExitStack()
        self._what = ""

    def __enter__(self) -> Self:
        if not self.disable:  # what is logged meanwhile gets lines of its own, above it
            self._logging.enter_context(logging_redirect_tqdm(tqdm_class=Bar))
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        self._logging.close()

    def advance(self, count: int, total: int, what: str = "") -> None:
        """Take note of so many more, of so many in all; something else starts anew."""
        if what != self._what:
            self._what = what
            self.set_description(what, refresh=False)
            self.reset(total)
        self.total = total
        self.update(count)


def print_json(value: object) -> None:
    """Print a value."""
    click.echo(json.dumps(value, indent=2))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; those whose head starts with `>` to the right."""
    cells = [[plain(str("-" if cell is None else cell)) for cell in row] for row in rows]
    table = [[head.lstrip(">") for head in heads], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        padded = (
            cell.rjust(width) if head.startswith(">") else cell.ljust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def counts_of(totals: OperationTotals) -> dict[str, Any]:
    """Return what is known of requests, for JSON."""
    counts = dataclasses.asdict(totals)
    del counts["buckets"]
    return counts | {"p50_s": totals.quantile_s(0.5), "p99_s": totals.quantile_s(0.99)}


def shown_size(size_bytes: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} TiB"


def plain(text: str) -> str:
    """Return text on one line that cannot steer a terminal: names come from the bucket."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
