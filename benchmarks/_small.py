"""The row of many small tensors, where requests and Python count for more than bytes."""

from __future__ import annotations

from benchmarks._figures import ratio, wall_s
from benchmarks._lab import Lab, Samples, alike
from benchmarks._values import BACKENDS, OURS, PLANNING, REFERENCE, SLOWEST, Chart, Section, Table


def small(lab: Lab) -> Section:
    """Load and save small tensors, beside all peers and DCP's own planning."""
    shape = lab.sizes.small
    backends = [OURS, REFERENCE, SLOWEST, "disk", PLANNING]

    def repeats(backend: str) -> int:
        # The difference of these two is a target, and a full collection comes with some runs only.
        return (2 if backend in {OURS, PLANNING} else 1) * lab.slowest_once(backend)

    with lab.server() as server, lab.clients(server, alike(backends, shape)) as clients:
        saves, loads = lab.save_and_load(clients, repeats)
    return Section(
        row="small",
        title="Small tensors",
        how=f"{shape} tensors. DCP's planning alone is measured with a writer and a reader that "
        "move nothing, not even the metadata.",
        table=_table(saves, loads),
        figures={**_figures("save", saves), **_figures("load", loads)},
        charts=[
            Chart(
                title="Small tensors",
                unit="s",
                groups={"load": _seconds(loads), "save": _seconds(saves)},
            )
        ],
        notes=lab.take_notes(),
    )


def _figures(operation: str, samples: Samples) -> dict[str, float]:
    ours_s = wall_s(samples[OURS])
    figures = {}
    if PLANNING in samples:
        figures[f"{operation}: beyond DCP's planning"] = ours_s - wall_s(samples[PLANNING])
    if REFERENCE in samples:
        times = ratio(wall_s(samples[REFERENCE]), ours_s)
        figures[f"{operation}: times faster than the reference"] = times
    return figures


def _seconds(samples: Samples) -> dict[str, float]:
    return {backend: wall_s(found) for backend, found in samples.items()}


def _table(saves: Samples, loads: Samples) -> Table:
    rows = [
        [
            BACKENDS[backend],
            f"{wall_s(load):.2f}",
            f"{wall_s(saves[backend]):.2f}",
            f"{load[0].requests}",
            f"{saves[backend][0].requests}",
            f"{len(load)}",
        ]
        for backend, load in loads.items()
    ]
    columns = ["", "load, s", "save, s", "requests to load", "requests to save", "runs"]
    return Table(columns=columns, rows=rows)
