"""What benchmarks decide and print; and one small run of all of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _figures, _records
from benchmarks.__main__ import main
from benchmarks._page import page, printed
from benchmarks._remarks import REMARKS
from benchmarks._rows import ROWS
from benchmarks._targets import TARGETS, Outcome, Target, check
from benchmarks._values import Chart, GiB, MiB, Report, Sample, Section, Shape, Table

_ROOT = Path(__file__).parents[1]
_RUN_TIMEOUT_S = 200.0


def _sample(wall_s: float = 1.0, cpu_s: float = 1.0, nbytes: int = GiB) -> Sample:
    return Sample(wall_s=wall_s, cpu_s=cpu_s, nbytes=nbytes)


# Figures.


@pytest.mark.parametrize(
    ("walls_s", "expected"),
    [([2.0], 1.0), ([4.0, 2.0, 1.0], 1.0), ([1.0, 4.0], 0.8), ([0.5, 0.5, 9.0], 4.0)],
)
def test_a_rate_is_that_of_the_median_time(walls_s: list[float], expected: float) -> None:
    samples = [_sample(wall_s=wall_s, nbytes=2 * GiB) for wall_s in walls_s]
    assert _figures.gib_per_s(samples) == pytest.approx(expected)


def test_cpu_seconds_are_those_of_a_gibibyte() -> None:
    samples = [_sample(cpu_s=cpu_s, nbytes=GiB // 2) for cpu_s in (0.1, 0.2, 0.9)]
    assert _figures.cpu_s_per_gib(samples) == pytest.approx(0.4)


def test_bytes_moved_are_those_of_the_worst_sample() -> None:
    samples = [
        Sample(wall_s=1, cpu_s=1, nbytes=100, received_bytes=received) for received in (105, 150)
    ]
    assert _figures.moved(samples) == 1.5


@pytest.mark.parametrize(
    ("peaks", "expected"), [([MiB, 3 * MiB], 3.0), ([None, 2 * MiB], 2.0), ([0], 0.0)]
)
def test_the_peak_is_the_highest_known(peaks: list[int | None], expected: float) -> None:
    samples = [Sample(wall_s=1, cpu_s=1, nbytes=1, peak_bytes=peak) for peak in peaks]
    assert _figures.peak_mib(samples) == expected


def test_a_peak_that_nobody_knows_is_no_number() -> None:
    assert math.isnan(_figures.peak_mib([_sample()]))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(3.0, 2.0, 1.5), (0.0, 2.0, 0.0), (1.0, 0.0, math.inf)]
)
def test_ratio(ours: float, theirs: float, expected: float) -> None:
    assert _figures.ratio(ours, theirs) == expected


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(1, 0.99, 1), (100, 0.99, 99), (100, 0.5, 50), (101, 0.5, 51), (10, 0.0, 1), (10, 1.0, 10)],
)
def test_a_percentile_is_the_nearest_rank(count: int, fraction: float, expected: int) -> None:
    assert _figures.percentile(list(range(count, 0, -1)), fraction) == expected


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        _figures.percentile([], 0.5)


# Targets.


@pytest.mark.parametrize(
    ("comparison", "value", "reached", "missed_by"),
    [
        ("at least", 2.0, True, 0.0),
        ("at least", 1.5, False, 0.25),
        ("at least", 3.0, True, 0.0),
        ("at most", 2.0, True, 0.0),
        ("at most", 3.0, False, 0.5),
        ("at most", -1.0, True, 0.0),
        ("more than", 2.0, False, 0.0),
        ("more than", 2.1, True, 0.0),
        ("at least", None, None, 0.0),
    ],
)
def test_a_target_is_held_against_its_figure(
    comparison: str, value: float | None, reached: bool | None, missed_by: float
) -> None:
    target = Target("row", "metric", comparison, 2.0)  # type: ignore[arg-type]
    outcome = Outcome(target, value)
    assert outcome.reached is reached
    assert outcome.missed_by == pytest.approx(missed_by)


def test_a_figure_that_is_missing_or_no_number_is_not_measured() -> None:
    targets = [Target("row", name, "at most", 1.0) for name in ("here", "nan", "missing")]
    outcomes = check({("row", "here"): 0.5, ("row", "nan"): math.nan, ("other", "x"): 1}, targets)
    assert [outcome.value for outcome in outcomes] == [0.5, None, None]


def test_targets_and_remarks_name_rows_and_metrics_once() -> None:
    names = [(target.row, target.metric) for target in TARGETS]
    assert len(set(names)) == len(names)
    # Of an accelerator, figures are wanted, and no bounds.
    assert {row for row, _ in names} == ROWS.keys() - {"accelerator"} | {"memory"}
    assert REMARKS.keys() <= set(names)


# Shapes, pages.


@pytest.mark.parametrize(
    ("shape", "text"),
    [(Shape(64, 16 * MiB), "64 x 16 MiB"), (Shape(5_000, 20 << 10), "5,000 x 20 KiB")],
)
def test_a_shape_says_what_it_is(shape: Shape, text: str) -> None:
    assert str(shape) == text
    assert shape.times(4).total_bytes == 4 * shape.total_bytes


_FIGURES = {"load: cpu-s/GiB": 0.5, "save: cpu-s/GiB": 0.975}


def _report(*, quick: bool = False, notes: list[str] | None = None) -> Report:
    section = Section(
        row="bulk",
        title="Large tensors",
        how="Some of them.",
        table=Table(columns=["", "load"], rows=[["s3dcp", "2.00"], ["raw sockets", "10.00"]]),
        figures=_FIGURES,
        charts=[Chart(title="Rates", unit="GiB/s", groups={"load": {"s3dcp": 2.0}})],
        notes=notes or [],
    )
    return Report(facts={"Date": "today", "Commit": "abc"}, quick=quick, sections=[section])


def test_the_page_tells_figures_targets_and_what_is_missed() -> None:
    text = page(_report(), "results.png")
    assert "![Figures of every row](results.png)" in text
    assert "- Commit: abc" in text
    assert "| s3dcp | 2.00 |" in text
    assert "| bulk: load: cpu-s/GiB | 0.50 | at most 0.55 | yes |" in text
    assert "| bulk: save: cpu-s/GiB | 0.97 | at most 0.65 | **no** |" in text
    assert "- bulk, save: cpu-s/GiB: 0.97 where at most 0.65 is wanted, off by 50%." in text
    assert "not measured" in text  # of the row's other targets
    assert "tls" not in text.partition("## How it was measured")[0]
    assert "quick run" not in text
    assert "could not be compared" not in text


def test_the_page_tells_a_quick_run_and_what_could_not_be_compared() -> None:
    text = page(_report(quick=True, notes=["s3fs is left out."]), "results.png")
    assert "Its figures mean nothing" in text
    assert "- Large tensors: s3fs is left out." in text


def test_what_is_printed_is_aligned() -> None:
    lines = printed(_report(notes=["s3fs is left out."])).splitlines()
    assert lines[:5] == [
        "Large tensors",
        "              load",
        "s3dcp         2.00",
        "raw sockets  10.00",
        "s3fs is left out.",
    ]


def test_a_report_survives_its_record() -> None:
    assert _records.load(_records.dump(_report())) == _report()


# The run.


@pytest.mark.skipif(sys.platform != "linux", reason="the other systems are not benched on")
@pytest.mark.timeout(_RUN_TIMEOUT_S + 20)
def test_every_row_runs(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--output", str(target)],
        cwd=_ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=_RUN_TIMEOUT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-8000:]

    report = _records.load((tmp_path / "results.json").read_text())
    assert {section.row for section in report.sections} == ROWS.keys() | {"memory"}
    without = set() if torch.accelerator.is_available() else {"accelerator"}
    assert {section.row for section in report.sections if section.notes} == without
    unmeasured = [each.target for each in check(report.figures()) if each.value is None]
    assert unmeasured == []
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert target.read_text() == page(report, "results.png")
    for section in report.sections:
        assert section.title in ran.stdout
        assert section.table.rows or section.row in without


def test_a_row_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


def test_a_page_is_written_again_from_its_record(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    (tmp_path / "results.json").write_text(_records.dump(_report()))
    main(["--render", "--output", str(target)])
    assert target.read_text() == page(_report(), "results.png")
    assert (tmp_path / "results.png").exists()
