from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.flag_check import check_flags
from tests.experiment.small_experiment import experiment


def test_flags_that_pretrain_peft_takes_pass(tmp_path: Path) -> None:
    check_flags(experiment(tmp_path)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"lorra": {}}}, "tiny,talk,lorra,seed=1: --peft-method: .*lorra"),
        ({"flags": {"train-iters": 2, "leraning-rate": 1}}, "--leraning-rate is not a known flag"),
        ({"methods": {"full": {"grid": {"lora-rank": [4]}}}}, "--lora-rank belongs to --peft-method lora"),
        ({"methods": {"lora": {"grid": {"lr": ["fast"]}}}}, "--lr: .*fast"),
        ({"models": {"big": {"processes": 3, "flags": {"tensor-model-parallel-size": 2}}}}, "3 processes cannot hold"),
    ],
)
def test_wrong_flags_are_told_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_flags(experiment(tmp_path, **changes)[1])


def test_flags_may_rely_on_the_folder_that_the_runner_gives(tmp_path: Path) -> None:
    check_flags(experiment(tmp_path, flags={"train-iters": 2, "save-interval": 1})[1])


def test_problem_of_many_cells_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_flags(experiment(tmp_path, flags={"train-iters": 2, "leraning-rate": 1})[1])
    assert sum("leraning-rate" in problem for problem in caught.value.problems) == 1
