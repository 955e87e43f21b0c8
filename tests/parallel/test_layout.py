"""A rank's slices of a linear layer join to the whole, and what is drawn depends on seed and name alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL, LinearLayout
from megatron_peft.parallel.seeds import generator_for
from tests.one_rank import Place, places

OUT, IN = 24, 12
NAME = "decoder.layers.0.mlp.linear_fc1.adapter.A"
SEED_OF_1234 = 1419924274430239179


def _layouts(split, size, num_parts=1):
    return [LinearLayout(split, OUT, IN, place, num_parts) for place in places(size)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_rows_of_a_column_layer_join_to_the_whole(size):
    whole = torch.randn(OUT, 5)
    slices = [layout.slice_output(whole) for layout in _layouts("column", size)]
    assert {tuple(part.shape) for part in slices} == {(OUT // size, 5)}
    assert torch.equal(torch.cat(slices), whole)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gated_layer_gives_each_rank_its_part_of_gate_and_of_up(size):
    gate, up = torch.randn(2, OUT // 2, 5)
    slices = [layout.slice_output(torch.cat([gate, up])) for layout in _layouts("column", size, num_parts=2)]
    halves = [part.chunk(2) for part in slices]
    assert torch.equal(torch.cat([half[0] for half in halves]), gate)
    assert torch.equal(torch.cat([half[1] for half in halves]), up)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_columns_of_a_row_layer_join_to_the_whole(size):
    whole = torch.randn(5, IN)
    slices = [layout.slice_input(whole) for layout in _layouts("row", size)]
    assert {tuple(part.shape) for part in slices} == {(5, IN // size)}
    assert torch.equal(torch.cat(slices, dim=1), whole)


def test_the_side_that_is_not_split_is_whole_on_every_rank():
    outputs, inputs = torch.randn(OUT, 5), torch.randn(5, IN)
    for row, column in zip(_layouts("row", 2), _layouts("column", 2), strict=True):
        assert torch.equal(row.slice_output(outputs), outputs)
        assert torch.equal(column.slice_input(inputs), inputs)
        assert (row.local_out_features, row.local_in_features) == (OUT, IN // 2)
        assert (column.local_out_features, column.local_in_features) == (OUT // 2, IN)


@pytest.mark.parametrize(
    "split, mark, axis",
    [("column", "mark_output", 0), ("column", "mark_input", -1), ("row", "mark_output", -1), ("row", "mark_input", 1)],
)
def test_marks_say_what_is_split_and_whose_gradients_are_partial(split, mark, axis):
    parameter = nn.Parameter(torch.empty(4, 4))
    getattr(LinearLayout(split, OUT, IN, Place(0, 2)), mark)(parameter)
    assert parameter.partition_dim == axis
    assert parameter.tensor_model_parallel == (axis >= 0)
    assert getattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL) == (axis < 0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_numbers_of_all_ranks_are_counted_and_replicated_ones_once(size):
    for layout in _layouts("column", size):
        A, B = nn.Parameter(torch.empty(2, IN)), nn.Parameter(torch.empty(OUT // size, 2))
        layout.mark_input(A)
        layout.mark_output(B)
        assert layout.num_global(nn.ParameterList([A, B])) == 2 * (IN + OUT)


def test_the_stride_of_a_gated_output_is_its_number_of_parts():
    layout, A, B = _layouts("column", 2, num_parts=2)[0], *(nn.Parameter(torch.empty(4, 4)) for _ in range(2))
    layout.mark_input(A)
    layout.mark_output(B)
    assert (A.partition_stride, B.partition_stride) == (1, 2)


def _draw(seed, name):
    return torch.randn(8, generator=generator_for(seed, name)).tolist()


def test_another_seed_or_name_gives_other_numbers_and_the_two_do_not_run_into_each_other():
    assert len({tuple(_draw(seed, name)) for seed in (1, 2) for name in (NAME, NAME.replace("0", "1"))}) == 4
    assert _draw(1, "2x") != _draw(12, "x")


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(0)
    before, drawn = torch.get_rng_state(), _draw(1, NAME)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert _draw(1, NAME) == drawn


def test_a_run_can_be_repeated_by_a_later_version():
    assert generator_for(1234, NAME).initial_seed() % 2**64 == SEED_OF_1234
