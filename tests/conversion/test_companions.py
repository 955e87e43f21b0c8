"""The small files beside weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.conversion.companions import config_of_shape, copy_companions, set_stored_type, write_config
from megatron_peft.models.huggingface import read_shape
from megatron_peft.models.shape import ModelShape, RopeScaling
from tests.conversion.megatron_folders import ODD, bloom_shapes, llama_shapes


@settings(max_examples=30)
@given(st.one_of(llama_shapes(), bloom_shapes()))
def test_a_made_config_gives_the_shape_back(tmp_path_factory, shape: ModelShape) -> None:
    folder = tmp_path_factory.mktemp("config")
    write_config(folder, config_of_shape(shape))
    assert read_shape(folder) == shape


def test_scaled_frequencies_survive(tmp_path: Path) -> None:
    shape = dataclasses.replace(ODD, rotary_base=20000.0, rope_scaling=RopeScaling(4.0, 1.0, 3.0, 32))
    write_config(tmp_path, config_of_shape(shape))
    assert read_shape(tmp_path) == shape


def test_weights_code_and_folders_are_not_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir(), (source / "tokenizer_parts").mkdir()
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    for name in {*kept, "model.safetensors", "modeling_x.py", "common.pt", ".metadata"}:
        (source / name).write_text(name)
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == kept


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_is_set_under_the_key_that_is_there(key: str, tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "llama", key: "float32"})
    set_stored_type(tmp_path, [torch.bfloat16, torch.bfloat16])
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "llama", key: "bfloat16"}


def test_a_config_that_says_so_already_stays_byte_for_byte(tmp_path: Path) -> None:
    text = '{"dtype":  "float32"}'
    (tmp_path / "config.json").write_text(text)
    set_stored_type(tmp_path, [torch.float32])
    assert (tmp_path / "config.json").read_text() == text


def test_several_types_say_nothing(tmp_path: Path) -> None:
    write_config(tmp_path, {"dtype": "float16"})
    set_stored_type(tmp_path, [torch.float32, torch.bfloat16])
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "float16"}
