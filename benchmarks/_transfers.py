"""The rows that move large tensors: plain, over TLS, over a slow link, and of an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks._figures import cpu_s_per_gib, gib_per_s, ratio, wall_s
from benchmarks._lab import Lab, Samples, alike
from benchmarks._values import BACKENDS, OURS, REFERENCE, SLOWEST, Chart, Sample, Section, Table

_COLUMNS = [
    "",
    "load, GiB/s",
    "load, cpu-s/GiB",
    "save, GiB/s",
    "save, cpu-s/GiB",
    "runs",
]


def bulk(lab: Lab) -> Section:
    """Load and save large tensors, beside all peers and raw sockets."""
    shape = lab.sizes.bulk
    backends = [OURS, REFERENCE, SLOWEST, "disk", "raw"]
    with lab.server() as server, lab.clients(server, alike(backends, shape)) as clients:
        saves, loads = lab.save_and_load(clients)
    figures = {
        **_rates("load", loads, {REFERENCE: "the reference's", "raw": "raw sockets'"}),
        **_rates("save", saves, {REFERENCE: "the reference's", "disk": "the RAM disk's"}),
        "load: cpu-s/GiB": cpu_s_per_gib(loads[OURS]),
        "save: cpu-s/GiB": cpu_s_per_gib(saves[OURS]),
    }
    return Section(
        row="bulk",
        title="Large tensors",
        how=f"{shape} tensors, over plain HTTP on the loopback interface, checksums on. Raw "
        "sockets are 8 threads that send from and receive into the same memory, without "
        "signatures or checksums.",
        table=_table(saves, loads),
        figures=figures,
        charts=[
            Chart(
                title="Large tensors",
                unit="GiB/s",
                groups={"load": _each(gib_per_s, loads), "save": _each(gib_per_s, saves)},
            ),
            Chart(
                title="Large tensors: the client's CPU",
                unit="cpu-s/GiB",
                groups={"load": _each(cpu_s_per_gib, loads), "save": _each(cpu_s_per_gib, saves)},
            ),
        ],
        notes=lab.take_notes(),
    )


def tls(lab: Lab) -> Section:
    """Do the same over TLS."""
    shape = lab.sizes.bulk
    backends = [OURS, REFERENCE, SLOWEST]
    with lab.server(tls=True) as server, lab.clients(server, alike(backends, shape)) as clients:
        saves, loads = lab.save_and_load(clients)
    return Section(
        row="tls",
        title="Large tensors over TLS",
        how=f"{shape} tensors over TLS 1.3, with a certificate of an authority made for the run. "
        "botocore trusts it by AWS_CA_BUNDLE, the reference library by SSL_CERT_FILE.",
        table=_table(saves, loads),
        figures={
            **_rates("load", loads, {REFERENCE: "the reference's"}),
            **_rates("save", saves, {REFERENCE: "the reference's"}),
        },
        charts=[
            Chart(
                title="Large tensors over TLS",
                unit="GiB/s",
                groups={"load": _each(gib_per_s, loads), "save": _each(gib_per_s, saves)},
            )
        ],
        notes=lab.take_notes(),
    )


def slow(lab: Lab) -> Section:
    """Do the same over a slow link, with everybody's default settings."""
    sizes = lab.sizes
    backends = [OURS, REFERENCE, SLOWEST]
    with (
        lab.server(slow=True) as server,
        lab.clients(server, alike(backends, sizes.slow)) as clients,
    ):
        saves, loads = lab.save_and_load(clients, lab.slowest_once)
    figures = {}
    for operation, samples in (("load", loads), ("save", saves)):
        if REFERENCE in samples:
            times = ratio(wall_s(samples[REFERENCE]), wall_s(samples[OURS]))
            figures[f"{operation}: times faster than the reference"] = times
    return Section(
        row="slow",
        title="A slow link",
        how=f"{sizes.slow} tensors. The server waits {sizes.latency_s * 1e3:.0f} ms before an "
        f"answer's first byte and moves {sizes.bytes_per_s / 1e6:.0f} MB/s on each connection. "
        "Every library has its default settings.",
        table=_table(saves, loads),
        figures=figures,
        charts=[
            Chart(
                title="A slow link",
                unit="GiB/s",
                groups={"load": _each(gib_per_s, loads), "save": _each(gib_per_s, saves)},
            )
        ],
        notes=lab.take_notes(),
    )


def accelerator(lab: Lab) -> Section:
    """Load onto an accelerator and save from it, where there is one."""
    shape = lab.sizes.bulk
    device = torch.accelerator.current_accelerator(check_available=True)
    saves: Samples = {}
    loads: Samples = {}
    if device is None:
        lab.notes.append("Not run: this machine has no accelerator.")
    else:
        backends = [OURS, REFERENCE, SLOWEST]
        with (
            lab.server() as server,
            lab.clients(server, alike(backends, shape), device=device.type) as clients,
        ):
            saves, loads = lab.save_and_load(clients)
    return Section(
        row="accelerator",
        title="Tensors of an accelerator",
        how=f"{shape} tensors in the memory of the machine's accelerator, over plain HTTP.",
        table=_table(saves, loads),
        figures={
            **_rates("load", loads, {REFERENCE: "the reference's"}),
            **_rates("save", saves, {REFERENCE: "the reference's"}),
        },
        notes=lab.take_notes(),
    )


def _rates(operation: str, samples: Samples, others: dict[str, str]) -> dict[str, float]:
    figures = {}
    for backend, name in others.items():
        if backend in samples:
            times = ratio(gib_per_s(samples[OURS]), gib_per_s(samples[backend]))
            figures[f"{operation}: GiB/s, times {name}"] = times
            cpu = ratio(cpu_s_per_gib(samples[OURS]), cpu_s_per_gib(samples[backend]))
            figures[f"{operation}: cpu-s/GiB, times {name}"] = cpu
    return figures


def _each(figure: Callable[[Sequence[Sample]], float], samples: Samples) -> dict[str, float]:
    return {backend: figure(found) for backend, found in samples.items()}


def _table(saves: Samples, loads: Samples) -> Table:
    rows = []
    for backend in loads:
        save, load = saves[backend], loads[backend]
        rows.append(
            [
                BACKENDS[backend],
                f"{gib_per_s(load):.2f}",
                f"{cpu_s_per_gib(load):.2f}",
                f"{gib_per_s(save):.2f}",
                f"{cpu_s_per_gib(save):.2f}",
                f"{len(load)}",
            ]
        )
    return Table(columns=_COLUMNS, rows=rows)
