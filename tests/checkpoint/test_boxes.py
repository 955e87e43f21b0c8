"""A stretch of a flattened tensor as boxes: exactly its elements, in order."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_peft.checkpoint.boxes import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def stretches(draw):
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(stretches())
def test_boxes_are_the_stretch_in_order(stretch):
    shape, start, end = stretch
    whole = torch.arange(math.prod(shape)).view(shape)
    position = start
    for box in boxes(start, end, shape):
        corner = whole[tuple(slice(first, first + side) for first, side in zip(box.offset, box.shape, strict=True))]
        assert box.start == position
        assert corner.flatten().tolist() == list(range(box.start, box.end))
        position = box.end
    assert position == end


@given(stretches())
def test_a_stretch_is_few_boxes(stretch):
    shape, start, end = stretch
    assert len(list(boxes(start, end, shape))) <= 2 * len(shape) - 1


def test_a_matrix_gives_the_rest_of_a_row_whole_rows_and_the_start_of_one():
    assert [(box.offset, box.shape) for box in boxes(3, 14, (4, 4))] == [
        ((0, 3), (1, 1)),
        ((1, 0), (2, 4)),
        ((3, 0), (1, 2)),
    ]


def test_nothing_is_no_box():
    assert list(boxes(5, 5, (4, 4))) == []
