"""The log: what contradicts itself is told with its flag."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config_error import ConfigurationError
from megatron_peft.logging_config import LoggingConfig

CONTRADICTIONS = [
    ({"wandb_project": "p"}, "--wandb-project p needs --wandb-exp-name"),
    ({"log_interval": 0}, "--log-interval is 0"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_a_contradiction_is_one_problem(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        LoggingConfig(**values)
    assert len(caught.value.problems) == 1
