"""Any box of a tensor is put together from the boxes that it is stored in."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.conversion.stored_boxes import StoredBox, StoredTensor, layer_of, union

WHOLE = torch.arange(1, 61, dtype=torch.float32).view(6, 10)


def stored(tensor: torch.Tensor, rows: list[int], columns: list[int]) -> StoredTensor:
    """`tensor` cut before each of these rows and columns."""
    boxes = []
    for top, bottom in zip([0, *rows], [*rows, tensor.shape[0]], strict=True):
        for left, right in zip([0, *columns], [*columns, tensor.shape[1]], strict=True):
            part = tensor[top:bottom, left:right]
            boxes.append(StoredBox((top, left), tuple(part.shape), lambda part=part: part))
    return StoredTensor(tuple(tensor.shape), tensor.dtype, tuple(boxes))


cuts = st.lists(st.integers(1, 5), unique=True, max_size=3).map(sorted)


@settings(max_examples=60)
@given(cuts, cuts, st.data())
def test_any_box_out_of_any_boxes(rows: list[int], columns: list[int], data: st.DataObject) -> None:
    tensor = stored(WHOLE, rows, columns)
    top, left = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 9))
    bottom, right = data.draw(st.integers(top + 1, 6)), data.draw(st.integers(left + 1, 10))
    target = torch.zeros(bottom - top, right - left)
    tensor.fill(target, (top, left))
    assert tensor.is_whole
    assert torch.equal(target, WHOLE[top:bottom, left:right])


def test_only_boxes_that_overlap_are_read() -> None:
    def not_this_one() -> torch.Tensor:
        raise AssertionError("a box that does not overlap is read")

    boxes = stored(WHOLE, [2, 4], []).boxes
    others = (replace(boxes[0], load=not_this_one), boxes[1], replace(boxes[2], load=not_this_one))
    read = StoredTensor((6, 10), WHOLE.dtype, others).fill(torch.zeros(2, 3), (2, 0))
    assert read == 2 * 3 * 4  # bytes of the part that is asked for


def test_what_lies_outside_the_tensor_stays_as_it_is() -> None:
    target = torch.full((4, 10), -1.0)
    stored(WHOLE, [], []).fill(target, (4, 0))
    assert torch.equal(target[:2], WHOLE[4:])
    assert target[2:].eq(-1).all()


def test_a_hole_is_seen() -> None:
    tensor = stored(WHOLE, [2], [])
    assert not StoredTensor(tensor.shape, tensor.dtype, tensor.boxes[:1]).is_whole


def test_a_layer_of_a_stack() -> None:
    stack = torch.arange(24.0).view(4, 2, 3)
    halves = tuple(StoredBox((at, 0, 0), (2, 2, 3), lambda at=at: stack[at : at + 2]) for at in (0, 2))
    for layer in range(4):
        one = layer_of(StoredTensor((4, 2, 3), stack.dtype, halves), layer)
        target = torch.zeros(2, 3)
        one.fill(target, (0, 0))
        assert one.shape == (2, 3) and torch.equal(target, stack[layer])


def test_of_copies_the_first_stays() -> None:
    first, second, other = (StoredBox(offset, (1,), lambda: WHOLE) for offset in ((0,), (0,), (1,)))
    assert set(union([first, second, other])) == {first, other}
