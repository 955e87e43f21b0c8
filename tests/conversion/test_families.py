from __future__ import annotations

from typing import get_args, get_type_hints

from megatron_peft.conversion.families import FAMILIES, rules_for
from megatron_peft.models.huggingface import FAMILIES as READABLE
from megatron_peft.models.shape import ModelShape


def test_every_family_whose_shape_is_read_has_rules() -> None:
    assert FAMILIES.keys() == READABLE.keys()
    assert FAMILIES.keys() <= set(get_args(get_type_hints(ModelShape)["architecture"]))


def test_rules_are_found_by_megatron_name() -> None:
    rules = rules_for(ModelShape("llama", 2, 5, 6, 2, 2, 4, 10, 64))
    assert all(name == rule.name for name, rule in rules.items())
    assert len(rules) == 3 + 2 * 6
