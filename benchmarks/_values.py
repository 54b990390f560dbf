"""The vocabulary: what is run, what was measured, and what is reported. Plain data, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

#: The backends, by the names they have in commands, and what the page calls them.
BACKENDS = {
    "s3dcp": "s3dcp",
    "s3torchconnector": "s3torchconnector",
    "s3fs": "torch's Fsspec pair on s3fs",
    "disk": "torch's FileSystem pair on a RAM disk",
    "raw": "raw sockets",
    "planning": "DCP's planning alone",
    "metadata": "DCP's planning and metadata alone",
    "whole": "s3dcp, whole file",
    "each": "s3dcp, one request a tensor",
}
OURS = "s3dcp"
REFERENCE = "s3torchconnector"
PLANNING = "planning"
METADATA = "metadata"
#: Several times as slow as everything else, and measured less often.
SLOWEST = "s3fs"

BUCKET = "bench"
#: Where the server drops bodies, so that its memory is neither measured nor used up.
DISCARDED = "null"
KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Shape:
    """A state dict: so many tensors of so many bytes each."""

    count: int
    nbytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.count * self.nbytes

    def times(self, factor: int) -> Shape:
        """Return a state dict of so many times as many tensors."""
        return Shape(self.count * factor, self.nbytes)

    def __str__(self) -> str:
        size, unit = (self.nbytes, MiB) if self.nbytes >= MiB else (self.nbytes, KiB)
        return f"{self.count:,} x {size // unit:,} {'MiB' if unit == MiB else 'KiB'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One save or load.

    Attributes:
        cpu_s: User and system time of the client's process and its children.
        nbytes: Of the tensors that were saved or loaded.
        peak_bytes: By how much the resident memory grew at most; None where it cannot be told.
        received_bytes: Bodies' bytes that the server sent.
        requests: How many the server saw.
    """

    wall_s: float
    cpu_s: float
    nbytes: int
    peak_bytes: int | None = None
    received_bytes: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as they are printed; the first column is text, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Bars.

    Attributes:
        groups: By a group's name, each backend's value.
    """

    title: str
    unit: str
    groups: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one row of the benchmarks found.

    Attributes:
        how: What was run, in a paragraph.
        figures: By metric, what the targets are held against.
        notes: What could not be run or compared.
    """

    row: str
    title: str
    how: str
    table: Table
    figures: dict[str, float]
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole run.

    Attributes:
        facts: Of the machine, the versions and the run, in the order in which they are printed.
        quick: Whether the sizes were those that only show that everything runs.
    """

    facts: dict[str, str]
    quick: bool
    sections: list[Section]

    def figures(self) -> dict[tuple[str, str], float]:
        """Return every figure by row and metric."""
        return {
            (section.row, metric): value
            for section in self.sections
            for metric, value in section.figures.items()
        }
