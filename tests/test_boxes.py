from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3dcp._boxes import Box, fill, slabs
from tests._boxes import cuts, shapes


def inside(whole: Any, box: Box) -> Any:
    return whole[tuple(slice(a, end) for a, end in zip(box.offsets, box.ends, strict=True))]


@given(shapes(), st.data())
def test_slabs_are_the_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    first = data.draw(st.integers(0, whole.size))
    last = data.draw(st.integers(first, whole.size))

    found = list(slabs(shape, first, last))

    elements = [element for box in found for element in inside(whole, box).ravel()]
    assert elements == list(range(first, last))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(cuts(), st.data())
def test_what_a_slab_shares_with_a_box_is_one_piece_of_the_box(
    cut: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = cut
    count = math.prod(shape)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    whole = np.arange(count).reshape(shape)
    for slab in slabs(shape, first, last):
        for box in boxes:
            common = box.overlap(slab)
            expected = np.intersect1d(inside(whole, box), inside(whole, slab))
            assert (common.count if common else 0) == expected.size
            if common is not None:
                start, end = common.span_in(box)
                assert inside(whole, box).ravel()[start:end].tolist() == expected.tolist()
                start, end = common.span_in(slab)
                spanned = inside(whole, slab).ravel()[start:end]
                assert (spanned[0], spanned[-1]) == (expected[0], expected[-1])


@given(cuts(), st.randoms())
def test_a_cut_fills_its_shape_in_any_order(
    cut: tuple[tuple[int, ...], list[Box]], random: Any
) -> None:
    shape, boxes = cut
    random.shuffle(boxes)
    assert fill(shape, boxes)
    full = [box for box in boxes if box.count]
    if full:
        assert not fill(shape, full[1:])
        assert not fill(shape, [*full, full[0]])
        assert not fill(shape, [full[0], *full[:-1]]) or len(full) == 1


@pytest.mark.parametrize(
    ("shape", "boxes", "expected"),
    [
        ((), [], False),
        ((), [Box((), ())], True),
        ((), [Box((), ()), Box((), ())], False),
        ((0,), [], True),
        ((4,), [Box((0,), (2,)), Box((2,), (2,))], True),
        ((4,), [Box((0,), (2,)), Box((1,), (2,))], False),
        ((4,), [Box((-1,), (4,))], False),
        ((4,), [Box((1,), (4,))], False),
        # As many elements as there are, and yet a hole.
        ((2, 2), [Box((0, 0), (2, 1)), Box((0, 0), (1, 2))], False),
        ((2, 4), [Box((0, 0), (1, 4)), Box((1, 0), (1, 2)), Box((1, 2), (1, 2))], True),
    ],
)
def test_what_fills(shape: tuple[int, ...], boxes: list[Box], expected: bool) -> None:
    assert fill(shape, boxes) is expected


@pytest.mark.parametrize("axis", [0, 1])
def test_a_thousand_shards_are_checked_at_once(axis: int) -> None:
    """Every box against every other would be 50 million comparisons."""
    count = 10_000
    shape = (count, 8) if axis == 0 else (8, count)
    boxes = [Box((n, 0), (1, 8)) if axis == 0 else Box((0, n), (8, 1)) for n in range(count)]
    assert fill(shape, boxes)
