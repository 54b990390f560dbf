"""How much is run: in full, and just enough to see that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks._values import KiB, MiB, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The state dicts of each row.

    Attributes:
        grown: The smaller of the two sizes that memory and growth are measured at.
        grown_small: The same, of small tensors.
        rows_nbytes: The one tensor that is resharded.
        saved_pieces: Into how many row-wise pieces it is cut when it is saved.
        loaded_pieces: Into how many it is cut when it is loaded, in turn.
        latency_s: The slow link's, to the first byte.
        bytes_per_s: The slow link's, of each connection.
        repeat: How often each thing is measured.
        repeat_growth: The same for s3dcp at the two sizes that growth is measured at.
        repeat_slowest: The same for s3fs, which is several times as slow as everything else.
    """

    bulk: Shape
    small: Shape
    slow: Shape
    grown: Shape
    grown_small: Shape
    rows_nbytes: int
    saved_pieces: int = 2
    loaded_pieces: tuple[int, ...] = (3, 5)
    latency_s: float = 0.030
    bytes_per_s: float = 60e6
    repeat: int
    repeat_growth: int
    repeat_slowest: int


FULL = Sizes(
    bulk=Shape(64, 16 * MiB),
    small=Shape(5_000, 20 * KiB),
    slow=Shape(32, 16 * MiB),
    grown=Shape(32, 16 * MiB),
    grown_small=Shape(5_000, 20 * KiB),
    rows_nbytes=384 * MiB,
    repeat=5,
    repeat_growth=3,
    repeat_slowest=2,
)
QUICK = Sizes(
    bulk=Shape(10, MiB),
    small=Shape(50, 20 * KiB),
    slow=Shape(4, MiB),
    grown=Shape(2, MiB),
    grown_small=Shape(25, 20 * KiB),
    rows_nbytes=12 * MiB,
    loaded_pieces=(3,),
    repeat=1,
    repeat_growth=1,
    repeat_slowest=1,
)
