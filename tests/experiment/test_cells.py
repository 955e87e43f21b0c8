"""The cells of a grid, and their flags, which are checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.cells import command_line
from megatron_peft.experiment.flag_check import check_flags
from tests.experiment.small_experiment import experiment


def test_flags_of_yaml_become_words() -> None:
    flags = {"lr": "3e-4", "bf16": True, "pack-sequences": False, "split": None, "peft-target-modules": ["a", "b"]}
    assert command_line(flags) == ("--lr", "3e-4", "--bf16", "--peft-target-modules", "a", "b")


def test_grid_is_every_combination_or_one_cell(tmp_path: Path) -> None:
    grid = {"lr": [0.1, 0.2], "lora-rank": [4, 8]}
    _, (tuned, plain) = experiment(tmp_path, methods={"lora": {"grid": grid}, "boft": {"grid": {"lr": [1, 2, 3, 4]}}})
    assert [dict(cell.settings) for cell in tuned.tuning] == [
        {"lr": lr, "lora-rank": rank} for lr in ("0.1", "0.2") for rank in ("4", "8")
    ]
    assert [finals[0] for finals in plain.finals] == list(plain.tuning), "the tuning cell is a final one of its seed"
    _, (single,) = experiment(tmp_path, methods={"lora": {}})
    assert [cell.key for cell in single.tuning] == ["tiny,talk,lora,seed=1"]


def test_cell_has_the_flags_of_all_places(tmp_path: Path) -> None:
    _, (group, _) = experiment(tmp_path)
    assert group.tuning[0].flags == (
        *("--train-iters", "2", "--pretrained-checkpoint", "nowhere", "--train-data-path", "train.jsonl"),
        *("--valid-data-path", "valid.jsonl"),
        *("--peft-method", "lora", "--lr", "0.1", "--seed", "1"),
    )


@pytest.mark.parametrize("flags", [{}, {"save-interval": 1}])
def test_flags_that_pretrain_peft_takes_pass_in_the_folder_that_the_runner_gives(tmp_path: Path, flags: Any) -> None:
    check_flags(experiment(tmp_path, flags={"train-iters": 2, **flags})[1])


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
def test_wrong_flags_are_told_once_before_anything_runs(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_flags(experiment(tmp_path, **changes)[1])
    assert sum("leraning-rate" in problem for problem in caught.value.problems) <= 1, "though many cells have it"
