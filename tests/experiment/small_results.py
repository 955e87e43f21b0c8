"""Results of an experiment with made-up cells: one model and task, three methods, three seeds."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.experiment import records
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.records import ByLayer, CellRecord, as_json, of_cell, write_record
from megatron_peft.experiment.report import build_report, markdown
from megatron_peft.experiment.results import Results, read_results
from megatron_peft.experiment.spec import EXPERIMENT_FILE
from tests.experiment.small_experiment import content, experiment

METHODS = {
    "lora": {"grid": {"lr": [0.1, 0.4]}},
    "lora-ga": {"grid": {"lr": [0.1, 0.4]}},
    "hybrid": {"grid": {"lr": [1, 2]}},
}
LOSSES = {"lora": 2.0, "lora-ga": 1.5, "hybrid": 1.6}  # with the better rate, at the end, of seed 0
BETTER = {"lora": "0.4", "lora-ga": "0.1", "hybrid": "2"}
SPREAD = {1: 0.01, 2: 0.02, 3: 0.06}  # seed -> what it adds to the loss
COMMIT = {"commit": "c" * 40}
LAYERS = ("decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.self_attention.linear_qkv")


def write_cells(folder: Path, **changes: Any) -> Path:
    """A folder as the runner leaves it: every point of the grid with seed 1, all seeds of the better ones."""
    found, groups = experiment(folder, **{"methods": METHODS, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "source_version", lambda: COMMIT)  # git is slow
        for group in groups:
            for cell in (*group.tuning, *(cell for cells in group.finals for cell in cells)):
                if cell.seed == found.tuning_seed or cell.settings["lr"] == BETTER[cell.method]:
                    score = as_json(group.task.score) if group.task.score else {}
                    write_record(folder, record_of(cell, score=score))
    (folder / EXPERIMENT_FILE).write_text(found.text)
    return folder


def record_of(cell: Cell, **changes: Any) -> CellRecord:
    is_better = cell.settings["lr"] == BETTER[cell.method]
    loss = LOSSES[cell.method] + SPREAD[cell.seed] * (1 + (cell.method == "lora")) + (not is_better)
    lambdas = ByLayer([20, 40], {LAYERS[0]: [0.5, 0.3], LAYERS[1]: [0.5, 0.8]})
    values: dict[str, Any] = {
        **{"validation_loss": loss, "iterations": 40, "step_seconds": 0.5, "epoch_seconds": 60.0},
        **{"trainable_parameters": 1000, "peak_memory_bytes": 2_000_000_000, "cpu_seconds": 90.0},
        "curves": {
            "grad_norm": [[at, at / 40, 1 + 1 / at] for at in range(1, 41)],
            "validation_loss": [[10, 0.25, loss + 1], [20, 0.5, loss + 0.5], [40, 1.0, loss]],
        },
        "scores": {"accuracy": 100 - 10 * loss} if is_better else {},
        "lambdas": lambdas if cell.method == "hybrid" else ByLayer(),
        "grad_norms": ByLayer([20, 40], {"0": [loss, loss + 2], "1": [0.5, 0.5]}),
    }
    return replace(of_cell(cell, "trained", **{**values, **changes}), versions={"python": "3.11", **COMMIT})


def results(folder: Path, **changes: Any) -> Results:
    return read_results(write_cells(folder, **changes))


def as_the_paper(folder: Path, **changes: Any) -> Results:
    """As `results`, of a model and a task that the paper has too."""
    tasks = {"talk": {**content()["tasks"]["talk"], "paper": "GLUE"}}
    models = {"tiny": {**content()["models"]["tiny"], "paper": "BloomZ-7B1"}}
    return results(folder, **{"tasks": tasks, "models": models, **changes})


if __name__ == "__main__":  # writes small_report.md again
    with tempfile.TemporaryDirectory() as folder:
        text = markdown(build_report(as_the_paper(Path(folder)), "hybrid"))
    Path(__file__).with_name("small_report.md").write_text(text)
