"""The page that a run writes, and the table that it prints. Pure: text from a report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from benchmarks._remarks import REMARKS
from benchmarks._targets import Outcome, check
from benchmarks._values import Report, Section, Table

_WIDTH = 100
_WORDS = {True: "yes", False: "**no**", None: "not measured"}

_INTRODUCTION = """\
# Benchmarks

<!-- Written by `make bench`. Change benchmarks/_page.py, or benchmarks/_remarks.py, instead. -->

s3dcp beside the reference library (s3torchconnector), torch's `FsspecWriter` and `FsspecReader` on
s3fs, torch's `FileSystemWriter` and `FileSystemReader` on a RAM disk, and raw sockets: all in one
run, on one machine, against one server.
"""

_QUICK = """
**This was a quick run: it shows that everything runs. Its figures mean nothing.**
"""

_METHOD = """\
## How it was measured

{facts}

- The server is `s3dcp.testing.FakeS3`, in a process of its own, one for each row: S3 in memory,
  which verifies signatures and checksums. It shares the cores with the client, whoever that is.
  What is saved goes to a prefix that the server drops bodies of, but for the one checkpoint that
  is loaded.
- Every backend has a process of its own for each row. What is measured is one `dcp.save` or
  `dcp.load` in it, with a writer or reader made just before. Backends take turns, so that all see
  the same machine. Figures are medians, the first run of a process included. s3fs has fewer runs
  than the others, as it takes several times as long. Of small tensors s3dcp and the planning alone
  have twice as many, the second half by themselves.
- Python's garbage collector runs when it is due, as in a training script. Only before the row of
  disturbance, and between a save that is kept and the first load, is there a full collection.
- Of each tensor of a backend's first load a CRC is compared with that of what was saved.
- cpu-s/GiB is user and system time of the client's process and its children.
- All run with their default settings, but for two. Addresses are path-style. s3fs sends no
  checksums, which spares it some time: botocore's default is refused by strict servers where an
  upload was begun as s3fs does. s3dcp's uploads carry CRC64NVME, and its loads verify the CRCs in
  the metadata.

To run it: `make bench`. It needs nothing but this repository, and some ten minutes on two idle
cores. `{python} -m benchmarks --help` lists the options.
"""


def page(report: Report, plot: str) -> str:
    """Return the page.

    Args:
        report: What was found.
        plot: The picture's path, as seen from the page.
    """
    outcomes = _outcomes(report)
    facts = "\n".join(f"- {name}: {value}" for name, value in report.facts.items())
    parts = [
        _INTRODUCTION + (_QUICK if report.quick else ""),
        f"![Figures of every row]({plot})\n" if any(s.charts for s in report.sections) else "",
        "## Targets\n\n" + _markdown(_targets_table(outcomes)),
        _missed(outcomes, REMARKS),
        _METHOD.format(facts=facts, python=".venv/bin/python"),
        *(_section(section) for section in report.sections),
        _limits(report.sections),
    ]
    return "\n".join(part for part in parts if part)


def printed(report: Report) -> str:
    """Return the tables as they are printed: every section's, then the targets."""
    parts = []
    for section in report.sections:
        table = [_aligned(section.table)] if section.table.rows else []
        parts += [section.title, *table, *section.notes, ""]
    parts += ["Targets", _aligned(_targets_table(_outcomes(report)))]
    return "\n".join(parts).replace("**", "")


def _outcomes(report: Report) -> list[Outcome]:
    measured = {section.row for section in report.sections}
    return [each for each in check(report.figures()) if each.target.row in measured]


def _targets_table(outcomes: Sequence[Outcome]) -> Table:
    rows = []
    for outcome in outcomes:
        target = outcome.target
        value = "" if outcome.value is None else _number(outcome.value, target.unit)
        bound = f"{target.comparison} {_number(target.bound, target.unit)}"
        rows.append([f"{target.row}: {target.metric}", value, bound, _WORDS[outcome.reached]])
    return Table(columns=["", "measured", "target", "reached"], rows=rows)


def _missed(outcomes: Sequence[Outcome], remarks: Mapping[tuple[str, str], str]) -> str:
    """Say by how much each target is missed, and what is known of it."""
    missed = [outcome for outcome in outcomes if outcome.reached is False]
    if not missed:
        return "Every target that was measured is reached.\n"
    lines = ["## Not reached", ""]
    for outcome in missed:
        target, value = outcome.target, outcome.value
        assert value is not None
        lines.append(
            f"- {target.row}, {target.metric}: {_number(value, target.unit)} where "
            f"{target.comparison} {_number(target.bound, target.unit)} is wanted, off by "
            f"{outcome.missed_by:.0%}."
        )
        if remark := remarks.get((target.row, target.metric)):
            lines.append(f"  {remark}")
    return "\n".join(lines) + "\n"


def _section(section: Section) -> str:
    how = textwrap.fill(section.how, _WIDTH)
    table = f"\n{_markdown(section.table)}" if section.table.rows else ""
    return f"## {section.title}\n\n{how}\n{table}"


def _limits(sections: Sequence[Section]) -> str:
    notes = [f"- {section.title}: {note}" for section in sections for note in section.notes]
    return "\n".join(["## What could not be compared", "", *notes, ""]) if notes else ""


def _markdown(table: Table) -> str:
    rule = ["---"] + ["---:"] * (len(table.columns) - 1)
    lines = [table.columns, rule, *table.rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _aligned(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _number(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 else 2
    return f"{value:.{digits}f} {unit}".rstrip()
