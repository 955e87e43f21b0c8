from __future__ import annotations

from pathlib import Path

from megatron_peft.experiment.cells import command_line
from tests.experiment.small_experiment import experiment


def test_flags_of_yaml_become_words() -> None:
    flags = {"lr": "3e-4", "bf16": True, "pack-sequences": False, "split": None, "peft-target-modules": ["a", "b"]}
    assert command_line(flags) == ("--lr", "3e-4", "--bf16", "--peft-target-modules", "a", "b")


def test_grid_is_every_combination(tmp_path: Path) -> None:
    _, (group,) = experiment(tmp_path, methods={"lora": {"grid": {"lr": [0.1, 0.2], "lora-rank": [4, 8]}}})
    assert [dict(cell.settings) for cell in group.tuning] == [
        {"lr": lr, "lora-rank": rank} for lr in ("0.1", "0.2") for rank in ("4", "8")
    ]


def test_method_without_a_grid_is_one_cell(tmp_path: Path) -> None:
    _, (group,) = experiment(tmp_path, methods={"lora": {}})
    assert [cell.key for cell in group.tuning] == ["tiny,talk,lora,seed=1"]


def test_tuning_cell_is_the_final_one_of_its_seed(tmp_path: Path) -> None:
    _, (group, _) = experiment(tmp_path)
    assert [finals[0] for finals in group.finals] == list(group.tuning)


def test_cell_has_the_flags_of_all_places(tmp_path: Path) -> None:
    _, (group, _) = experiment(tmp_path)
    assert group.tuning[0].flags == (
        *("--train-iters", "2", "--pretrained-checkpoint", "nowhere", "--train-data-path", "train.jsonl"),
        *("--valid-data-path", "valid.jsonl"),
        *("--peft-method", "lora", "--lr", "0.1", "--seed", "1"),
    )
