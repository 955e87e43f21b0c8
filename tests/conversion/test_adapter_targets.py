"""Names of layers, as short as they can be."""

from __future__ import annotations

from megatron_peft.conversion.adapter_targets import shortest_targets


def test_a_kind_that_all_layers_have_is_named_by_its_end() -> None:
    names = ["layers.0.attention.q", "layers.0.mlp.up", "layers.1.attention.q"]
    assert shortest_targets(names, num_layers=2) == ["q", "layers.0.mlp.up"]
