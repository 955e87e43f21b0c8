"""Adapted layers split over two tensor-parallel ranks equal the same layers on one."""

from collections import Counter

import pytest
import torch
from torch import nn

from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from tests.adapters import layer_runs
from tests.adapters.layer_runs import BATCH, RANK, F, GatedPair, H, S, draw, run_here
from tests.one_rank import one_rank
from tests.ranks import run_ranks

LAYOUTS = {"TP2": (False, True), "TP2+SP": (True, True), "frozen TP2": (False, False), "frozen TP2+SP": (True, False)}


@pytest.fixture(scope="module", autouse=True)
def alone():
    with one_rank():
        yield run_here(False, True)


@pytest.fixture(scope="module")
def on_two_ranks():
    by_rank = run_ranks(2, layer_runs.run, list(LAYOUTS.values()))
    return [dict(zip(LAYOUTS, found, strict=True)) for found in by_rank]


def test_one_rank_equals_the_formula(alone):
    x = draw("x", S, BATCH, H)
    scale = 3.0 / RANK

    def linear(name, x):
        A, B = (alone[f"{name}.adapter.{factor}"] for factor in "AB")
        weight = draw(f"{name}.weight", B.shape[0], A.shape[1])
        return x @ (weight + scale * B @ A).T + draw(f"{name}.bias", B.shape[0])

    gate, up = linear("column", x).chunk(2, -1)
    torch.testing.assert_close(alone["y"], linear("row", gate * up))


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
def test_two_ranks_equal_one(alone, on_two_ranks, layout):
    """Outputs, the input's gradient, initial values and gradients of all factors."""
    names = alone.keys() - {"calls", "kept"}
    assert len(names) == 10
    for found in on_two_ranks:
        for name in names:
            torch.testing.assert_close(found[layout][name], alone[name], msg=lambda text, name=name: f"{name}: {text}")


NARROW, SUMS = S * BATCH * RANK, ("all_reduce", RANK * H + H * RANK)
CALLS = {  # with the sequence split those of the column layer; the row layer's input is features of all tokens already
    "TP2": {SUMS: 1},
    "TP2+SP": {SUMS: 1, ("all_gather", NARROW): 1, ("reduce_scatter", NARROW): 1},
}


@pytest.mark.parametrize(("layout", "calls"), CALLS.items())
def test_an_adapter_adds_one_coalesced_sum_and_narrow_calls(on_two_ranks, layout, calls):
    assert on_two_ranks[0][layout]["calls"] - on_two_ranks[0][f"frozen {layout}"]["calls"] == Counter(calls)


def test_a_rank_keeps_its_own_tokens_once_and_the_narrow_product(on_two_ranks):
    assert on_two_ranks[0]["TP2"]["kept"] == on_two_ranks[0]["TP2+SP"]["kept"] == [NARROW, "x"]


def test_without_an_adapter_a_layer_is_its_parent():
    pair = GatedPair(1, sequence_parallel=False, with_adapters=False)
    x = draw("x", S, BATCH, H)
    weight, bias = pair.column.weight, pair.column.bias
    torch.testing.assert_close(pair.column(x)[0], x @ weight.T + bias)
    assert not any(name.startswith("adapter") for name, _ in pair.column.named_parameters())


def test_each_kind_of_layer_has_its_own_bias():
    config = GatedPair(1, sequence_parallel=False, with_adapters=False).column.config
    config.linear_biases = {"linear_qkv"}
    layers = {
        kind: AdaptedColumnParallelLinear(H, H, config=config, init_method=nn.init.zeros_, tp_comm_buffer_name=kind)
        for kind in ("qkv", "fc1")
    }
    assert {kind for kind, layer in layers.items() if layer.bias is not None} == {"qkv"}


def test_checkpoint_keys_of_the_base_stay_megatrons():
    pair = GatedPair(1, sequence_parallel=False, with_adapters=True)
    state = pair.column.sharded_state_dict("fc1.", metadata={"dp_cp_group": None})
    state.pop("fc1._extra_state", None)
    assert state.keys() == {"fc1.weight", "fc1.bias", "fc1.adapter.A", "fc1.adapter.B"}
    assert state["fc1.adapter.A"].global_shape == (RANK, H)
    parts = state["fc1.adapter.B"].build()  # gate and up, each split over the ranks by itself
    assert [part.global_shape for part in parts] == [(2 * F, RANK)] * 2
    assert [part.global_offset for part in parts] == [(0, 0), (F, 0)]
