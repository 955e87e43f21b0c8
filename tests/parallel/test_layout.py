"""A rank's slices of a linear layer join to the whole, and what is drawn depends on seed and name alone."""

import pytest
import torch
from torch import nn

from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL, LinearLayout, generator_for
from tests.one_rank import Place, places

OUT, IN = 24, 12
NAME = "decoder.layers.0.mlp.linear_fc1.adapter.A"
SEED_OF_1234 = 1419924274430239179


def _layouts(split, size, num_parts=1):
    return [LinearLayout(split, OUT, IN, place, num_parts) for place in places(size)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_of_a_column_layer_and_columns_of_a_row_layer_join_to_the_whole(size):
    outputs, inputs = torch.randn(OUT, 5), torch.randn(5, IN)
    column_layouts, row_layouts = _layouts("column", size), _layouts("row", size)
    rows = [layout.slice_output(outputs) for layout in column_layouts]
    columns = [layout.slice_input(inputs) for layout in row_layouts]
    assert all(torch.equal(layout.slice_input(inputs), inputs) for layout in column_layouts), "this side is not split"
    assert all(torch.equal(layout.slice_output(outputs), outputs) for layout in row_layouts), "nor is this one"
    assert {(x.local_out_features, x.local_in_features) for x in column_layouts} == {(OUT // size, IN)}
    assert {(x.local_out_features, x.local_in_features) for x in row_layouts} == {(OUT, IN // size)}
    assert [part.shape for part in (*rows, *columns)] == [(OUT // size, 5)] * size + [(5, IN // size)] * size
    assert torch.equal(torch.cat(rows), outputs) and torch.equal(torch.cat(columns, dim=1), inputs)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gated_layer_gives_each_rank_its_slices_of_gate_and_up(size):
    whole = torch.randn(OUT, 5)
    halves = [layout.slice_output(whole).chunk(2) for layout in _layouts("column", size, num_parts=2)]
    gate, up = (torch.cat(parts) for parts in zip(*halves, strict=True))
    assert torch.equal(torch.cat([gate, up]), whole)


@pytest.mark.parametrize(
    "split, mark, axis",
    [("column", "mark_output", 0), ("column", "mark_input", -1), ("row", "mark_output", -1), ("row", "mark_input", 1)],
)
def test_marks_say_what_is_split_and_whose_gradients_are_partial(split, mark, axis):
    parameter = nn.Parameter(torch.empty(4, 4))
    getattr(LinearLayout(split, OUT, IN, Place(0, 2)), mark)(parameter)
    assert parameter.partition_dim == axis and parameter.tensor_model_parallel == (axis >= 0)
    assert getattr(parameter, PARTIAL_OVER_TENSOR_PARALLEL) == (axis < 0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_numbers_of_all_ranks_are_counted_and_replicated_ones_once(size):
    for layout in _layouts("column", size, num_parts=2):
        A, B = nn.Parameter(torch.empty(2, IN)), nn.Parameter(torch.empty(OUT // size, 2))
        layout.mark_input(A)
        layout.mark_output(B)
        assert layout.num_global(nn.ParameterList([A, B])) == 2 * (IN + OUT)
        assert (A.partition_stride, B.partition_stride) == (1, 2), "a gated output's is its number of parts"


def _draw(seed, name):
    return torch.randn(8, generator=generator_for(seed, name)).tolist()


def test_another_seed_or_name_draws_other_numbers_and_the_two_are_not_concatenated():
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
