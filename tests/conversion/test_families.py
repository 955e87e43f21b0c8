from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from megatron_peft.conversion.adapter_factors import is_weight, layer_of, modules_of
from megatron_peft.conversion.families import FAMILIES, rules_for
from megatron_peft.models.huggingface import FAMILIES as READABLE
from megatron_peft.models.shape import ModelShape


def test_every_family_whose_shape_is_read_has_rules() -> None:
    assert FAMILIES.keys() == READABLE.keys()
    assert FAMILIES.keys() <= set(get_args(get_type_hints(ModelShape)["architecture"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_that_targets_go_by_are_those_of_the_rules(family: str) -> None:
    rules = rules_for(ModelShape(family, 1, 24, 96, 2, 2, 12, 10, 64)).values()  # type: ignore[arg-type]
    layers = {layer_of(rule): modules_of(rule) for rule in rules if is_weight(rule) and ".linear_" in rule.name}
    found = {part.rpartition(".")[2]: layer.rpartition(".")[2] for layer, parts in layers.items() for part in parts}
    assert found == READABLE[family].modules


def test_rules_are_found_by_megatron_name() -> None:
    rules = rules_for(ModelShape("llama", 2, 5, 6, 2, 2, 4, 10, 64))
    assert all(name == rule.name for name, rule in rules.items())
    assert len(rules) == 3 + 2 * 6
