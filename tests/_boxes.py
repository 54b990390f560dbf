"""Hypothesis strategies: shapes, and ways to cut them into boxes."""

from __future__ import annotations

from hypothesis import strategies as st

from s3dcp._boxes import Box


def shapes(max_dimensions: int = 4, max_side: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of few elements, of none and of no dimension among them."""
    return st.lists(st.integers(0, max_side), max_size=max_dimensions).map(tuple)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that fill it: halves of halves, cut along any dimension."""
    shape = draw(shapes())
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[axis]))
        boxes += [
            Box(_with(box.offsets, axis, start + box.offsets[axis]), _with(box.sizes, axis, size))
            for start, size in ((0, at), (at, box.sizes[axis] - at))
        ]
    return shape, boxes


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
