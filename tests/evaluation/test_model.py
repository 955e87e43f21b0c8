"""Ends and fingerprints of a model; loading is in test_harness.py."""

from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.model import end_ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('{"eos_token_id": 2}', {2}),
        ('{"eos_token_id": [2, 5]}', {2, 5}),
        ("{}", set()),
        ('{"eos_token_id": null}', set()),
    ],
)
def test_a_model_may_name_several_ends(tmp_path, text, ids):
    (tmp_path / "generation_config.json").write_text(text)
    assert end_ids(str(tmp_path)) == ids


def test_a_model_without_such_a_file_names_none(tmp_path):
    assert end_ids(str(tmp_path)) == frozenset()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="generation_config.json cannot be read"):
        end_ids(str(tmp_path))
