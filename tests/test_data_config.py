"""The data: what contradicts itself is told with its flag."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.data_config import DataConfig

DATA = {"train_data_path": ("a.jsonl",)}
CONTRADICTIONS = [
    ({}, "no training data"),
    ({**DATA, "data_path": ("p",)}, "exclude one another"),
    ({**DATA, "split": "9,1"}, "--split cuts"),
    ({"data_path": ("p",), "split": "9;1"}, "--split 9;1"),
    ({"data_path": ("p",), "split": "0,0,0"}, "--split 0,0,0"),
    ({"data_path": ("p",), "split": "1,1,1,1"}, "--split 1,1,1,1"),
    ({"train_data_path": ("a.jsonl", "b")}, "--train-data-path mixes .*a.jsonl b"),
    ({"data_path": ("p",), "pack_sequences": True}, "--pack-sequences"),
    ({**DATA, "tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
    ({**DATA, "tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        DataConfig(**values)
    assert len(caught.value.problems) == 1
