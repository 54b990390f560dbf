"""The picture: a panel of bars for every chart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._values import BACKENDS, Chart, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "s3dcp": "#0b6e4f",
    "s3torchconnector": "#e08e45",
    "s3fs": "#8d6a9f",
    "disk": "#8c8c8c",
    "raw": "#c9c9c9",
    "planning": "#5b8fb9",
}
_COLUMNS = 2
#: Bars that differ by more than this are drawn on a logarithmic scale.
_MAX_LINEAR = 50
_PANEL_INCHES = (6.0, 3.2)


def draw(report: Report, path: Path) -> None:
    """Draw every chart of a report into a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    charts = [chart for section in report.sections for chart in section.charts]
    if not charts:
        return
    lines = -(-len(charts) // _COLUMNS)
    width, height = _PANEL_INCHES
    figure, axes = plt.subplots(
        lines, _COLUMNS, figsize=(width * _COLUMNS, height * lines), squeeze=False
    )
    for axis, chart in zip(axes.flat, charts, strict=False):
        _panel(axis, chart)
    for axis in axes.flat[len(charts) :]:
        axis.axis("off")
    shown = dict.fromkeys(name for c in charts for group in c.groups.values() for name in group)
    figure.legend(
        handles=[Patch(color=_COLOURS[name], label=BACKENDS[name]) for name in shown],
        loc="lower center",
        ncols=3,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.5 / (height * lines), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, chart: Chart) -> None:
    backends = list(dict.fromkeys(name for group in chart.groups.values() for name in group))
    width = 0.8 / len(backends)
    for place, backend in enumerate(backends):
        at = [n + (place - (len(backends) - 1) / 2) * width for n in range(len(chart.groups))]
        heights = [group.get(backend, 0.0) for group in chart.groups.values()]
        bars = axis.bar(at, heights, width * 0.92, color=_COLOURS[backend])
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    values = [value for group in chart.groups.values() for value in group.values() if value > 0]
    if values and max(values) > _MAX_LINEAR * min(values):
        axis.set_yscale("log")
    axis.set_xticks(range(len(chart.groups)), list(chart.groups))
    axis.set_ylabel(chart.unit)
    axis.set_title(chart.title, fontsize=10)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
