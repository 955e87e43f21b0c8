"""A record reads back as it was written, and what cannot be read is named."""

from __future__ import annotations

import json

import pytest

from megatron_peft.checkpoint.folders import RECORD
from megatron_peft.checkpoint.record import read_record, read_run_record
from megatron_peft.config import ConfigurationError
from tests.checkpoint.records import make_record


def test_a_record_reads_back(tmp_path):
    record = make_record()
    (tmp_path / RECORD).write_text(record.to_json())
    assert read_record(tmp_path) == record
    assert read_run_record(tmp_path) == record


def test_adapter_config_names_method_numbers_and_base():
    config = json.loads(make_record().adapter_config())
    assert config["method"] == "lora" and config["lora_rank"] == 4
    assert config["base_model_name_or_path"] == "bases/base"
    assert config["adapted_layers"] == ["decoder.layers.0.mlp.linear_fc1"]


def test_a_newer_format_asks_for_an_update(tmp_path):
    fields = json.loads(make_record().to_json())
    (tmp_path / RECORD).write_text(json.dumps({**fields, "format_version": 2}))
    with pytest.raises(ConfigurationError, match="format 2 .* update"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"format_version": 1}'])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ConfigurationError, match=f"{RECORD} cannot be read"):
        read_record(tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no checkpoint"):
        read_run_record(tmp_path)
