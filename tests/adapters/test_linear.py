"""The layers with a place for an adapter: their formula, biases and keys of checkpoints."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.config import LinearSizes, PeftConfig
from tests.adapters.many_ranks import attach, build_layer, drawn, fake_groups, layer_config

S, BATCH, H, F, RANK = 8, 3, 12, 10, 2
PEFT = PeftConfig(lora_rank=RANK, lora_alpha=3.0)
SIZES = {"linear_fc1": LinearSizes("column", 2 * F, H, 1, num_parts=2), "linear_fc2": LinearSizes("row", H, F, 1)}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    with fake_groups(1) as found:
        yield found[1]


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_a_layer_is_its_formula_without_an_adapter_and_with_one(group, name, sizes):
    layer, x = build_layer(name, sizes, group, False), drawn("x", S, BATCH, sizes.in_features)
    weight = drawn(f"{name}.weight", sizes.out_features, sizes.in_features)
    bias = drawn(f"{name}.bias", sizes.out_features)
    torch.testing.assert_close(layer(x)[0], x @ weight.T + bias)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    attach(layer, PEFT, 1)
    change = 3.0 / RANK * layer.adapter.B @ layer.adapter.A
    torch.testing.assert_close(layer(x)[0], x @ (weight + change).T + bias)


def test_each_kind_of_layer_has_its_own_bias(group):
    config = layer_config(1, False)
    config.linear_biases = {"linear_qkv"}
    common: dict[str, Any] = {"config": config, "init_method": None, "tp_group": group}
    layers = {kind: AdaptedColumnParallelLinear(H, H, tp_comm_buffer_name=kind, **common) for kind in ("qkv", "fc1")}
    assert [kind for kind, layer in layers.items() if layer.bias is not None] == ["qkv"]


def test_checkpoint_keys_of_the_base_stay_megatrons(group):
    layer = build_layer("linear_fc1", SIZES["linear_fc1"], group, False)
    attach(layer, PEFT, 1)
    state = layer.sharded_state_dict("fc1.", metadata={"dp_cp_group": group})
    state.pop("fc1._extra_state", None)
    assert state.keys() == {"fc1.weight", "fc1.bias", "fc1.adapter.A", "fc1.adapter.B"}
    assert state["fc1.adapter.A"].global_shape == (RANK, H)
    parts = state["fc1.adapter.B"].build()  # gate and up, each split over the ranks by itself
    assert [part.global_shape for part in parts] == [(2 * F, RANK)] * 2
    assert [part.global_offset for part in parts] == [(0, 0), (F, 0)]
