"""Slices of a linear layer join to the whole; collectives and sums of partial gradients on two ranks and on one."""

import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.config import ConfigurationError
from megatron_peft.parallel import collectives
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL, LinearLayout, generator_for
from megatron_peft.runtime.launch import start_world, stop
from tests.one_rank import Place, places
from tests.ranks import run_ranks

OUT, IN = 24, 12
NAME = "decoder.layers.0.mlp.linear_fc1.adapter.A"
SEED_OF_1234 = 1419924274430239179


def _layouts(split, size, num_parts=1):
    return [LinearLayout(split, OUT, IN, place, num_parts) for place in places(size)]


SIZES = pytest.mark.parametrize("size", [1, 2, 3])


@SIZES
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


@SIZES
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


@SIZES
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
    """In a later version the same numbers."""
    assert len({tuple(_draw(seed, name)) for seed in (1, 2) for name in (NAME, NAME.replace("0", "1"))}) == 4
    assert _draw(1, "2x") != _draw(12, "x")
    assert generator_for(1234, NAME).initial_seed() % 2**64 == SEED_OF_1234


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(0)
    before, drawn = torch.get_rng_state(), _draw(1, NAME)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert _draw(1, NAME) == drawn


# Collectives, on two ranks and on one, where they do nothing.

STARTS = {
    "sum": collectives.start_sum_over_tensor_parallel,
    "gather": collectives.start_gather_sequence_over_tensor_parallel,
    "scatter": collectives.start_sum_scatter_sequence_over_tensor_parallel,
}


def tensor_of(rank: int) -> Tensor:
    return torch.arange(24.0).reshape(4, 2, 3) * (rank + 1) + rank


def found_by_a_rank(_: None) -> dict[str, Any]:
    start_world()
    group: Any = dist.group.WORLD
    x = tensor_of(dist.get_rank())
    skewed = x.transpose(1, 2).contiguous().transpose(1, 2)  # as tensors arrive in backward passes
    found: dict[str, Any] = {name: start(skewed.clone(), group)() for name, start in STARTS.items()}
    coalesced = [torch.full((3,), 1.0 + dist.get_rank()), torch.ones(2, 2).double(), torch.full((1, 2), 3.0)]
    model = two_layers(group, 1.0 + dist.get_rank())
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        collectives.sum_coalesced(coalesced, group)
        sum_partial_gradients_over_tensor_parallel([model], group)
    sizes = [call.args[0].numel() for call in all_reduce.call_args_list]
    return found | {"coalesced": coalesced, "gradients": [x.main_grad for x in model], "summed": sizes}


def two_layers(group: Any, gradient: float) -> nn.ParameterList:
    """A and B of a column layer, a base weight without marks, and an A that is not trained; all gradients are alike."""
    layout = LinearLayout("column", 4, 4, group)
    model = nn.ParameterList(torch.zeros(2, 3) for _ in range(4))
    layout.mark_input(model[0])
    layout.mark_output(model[1])
    layout.mark_input(model[3].requires_grad_(False))
    for parameter in model:
        parameter.main_grad = torch.full((2, 3), gradient)
    return model


def test_two_ranks_sum_gather_and_scatter():
    """A coalesced sum is one call for each type; of gradients only replicated ones that are trained are summed."""
    parts = [tensor_of(0), tensor_of(1)]
    for rank, found in enumerate(run_ranks(2, found_by_a_rank)):
        assert torch.equal(found["sum"], parts[0] + parts[1])
        assert torch.equal(found["gather"], torch.cat(parts))
        assert torch.equal(found["scatter"], (parts[0] + parts[1]).chunk(2)[rank])
        assert [tensor.tolist() for tensor in found["coalesced"]] == [[3.0] * 3, [[2.0] * 2] * 2, [[6.0] * 2]]
        assert [gradient.unique().tolist() for gradient in found["gradients"]] == [[3.0], *[[1.0 + rank]] * 3]
        *coalesced, gradients = found["summed"]
        assert sorted(coalesced) == [4, 5] and gradients == 6


def test_alone_a_rank_gets_its_own_tensor_back():
    x, model = tensor_of(0), two_layers(Place(0, 1), gradient=1.0)
    assert all(start(x, Place(0, 1))() is x for start in STARTS.values())
    sum_partial_gradients_over_tensor_parallel([model], Place(0, 1))
    assert model[0].main_grad.unique().tolist() == [1.0]


def waited_for(seconds_of_a_collective: float) -> str:
    start_world(timeout_minutes=seconds_of_a_collective / 60)

    def slowly() -> str:
        time.sleep(3 * seconds_of_a_collective)
        return f"of rank {dist.get_rank()}"

    def refuse() -> None:
        raise ConfigurationError("no")

    found = collectives.awaited_from_first_rank(slowly)
    with pytest.raises(ConfigurationError, match="no"):
        collectives.awaited_from_first_rank(refuse)
    threads = collectives.awaited_from_first_rank(lambda: threading.current_thread() is threading.main_thread())
    assert threads, "an interrupt ends what the first rank does"
    stop()
    return found


def test_what_the_first_rank_finds_may_take_longer_than_a_collective():
    assert run_ranks(2, waited_for, 2.0) == ["of rank 0"] * 2
