"""The base model: what contradicts itself is told with its flag."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.model_config import ModelConfig

CONTRADICTIONS = [
    ({}, "no base model: --pretrained-checkpoint"),
    ({"pretrained_checkpoint": "m", "transformer": {"hidden_dropout": 1.5}}, "--hidden-dropout is 1.5"),
    (
        {"pretrained_checkpoint": "m", "transformer": {"recompute_granularity": "full"}},
        "--recompute-granularity full needs --recompute-method",
    ),
    (
        {"pretrained_checkpoint": "m", "transformer": {"recompute_method": "block", "recompute_num_layers": 1}},
        "--recompute-method, --recompute-num-layers belong to --recompute-granularity full",
    ),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        ModelConfig(**values)
    assert len(caught.value.problems) == 1
