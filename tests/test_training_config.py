"""The length of the run is given once."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.training_config import TrainingConfig

CONTRADICTIONS = [
    ({}, "none given"),
    ({"train_iters": 1, "train_epochs": 1}, "given: --train-iters, --train-epochs"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        TrainingConfig(**values)
    assert len(caught.value.problems) == 1
