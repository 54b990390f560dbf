"""The command `bench`: saves and loads against the user's own store, as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from s3dcp._bench import Summary, Trial, fastest, run_trials, settings_of, summaries_of
from s3dcp._options import as_json_option, on_store, size
from s3dcp._plots import plotter, setting_of
from s3dcp._terminal import Bar, counts_of, print_json, print_table, shown_size


@click.command()
@click.argument("uri")
@on_store
@click.option(
    "--size", "size_bytes", type=size, default="256MiB", show_default=True, help="Of a checkpoint."
)
@click.option(
    "--tensors", type=click.IntRange(min=1), default=16, show_default=True, help="How many."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Saves and loads with each setting.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=1),
    multiple=True,
    help="A setting to try. [repeatable; default: s3dcp's own]",
)
@click.option(
    "--part-size",
    "part_sizes",
    type=size,
    multiple=True,
    help="A setting to try, such as 16MiB. [repeatable; default: s3dcp's own]",
)
@as_json_option
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw it to a file.")
def bench(
    uri: str,
    store: dict[str, Any],
    *,
    size_bytes: int,
    tensors: int,
    repeats: int,
    connections: Sequence[int],
    part_sizes: Sequence[int],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Tell how fast saves and loads below URI are.

    Checkpoints are made up for it, in a new folder that is removed in the end, after Ctrl-C too.
    """
    draw = plotter(plot) if plot else None
    settings = settings_of(store["s3client_config"], connections, part_sizes)
    with Bar() as bar:
        trials = run_trials(
            uri,
            settings,
            size_bytes=size_bytes,
            tensors=tensors,
            repeats=repeats,
            region=store["region"],
            progress=bar.advance,
        )
    summaries = summaries_of(trials)
    if as_json:
        print_json([_trial_as_dict(trial) for trial in trials])
    else:
        _print(summaries)
    if draw:  # last: what was measured is not lost if it fails
        draw(summaries)


def _print(summaries: Sequence[Summary]) -> None:
    print_table(
        (
            *(
                "OPERATION",
                ">CONNECTIONS",
                ">PART SIZE",
                ">GIB/S",
                ">(LEAST",
                ">MOST)",
                ">CPU-S/GIB",
            ),
            *(">REQUESTS", ">P50 MS", ">P99 MS", ">RETRIES", ">THROTTLES"),
        ),
        [_summary_row(summary) for summary in summaries],
    )
    if len({(each.first.connections, each.first.part_bytes) for each in summaries}) > 1:
        for operation in ("save", "load"):
            best = fastest(summaries, operation)
            click.echo(f"Of these, the fastest {operation} was with {setting_of(best.first)}")


def _trial_as_dict(trial: Trial) -> dict[str, Any]:
    return {
        "operation": trial.operation,
        "connections": trial.connections,
        "part_bytes": trial.part_bytes,
        "size_bytes": trial.size_bytes,
        "wall_s": trial.wall_s,
        "cpu_s": trial.cpu_s,
        "gib_per_s": trial.gib_per_s,
        "cpu_s_per_gib": trial.cpu_s_per_gib,
        "requests": counts_of(trial.requests),
    }


def _summary_row(summary: Summary) -> tuple[object, ...]:
    speeds = [trial.gib_per_s for trial in summary.trials]
    requests = summary.requests
    return (
        summary.first.operation,
        summary.first.connections,
        shown_size(summary.first.part_bytes),
        *(f"{speed:.3g}" for speed in (summary.gib_per_s, min(speeds), max(speeds))),
        f"{summary.cpu_s_per_gib:.3g}",
        requests.requests,
        *(f"{requests.quantile_s(share) * 1000:.3g}" for share in (0.5, 0.99)),
        requests.retries,
        requests.throttles,
    )
