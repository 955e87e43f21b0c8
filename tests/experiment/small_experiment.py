"""A small experiment whose training and scoring are the fake beside this file."""

from pathlib import Path
from typing import Any

import yaml

from megatron_peft.experiment.cells import Group, groups
from megatron_peft.experiment.spec import Experiment, read_experiment

FAKE_TRAINING = (str(Path(__file__).with_name("fake_training.py")),)


def content(**changes: Any) -> dict[str, Any]:
    """Of the YAML file: one model and task, two methods with two rates, three seeds."""
    return {
        "title": "Small",
        "flags": {"train-iters": 2},
        "models": {"tiny": {"flags": {"pretrained-checkpoint": "nowhere"}}},
        "tasks": {
            "talk": {
                "flags": {"train-data-path": "train.jsonl", "valid-data-path": "valid.jsonl"},
                "score": {
                    "command": f"python {FAKE_TRAINING[0]} score {{output}} {{checkpoints}} {{flags}}",
                    "metrics": {"accuracy": {"path": "results/task/acc,none"}},
                },
            }
        },
        "methods": {"lora": {"grid": {"lr": [0.1, 0.4]}}, "boft": {"grid": {"lr": [0.2, 0.5]}}},
        "seeds": [1, 2, 3],
        "tuning_seed": 1,
        **changes,
    }


def experiment(folder: Path, **changes: Any) -> tuple[Experiment, list[Group]]:
    path = write(folder, content(**changes))
    found = read_experiment(path)
    return found, groups(found)


def write(folder: Path, values: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path
