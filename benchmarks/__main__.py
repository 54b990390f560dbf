"""`python -m benchmarks`: run everything, print the tables, write the page and the plot."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import _records
from benchmarks._facts import facts
from benchmarks._lab import Lab
from benchmarks._page import page, printed
from benchmarks._plot import draw
from benchmarks._rows import ROWS
from benchmarks._sizes import FULL, QUICK, Sizes
from benchmarks._values import Report

_PAGE = Path(__file__).parent / "README.md"
#: What the targets are stated for.
_CORES = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _options(arguments)
    target = options.output or _PAGE
    record = target.parent / "results.json"
    if options.render:
        report = _records.load(record.read_text())
    else:
        report = _run(options)
        print(printed(report))
        if options.output is None and (options.quick or options.only):
            return  # no page of a part is to take the place of the whole one
        record.write_text(_records.dump(report))
    plot = target.parent / "results.png"
    draw(report, plot)
    target.write_text(page(report, plot.name))
    _say(f"written: {target}, {plot}, {record}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, once: to see that everything runs"
    )
    parser.add_argument(
        "--only", action="append", choices=ROWS, metavar="ROW", help=f"one of {', '.join(ROWS)}"
    )
    parser.add_argument("--repeat", type=int, help="how often each thing is measured")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="the page; its plot and record go beside it. By default benchmarks/README.md, and "
        "with --quick or --only none is written",
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="write the page again, from the results.json beside it",
    )
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> Report:
    # Ended like this too, workers, servers and the RAM disk's files go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _keep_to_cores(_CORES)
    started = facts(datetime.now(UTC))
    sizes = _sizes(QUICK if options.quick else FULL, options.repeat)
    sections = []
    with (
        TemporaryDirectory(prefix="s3dcp-bench-") as folder,
        closing(Lab(sizes, Path(folder), shared=options.quick, say=_say)) as lab,
    ):
        for row in options.only or ROWS:
            start_s = time.perf_counter()
            sections += ROWS[row](lab)
            _say(f"{row}: {time.perf_counter() - start_s:.0f} s")
    return Report(facts=started, quick=options.quick, sections=sections)


def _sizes(sizes: Sizes, repeat: int | None) -> Sizes:
    if repeat is None:
        return sizes
    return dataclasses.replace(sizes, repeat=repeat, repeat_growth=repeat)


def _keep_to_cores(count: int) -> None:
    """Keep this process and all that it starts to some cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
