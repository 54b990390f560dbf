from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3dcp._errors import S3ConfigError
from s3dcp._ranges import (
    BLOCKED_ITEM_BYTES,
    MAX_OBJECT_BYTES,
    MAX_PART_BYTES,
    MAX_PARTS,
    PartCutter,
    Want,
    block_bytes,
    coalesce,
    cut,
    even_ranges,
    part_bytes,
    span_bytes,
    upload_part_bytes,
)

MiB = 1 << 20
GiB = 1 << 30


@pytest.mark.parametrize(
    ("total", "connections", "expected"),
    [
        (0, 8, 8 * MiB),
        (8 * MiB, 8, 8 * MiB),  # one PUT
        (8 * MiB + 1, 8, 8 * MiB),
        (1 * GiB, 8, 32 * MiB),
        (512 * MiB, 32, 16 * MiB),
        (100 * GiB, 8, 32 * MiB),
        (400 * GiB, 8, 42 * MiB),  # 32 MiB would be over 10,000 parts
    ],
)
def test_part_sizes(total: int, connections: int, expected: int) -> None:
    assert upload_part_bytes(total, 8 * MiB, connections) == expected


def test_parts_stay_within_the_memory_for_copies() -> None:
    assert upload_part_bytes(1 * GiB, 8 * MiB, 8, most_bytes=12 * MiB) == 12 * MiB
    assert upload_part_bytes(1 * GiB, 8 * MiB, 8, most_bytes=1 * MiB) == 8 * MiB
    assert upload_part_bytes(400 * GiB, 8 * MiB, 8, most_bytes=12 * MiB) == 42 * MiB


def test_a_part_size_that_s3_refuses_matters_only_for_several_parts() -> None:
    assert upload_part_bytes(100, 1 * MiB, 8) >= 100
    for floor in (5 * MiB - 1, MAX_PART_BYTES + 1):
        with pytest.raises(S3ConfigError, match="between 5 MiB and 5 GiB"):
            upload_part_bytes(1 * GiB, floor, 8)


def test_an_object_over_the_limit_is_refused() -> None:
    with pytest.raises(S3ConfigError, match="thread_count"):
        part_bytes(MAX_OBJECT_BYTES + 1, 8 * MiB, 32 * MiB)


@given(st.integers(9 * MiB, MAX_OBJECT_BYTES), st.integers(1, 200))
def test_every_object_fits_into_the_parts(total: int, connections: int) -> None:
    size = upload_part_bytes(total, 8 * MiB, connections)
    assert size <= MAX_PART_BYTES
    assert -(-total // size) <= MAX_PARTS


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 33), st.integers(1, 128))
def test_spans_are_never_smaller_than_asked(total: int, floor: int, connections: int) -> None:
    assert span_bytes(total, floor, connections) >= max(floor, MiB)


@pytest.mark.parametrize(
    ("data", "row", "expected"),
    [
        (BLOCKED_ITEM_BYTES - 1, 4, BLOCKED_ITEM_BYTES - 1),
        (4 * MiB, 4, MiB),
        (4 * MiB, 3 * MiB, 3 * MiB),
        (4 * MiB, 4 * MiB, 4 * MiB),  # one row is one block is the item
        (5 * MiB, 3 * MiB, 3 * MiB),
        (0, 0, 0),
        (16 * MiB, 1000, 1049 * 1000),
        (4 * GiB, 4, 4 * MiB),
    ],
)
def test_block_sizes(data: int, row: int, expected: int) -> None:
    assert block_bytes(data, row) == expected


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 24))
def test_blocks_are_whole_rows(rows: int, row: int) -> None:
    size = block_bytes(rows * row, row)
    assert size % row == 0
    assert size >= min(MiB, rows * row)
    assert -(-rows * row // size) <= 1024


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 100))
def test_cuts(start: int, length: int, size: int, origin: int) -> None:
    pieces = list(cut(start, start + length, size, origin))
    assert [p for a, b in pieces for p in range(a, b)] == list(range(start, start + length))
    assert all(a == start or (a - origin) % size == 0 for a, _ in pieces)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_parts_are_the_rope(views: list[bytes], size: int) -> None:
    cutter: PartCutter[int] = PartCutter(size)
    parts = [part for n, v in enumerate(views) for part in cutter.push(memoryview(v), n)]
    assert all(sum(f.view.nbytes for f in part) == size for part in parts)
    rest = cutter.rest()
    assert sum(f.view.nbytes for f in rest) < size
    fragments = [f for part in [*parts, rest] for f in part]
    assert b"".join(f.view for f in fragments) == b"".join(views)
    position = 0
    for fragment in fragments:
        assert fragment.start == position
        position += fragment.view.nbytes
    for n, view in enumerate(views):
        assert b"".join(f.view for f in fragments if f.owner == n) == view


def test_neighbours_share_a_span() -> None:
    wants = [Want(0, 10, "a"), Want(10, 20, "b"), Want(25, 30, "c"), Want(100, 110, "d")]
    spans = coalesce(wants, max_gap=5, max_span=50)
    assert [(s.start, s.end, [p.owner for p in s.pieces]) for s in spans] == [
        (0, 30, ["a", "b", "c"]),
        (100, 110, ["d"]),
    ]
    assert [s.size_bytes for s in spans] == [30, 10]


def test_no_gap_and_any_gap() -> None:
    wants = [Want(0, 10, 0), Want(11, 20, 1)]
    assert len(coalesce(wants, max_gap=0, max_span=100)) == 2
    assert len(coalesce(wants, max_gap=float("inf"), max_span=100)) == 1
    assert len(coalesce(wants, max_gap=float("inf"), max_span=15)) == 2


@pytest.mark.parametrize(
    ("wants", "max_shared", "sizes"),
    [
        ([(0, 16), (16, 32), (32, 48)], math.inf, [9] * 5),  # one each of five requests
        ([(0, 16), (16, 32), (32, 48)], 15, [8] * 6),
        ([(0, 4), (4, 8), (8, 24)], 15, [8, 8, 8]),
        ([(0, 16), (30, 46)], math.inf, [8] * 4),  # a gap
        ([(0, 4), (4, 20)], math.inf, [10, 10]),
    ],
)
def test_spans_are_even_whatever_lies_in_them(
    wants: list[tuple[int, int]], max_shared: float, sizes: list[int]
) -> None:
    """All numbers in MiB."""
    spans = coalesce(
        [Want(a * MiB, b * MiB, n) for n, (a, b) in enumerate(wants)],
        max_gap=0,
        max_span=10 * MiB,
        max_shared=max_shared * MiB,
    )
    assert [span.size_bytes // MiB for span in spans] == sizes


def test_small_wants_are_not_cut() -> None:
    wants = [Want(n * MiB, (n + 1) * MiB, n) for n in range(11)]
    spans = coalesce(wants, max_gap=0, max_span=5 * MiB)
    assert [len(span.pieces) for span in spans] == [4, 4, 3]
    assert all(piece in wants for span in spans for piece in span.pieces)


wants_strategy = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 300)).map(lambda t: (t[0], t[0] + t[1]))
)


@given(wants_strategy, st.integers(0, 100), st.integers(1, 400))
def test_every_want_is_fetched_once(
    ranges: list[tuple[int, int]], max_gap: int, max_span: int
) -> None:
    wants = [Want(a, b, n) for n, (a, b) in enumerate(ranges)]
    spans = coalesce(wants, max_gap=max_gap, max_span=max_span)
    got: dict[int, list[int]] = {n: [] for n in range(len(ranges))}
    for span in spans:
        assert span.size_bytes <= max_span
        position = span.start
        for piece in span.pieces:
            assert span.start <= position <= piece.start < piece.end <= span.end
            assert piece.start - position <= max_gap
            position = piece.end
            got[piece.owner].extend(range(piece.start, piece.end))
    for n, (a, b) in enumerate(ranges):
        assert sorted(got[n]) == list(range(a, b))


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(10**3, 10**5))
def test_even_ranges(start: int, length: int, most: int) -> None:
    ranges = even_ranges(start, start + length, most)
    sizes = [b - a for a, b in ranges]
    assert sum(sizes) == length
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(ranges) == -(-length // most)
