"""The rows, by the names that `--only` takes. Memory and growth are measured together."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks._disturbance import disturbance
from benchmarks._growth import memory_and_growth
from benchmarks._lab import Lab
from benchmarks._reshard import reshard
from benchmarks._small import small
from benchmarks._tenth import tenth
from benchmarks._transfers import accelerator, bulk, slow, tls
from benchmarks._values import Section


def _one(row: Callable[[Lab], Section]) -> Callable[[Lab], list[Section]]:
    return lambda lab: [row(lab)]


ROWS: dict[str, Callable[[Lab], list[Section]]] = {
    "bulk": _one(bulk),
    "tls": _one(tls),
    "small": _one(small),
    "slow": _one(slow),
    "accelerator": _one(accelerator),
    "tenth": _one(tenth),
    "reshard": _one(reshard),
    "growth": memory_and_growth,
    "disturbance": _one(disturbance),
}
