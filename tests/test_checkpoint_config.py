"""Checkpoints: what needs a folder asks for it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.checkpoint_config import CheckpointConfig
from megatron_peft.config_error import ConfigurationError

CONTRADICTIONS = [
    ({"save_interval": 5}, "--save-interval 5 needs --save"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        CheckpointConfig(**values)
    assert len(caught.value.problems) == 1
