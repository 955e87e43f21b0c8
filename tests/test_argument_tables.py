"""The tables fit one another, our dataclasses and megatron-core's."""

from __future__ import annotations

from dataclasses import fields

from megatron_peft.argument_tables import (
    PATH_FIELDS,
    RUN_SWITCHES,
    SHAPE_CLAIMS,
    SHAPE_FIELDS,
    SHAPE_VALUES,
    methods_of,
)
from megatron_peft.config import PEFT_METHODS, PeftConfig
from megatron_peft.megatron_fields import megatron_fields
from megatron_peft.models.shape_check import CLAIMS, VALUES
from megatron_peft.served_flags import sections


def test_paths_are_fields_that_exist() -> None:
    assert PATH_FIELDS <= {one.name for config_class in sections().values() for one in fields(config_class)}


def test_switches_set_fields_of_megatron_core() -> None:
    assert {field for field, _, _ in RUN_SWITCHES.values()} <= megatron_fields("TransformerConfig").keys()


def test_every_shape_flag_can_be_compared_with_a_checkpoint() -> None:
    assert {*SHAPE_FIELDS, *SHAPE_VALUES, "vocab_size"} == VALUES.keys()
    assert SHAPE_CLAIMS.keys() == CLAIMS.keys()


def test_every_peft_flag_belongs_to_a_method() -> None:
    owners = {one.name: methods_of(one.name) for one in fields(PeftConfig) if one.name != "method"}
    assert [name for name, methods in owners.items() if not methods or not set(methods) <= set(PEFT_METHODS)] == []
