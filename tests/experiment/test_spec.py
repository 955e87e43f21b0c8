"""An experiment is checked however it came about; what its file's author is told is in test_spec_file.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.spec import Choice, Experiment, budget, default_folder, grid_size

DATA = {"train-data-path": "train.jsonl", "valid-data-path": "valid.jsonl"}
TASK = Choice("talk", {**DATA, "seq-length": 64})


def made(**changes: Any) -> Experiment:
    values: dict[str, Any] = {
        "name": "small",
        "title": "Small",
        "flags": {"train-iters": 2, "seq-length": 32, "log-interval": 1},
        "models": (Choice("tiny", {}),),
        "tasks": (TASK,),
        "methods": (Choice("lora", {"lora-rank": 4}),),
        "seeds": (1, 2),
        "tuning_seed": 1,
    }
    return Experiment(**{**values, **changes})


def test_grid_is_as_large_as_the_product_of_its_values() -> None:
    assert grid_size(Choice("lora", {}, {"lr": (1, 2, 3), "lora-rank": (4, 8)})) == 6
    assert grid_size(Choice("lora", {})) == 1


def test_budget_is_what_all_methods_share_and_the_task_has_the_last_word() -> None:
    shared = made(flags={"train-iters": 2, "log-interval": 1})
    model = Choice("tiny", {"clip-grad": 0.5, "num-layers": 2})
    assert budget(shared, model, TASK) == {"train-iters": 2, "clip-grad": 0.5, **DATA, "seq-length": 64}


def test_same_flag_in_two_tasks_is_no_clash() -> None:
    made(flags={}, tasks=(TASK, Choice("chat", TASK.flags)))


def test_same_flag_in_two_places_of_one_cell_is_told_for_each_cell() -> None:
    with pytest.raises(ConfigurationError) as caught:
        made(models=(Choice("tiny", {}), Choice("small", {})))
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0] == "--seq-length is in flags and in tasks.talk.flags: leave it in one of the two."


def test_methods_have_one_budget() -> None:
    with pytest.raises(ConfigurationError, match="methods.lora: --eval-iters must be the same for all methods"):
        made(flags={}, methods=(Choice("lora", {"eval-iters": 4}),))


def test_folder_is_the_experiments_name() -> None:
    assert default_folder(made(flags={})) == Path("runs/experiments/small")


@pytest.mark.parametrize("flag", ["train-iters", "lr-decay-iters", "lr-warmup-samples", "min-lr", "clip-grad", "split"])
def test_schedule_and_budget_are_not_a_methods(flag: str) -> None:
    with pytest.raises(ConfigurationError, match=f"methods.lora: --{flag} must be the same for all methods"):
        made(flags={"log-interval": 1}, methods=(Choice("lora", {flag: 5}),))


def test_grid_that_nothing_is_validated_for_is_refused() -> None:
    tuned = (Choice("lora", {}, {"lr": (1, 2)}),)
    unvalidated = Choice("talk", {"train-data-path": "train.jsonl"})
    with pytest.raises(ConfigurationError, match="tasks.talk: .* with models.tiny nothing is validated: give"):
        made(tasks=(unvalidated,), methods=tuned)
    made(tasks=(unvalidated,))
    made(tasks=(unvalidated,), methods=tuned, models=(Choice("tiny", {"data-path": "prefix"}),))
