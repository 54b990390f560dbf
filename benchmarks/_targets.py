"""What is to be reached, as data, and whether it was. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Comparison = Literal["at least", "at most", "more than"]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that a figure is held against.

    Attributes:
        row: Which of the benchmarks the figure is of.
        metric: The figure's name within it.
    """

    row: str
    metric: str
    comparison: Comparison
    bound: float
    unit: str = ""

    def is_reached_by(self, value: float) -> bool:
        """Decide; NaN reaches nothing."""
        match self.comparison:
            case "at least":
                return value >= self.bound
            case "at most":
                return value <= self.bound
            case "more than":
                return value > self.bound


@dataclass(frozen=True, slots=True)
class Outcome:
    """A target, and the figure that was measured; None if that was not."""

    target: Target
    value: float | None

    @property
    def reached(self) -> bool | None:
        """Whether it was; None if it was not measured."""
        return None if self.value is None else self.target.is_reached_by(self.value)

    @property
    def missed_by(self) -> float:
        """How far the figure is from its bound, as a fraction of the bound; 0.0 if reached."""
        if self.value is None or self.reached:
            return 0.0
        return abs(self.value - self.target.bound) / self.target.bound


TARGETS: tuple[Target, ...] = (
    Target("bulk", "load: GiB/s, times the reference's", "at least", 3.0),
    Target("bulk", "load: cpu-s/GiB, times the reference's", "at most", 0.25),
    Target("bulk", "load: cpu-s/GiB", "at most", 0.55),
    Target("bulk", "load: GiB/s, times raw sockets'", "at least", 0.60),
    Target("bulk", "save: GiB/s, times the reference's", "at least", 2.2),
    Target("bulk", "save: cpu-s/GiB, times the reference's", "at most", 0.40),
    Target("bulk", "save: cpu-s/GiB", "at most", 0.65),
    Target("bulk", "save: GiB/s, times the RAM disk's", "more than", 1.0),
    Target("tls", "load: GiB/s, times the reference's", "at least", 1.6),
    Target("tls", "load: cpu-s/GiB, times the reference's", "at most", 0.55),
    Target("tls", "save: GiB/s, times the reference's", "at least", 2.5),
    Target("tls", "save: cpu-s/GiB, times the reference's", "at most", 0.55),
    Target("small", "save: beyond DCP's planning", "at most", 0.30, "s"),
    Target("small", "save: times faster than the reference", "at least", 1.8),
    Target("small", "load: beyond DCP's planning", "at most", 0.30, "s"),
    Target("small", "load: times faster than the reference", "at least", 1.8),
    Target("slow", "load: times faster than the reference", "at least", 3.0),
    Target("slow", "save: times faster than the reference", "at least", 3.0),
    Target("tenth", "large tensors: bytes moved, times those needed", "at most", 1.1),
    Target("tenth", "small tensors: time, times the better way's", "at most", 1.0),
    Target("tenth", "small tensors, slow link: time, times the better way's", "at most", 1.0),
    Target("reshard", "written by s3dcp: bytes moved, times those needed", "at most", 1.05),
    Target("reshard", "written by stock: bytes moved, times those needed", "at most", 1.05),
    Target("memory", "save: beyond the tensors", "at most", 128, "MiB"),
    Target("memory", "load: beyond the tensors", "at most", 128, "MiB"),
    Target("memory", "save: small tensors, beyond DCP's plan and metadata", "at most", 128, "MiB"),
    Target("memory", "load: small tensors, beyond DCP's plan and metadata", "at most", 128, "MiB"),
    Target("growth", "save: time for 4 times the bytes", "at most", 4.4),
    Target("growth", "load: time for 4 times the bytes", "at most", 4.4),
    Target("growth", "save: time for 4 times the tensors", "at most", 4.4),
    Target("growth", "load: time for 4 times the tensors", "at most", 4.4),
    Target("disturbance", "99th percentile of hold-ups", "at most", 5.0, "ms"),
    Target("disturbance", "worst hold-up, times the reference's", "at most", 1.2),
    Target("disturbance", "save: longest block of the loop thread", "at most", 20, "ms"),
    Target("disturbance", "load: longest block of the loop thread", "at most", 20, "ms"),
)


def check(
    figures: Mapping[tuple[str, str], float], targets: Sequence[Target] = TARGETS
) -> list[Outcome]:
    """Hold every target against its figure, which may be missing or NaN."""
    outcomes = []
    for target in targets:
        value = figures.get((target.row, target.metric))
        measured = value is not None and not math.isnan(value)
        outcomes.append(Outcome(target, value if measured else None))
    return outcomes
