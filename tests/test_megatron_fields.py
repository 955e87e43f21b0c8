"""What is read from megatron-core's source is what its dataclasses say, in whatever version is installed."""

from __future__ import annotations

import ast
import typing
import warnings
from dataclasses import fields

import pytest

from megatron_peft import megatron_fields as module
from megatron_peft.argument_tables import RUN_FIELDS, SHAPE_FIELDS
from megatron_peft.config import ConfigurationError
from megatron_peft.megatron_fields import SOURCES, megatron_fields


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing here
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.transformer.transformer_config import TransformerConfig
    found = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    return {one.__name__: one for one in found}


@pytest.mark.parametrize("name", SOURCES)
def test_source_has_the_fields_of_the_class(name: str, classes: dict[str, type]) -> None:
    assert megatron_fields(name).keys() == {one.name for one in fields(classes[name]) if not one.name.startswith("_")}


@pytest.mark.parametrize("name", SHAPE_FIELDS + RUN_FIELDS)
def test_types_of_served_fields_are_the_annotations(name: str, classes: dict[str, type]) -> None:
    kind, choices = megatron_fields("TransformerConfig")[name].type_and_choices
    annotation = typing.get_type_hints(classes["TransformerConfig"])[name]
    members = [one for one in typing.get_args(annotation) if one is not type(None)] or [annotation]
    assert choices == (typing.get_args(members[0]) or typing.get_args(annotation) if choices else None)
    assert choices or members == [kind]


def test_help_is_the_first_sentence_under_a_field() -> None:
    assert megatron_fields("OptimizerConfig")["sgd_momentum"].help == "Momentum factor for SGD optimizer"


def test_names_of_megatrons_own_command_line_are_read() -> None:
    assert megatron_fields("TransformerConfig")["layernorm_epsilon"].flags == ("--norm-epsilon",)


def test_what_is_computed_beside_the_names_is_left_alone() -> None:
    metadata = "{'argparse_meta': {'arg_names': ['--x-y'], 'choices': [one.name for one in Scope]}}"
    (found,) = module._fields(ast.parse(f"class C:\n  x: int = field(metadata={metadata})").body[0])  # type: ignore[arg-type]
    assert found.flags == ("--x-y",)


def test_field_without_a_type_for_a_flag_says_so() -> None:
    with pytest.raises(TypeError, match="Callable"):
        _ = megatron_fields("TransformerConfig")["init_method"].type_and_choices


def test_annotations_of_newer_python_are_read() -> None:
    field = module.MegatronField("rate", "float | None", "", ())
    assert field.type_and_choices == (float, None)


def test_missing_megatron_core_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install megatron-core"):
        module.megatron_fields.__wrapped__("OptimizerConfig")
