"""The rows of memory and growth: the same work at one size and at four times it."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks._figures import peak_mib, ratio, wall_s
from benchmarks._lab import Client, Lab
from benchmarks._values import (
    BACKENDS,
    METADATA,
    OURS,
    REFERENCE,
    SLOWEST,
    Sample,
    Section,
    Shape,
    Table,
)

_FACTOR = 4
_ONCE, _GROWN = "once", "grown"
_OPERATIONS = ("load", "save")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Saves and loads of one shape of tensors.

    Attributes:
        samples: By backend, operation and size.
    """

    shape: Shape
    samples: dict[tuple[str, str, str], list[Sample]] = field(default_factory=dict)

    def backends(self) -> list[str]:
        """Return those that were measured both ways at both sizes."""
        names = dict.fromkeys(backend for backend, _, _ in self.samples)
        needed = [(operation, size) for operation in _OPERATIONS for size in (_ONCE, _GROWN)]
        return [name for name in names if all((name, *each) in self.samples for each in needed)]

    def first_mib(self, backend: str, operation: str, size: str) -> float:
        """Return the memory that the first of a process took beyond the tensors."""
        return peak_mib(self.samples[backend, operation, size][:1])

    def wall_s(self, backend: str, operation: str, size: str) -> float:
        """Return the median time."""
        return wall_s(self.samples[backend, operation, size])


def memory_and_growth(lab: Lab) -> list[Section]:
    """Measure large tensors with all peers, and small ones beside what DCP itself takes."""
    sizes = lab.sizes
    large = _grow(lab, sizes.grown, [OURS, REFERENCE, SLOWEST, "disk"])
    small = _grow(lab, sizes.grown_small, [OURS, REFERENCE, METADATA])
    return [_memory(lab, large, small), _growth(large, small)]


def _grow(lab: Lab, shape: Shape, backends: list[str]) -> Found:
    found = Found(shape=shape)

    def repeats(backend: str) -> int:
        return lab.sizes.repeat_growth if backend == OURS else 1

    for backend in backends:
        wanted = {_ONCE: (backend, shape), _GROWN: (backend, shape.times(_FACTOR))}
        with lab.server() as server:
            with lab.clients(server, wanted) as clients:
                saves = lab.in_turns(clients, _save, repeats)
                lab.keep(clients)
            # Loads have workers of their own, as memory that a save took is not taken again.
            with lab.clients(server, wanted) as clients:
                if backend == METADATA:  # whose checkpoint is in its process's memory
                    lab.keep(clients)
                loads = lab.in_turns(clients, _load, repeats)
        for operation, samples in (("save", saves), ("load", loads)):
            found.samples.update(
                {(backend, operation, size): each for size, each in samples.items()}
            )
    return found


def _save(client: Client, number: int) -> Sample:
    return client.save(f"{client.name}-{number}")


def _load(client: Client, _: int) -> Sample:
    return client.load(client.name)


def _memory(lab: Lab, large: Found, small: Found) -> Section:
    figures = {}
    for operation in _OPERATIONS:
        figures[f"{operation}: beyond the tensors"] = max(
            large.first_mib(OURS, operation, size) for size in (_ONCE, _GROWN)
        )
        if METADATA in small.backends():
            figures[f"{operation}: small tensors, beyond DCP's plan and metadata"] = max(
                small.first_mib(OURS, operation, size) - small.first_mib(METADATA, operation, size)
                for size in (_ONCE, _GROWN)
            )
    rows = [
        [
            f"{found.shape}: {BACKENDS[backend]}",
            *(
                f"{found.first_mib(backend, operation, size):,.0f}"
                for operation in _OPERATIONS
                for size in (_ONCE, _GROWN)
            ),
        ]
        for found in (large, small)
        for backend in found.backends()
    ]
    return Section(
        row="memory",
        title="Memory beyond the tensors",
        how="The highest resident memory less that before, of the first save and of the first load "
        "in a process (VmHWM, reset before each): what a library imports and sets up with its "
        "first request is in it. The tensors, and the targets of a load, are in memory before.",
        table=Table(
            columns=["", "load, MiB", "of 4 times as much", "save, MiB", "of 4 times as much"],
            rows=rows,
        ),
        figures=figures,
        notes=lab.take_notes(),
    )


def _growth(large: Found, small: Found) -> Section:
    figures, rows = {}, []
    for found, what in ((large, "bytes"), (small, "tensors")):
        for backend in found.backends():
            cells = []
            for operation in _OPERATIONS:
                once_s = found.wall_s(backend, operation, _ONCE)
                grown_s = found.wall_s(backend, operation, _GROWN)
                times = ratio(grown_s, once_s)
                cells += [f"{once_s:.2f}", f"{grown_s:.2f}", f"{times:.2f}"]
                if backend == OURS:
                    figures[f"{operation}: time for {_FACTOR} times the {what}"] = times
            rows.append([f"{found.shape}: {BACKENDS[backend]}", *cells])
    return Section(
        row="growth",
        title="Growth",
        how=f"{large.shape} and {large.shape.times(_FACTOR)} tensors; {small.shape} and "
        f"{small.shape.times(_FACTOR)} tensors. Both sizes take turns. s3dcp's figures are "
        "medians; the others are of one run, which includes what a process does once.",
        table=Table(
            columns=["", "load, s", "4 times", "ratio", "save, s", "4 times", "ratio"], rows=rows
        ),
        figures=figures,
    )
