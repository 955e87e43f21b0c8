"""Settings of tools/evaluate.py; whole evaluations are in test_harness.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.harness_run import HarnessSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": 2.5}, "--limit is 2.5; it is a number of questions, or below 1 a share"),
        ({"limit": 0}, "--limit is 0; it must be above 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"num_fewshot": -1}, "--num-fewshot is -1; it cannot be negative"),
    ],
)
def test_values_out_of_range_are_told(values, message):
    with pytest.raises(ConfigurationError, match=message):
        HarnessSettings(["task"], "out.json", **values)


def test_files_lie_beside_the_results():
    settings = HarnessSettings(["task"], "runs/scores.json", limit=0.5)
    assert settings.beside("requests") == Path("runs/scores.requests.jsonl")
