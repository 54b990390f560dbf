"""What `bench` measured, drawn by matplotlib, which is imported only then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from s3dcp._bench import Summary, Trial
from s3dcp._options import Failure
from s3dcp._terminal import shown_size

_COLORS = {"save": "tab:orange", "load": "tab:blue"}


def plotter(path: Path) -> Callable[[Sequence[Summary]], None]:
    """Return what draws to a file, so that what keeps it from that is known beforehand.

    Raises:
        Failure: matplotlib is missing, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as exc:
        raise Failure('--plot needs matplotlib: pip install "s3dcp[bench]"') from exc
    figure = Figure(figsize=(8, 5), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise Failure(f"--plot {path}: the name must end in one of {', '.join(sorted(formats))}")
    if not path.absolute().parent.is_dir():
        raise Failure(f"--plot {path}: there is no such folder")

    def draw(summaries: Sequence[Summary]) -> None:
        axes = figure.add_subplot()
        settings = list(dict.fromkeys(setting_of(each.first) for each in summaries))
        for each in summaries:
            shift = -0.2 if each.first.operation == "save" else 0.2
            x = settings.index(setting_of(each.first)) + shift
            color = _COLORS[each.first.operation]
            axes.bar(x, each.gib_per_s, width=0.36, color=color, alpha=0.5)
            speeds = [trial.gib_per_s for trial in each.trials]
            axes.plot([x] * len(speeds), speeds, "o", color=color)
        for operation, color in _COLORS.items():
            axes.bar(0, 0, color=color, alpha=0.5, label=operation)
        axes.set_xticks(range(len(settings)), [name.replace(", ", "\n") for name in settings])
        axes.set_ylabel("GiB/s: each trial, and the median")
        first = summaries[0].first
        axes.set_title(f"s3dcp bench: checkpoints of {shown_size(first.size_bytes)}")
        axes.margins(y=0.2)
        axes.legend(loc="upper center", ncols=2)
        figure.savefig(path)

    return draw


def setting_of(trial: Trial) -> str:
    """Return what a trial was made with, in words."""
    return f"{trial.connections} connections, parts of {shown_size(trial.part_bytes)}"
