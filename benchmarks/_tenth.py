"""The row of partial loads: every tenth tensor of a checkpoint."""

from __future__ import annotations

from benchmarks._figures import moved, ratio, wall_s
from benchmarks._lab import Client, Lab, Samples, alike
from benchmarks._values import BACKENDS, OURS, REFERENCE, SLOWEST, MiB, Sample, Section, Table

_WAYS = ("whole", "each")


def tenth(lab: Lab) -> Section:
    """Load every tenth tensor: large ones for the bytes moved, small ones for the time."""
    sizes = lab.sizes
    with (
        lab.server() as server,
        lab.clients(server, alike([OURS, REFERENCE, SLOWEST], sizes.bulk)) as clients,
    ):
        lab.keep(clients)
        large = lab.in_turns(clients, lambda client, n: _load(client, client.backend, n))
    small = _small(lab, slow=False)
    slow = _small(lab, slow=True)
    figures = {"large tensors: bytes moved, times those needed": moved(large[OURS])}
    for name, samples in (("small tensors", small), ("small tensors, slow link", slow)):
        better_s = min(wall_s(samples[way]) for way in _WAYS)
        times = ratio(wall_s(samples[OURS]), better_s)
        figures[f"{name}: time, times the better way's"] = times
    return Section(
        row="tenth",
        title="A tenth of the tensors",
        how=f"Every tenth of {sizes.bulk} tensors, and every tenth of {sizes.small}, on the fast "
        "link and on the slow one. The two other ways to load small ones are the same library's: "
        "`S3ReaderConstructor.sequential()`, and "
        "`S3ReaderConstructor.dcp_optimized(max_gap_size=0)`.",
        table=_table({"large": large, "small": small, "small, slow link": slow}),
        figures=figures,
        notes=lab.take_notes(),
    )


def _small(lab: Lab, *, slow: bool) -> Samples:
    backends = [OURS, *_WAYS, REFERENCE]
    with (
        lab.server(slow=slow) as server,
        lab.clients(server, alike(backends, lab.sizes.small)) as clients,
    ):
        names = {OURS: OURS, "whole": OURS, "each": OURS, REFERENCE: REFERENCE}
        kept = {backend: clients[backend] for backend in set(names.values()) & set(clients)}
        lab.keep(kept)
        return lab.in_turns(clients, lambda client, n: _load(client, names[client.backend], n))


def _load(client: Client, name: str, number: int) -> Sample:
    return client.load(name, tenth=True, verify=number == 0)


def _table(found: dict[str, Samples]) -> Table:
    rows = [
        [
            f"{name}: {BACKENDS[backend]}",
            f"{wall_s(samples):.3f}",
            f"{samples[0].nbytes / MiB:.1f}",
            f"{max(each.received_bytes for each in samples) / MiB:.1f}",
            f"{moved(samples):.2f}",
            f"{samples[0].requests}",
        ]
        for name, backends in found.items()
        for backend, samples in backends.items()
    ]
    columns = ["", "s", "needed, MiB", "received, MiB", "received / needed", "requests"]
    return Table(columns=columns, rows=rows)
