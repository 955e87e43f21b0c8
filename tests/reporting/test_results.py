from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import process
from megatron_peft.experiment.record import cell_file, of_cell, write_record
from megatron_peft.reporting.results import VALIDATION_LOSS, copy_results, metrics, read_results
from tests.reporting.small_results import LAYERS, record_of, results, write_cells


def test_runs_are_those_of_the_rate_with_the_least_loss(tmp_path: Path) -> None:
    lora, lora_ga, _ = results(tmp_path).all
    assert (lora.settings, lora_ga.settings) == ({"lr": "0.4"}, {"lr": "0.1"})
    assert lora.values("accuracy") == pytest.approx({1: 79.8, 2: 79.6, 3: 78.8})
    assert lora_ga.values(VALIDATION_LOSS) == pytest.approx({1: 1.51, 2: 1.52, 3: 1.56})


def test_metrics_are_the_loss_and_the_scores(tmp_path: Path) -> None:
    assert metrics(results(tmp_path).experiment.tasks[0]) == {VALIDATION_LOSS: False, "accuracy": True}


def test_a_run_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    write_cells(tmp_path)
    found = read_results(tmp_path)
    cell_file(tmp_path, found.all[0].group.finals[1][2]).unlink()
    found = read_results(tmp_path)
    assert list(found.all[0].finals) == [1, 2] and found.num_finals() == (8, 9)


def test_a_failed_run_is_not_a_result(tmp_path: Path) -> None:
    found = results(tmp_path)
    cell = found.all[0].group.finals[1][2]
    write_record(tmp_path, cell, of_cell(cell, "failed", reason="killed"))
    assert list(read_results(tmp_path).all[0].finals) == [1, 2]


def test_cells_written_without_lambdas_get_them_from_their_run(tmp_path: Path) -> None:
    hybrid = results(tmp_path).all[2]
    cell = hybrid.group.finals[1][0]
    write_record(tmp_path, cell, record_of(cell, lambdas={}))
    path = process.checkpoints(tmp_path, cell) / process.LAMBDA_FILE
    path.parent.mkdir(parents=True)
    lines = [{"iteration": at, "lambda": {LAYERS[0]: 0.5, LAYERS[1]: at / 10}} for at in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_results(tmp_path).all[2].finals[1].lambdas
    assert found == {"iterations": [1, 2], "by_layer": {LAYERS[0]: [0.5, 0.5], LAYERS[1]: [0.1, 0.2]}}


def test_copy_gives_the_same_results(tmp_path: Path) -> None:
    found = results(tmp_path)
    copy_results(found, tmp_path / "copy")
    copied = read_results(tmp_path / "copy")
    assert [one.finals for one in copied.all] == [one.finals for one in found.all]
    assert [one.tuning for one in copied.all] == [one.tuning for one in found.all]


def test_missing_experiment_says_how_to_name_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="experiment.yaml is not there: .* with --experiment"):
        read_results(tmp_path)


def test_cells_of_other_flags_are_no_results(tmp_path: Path) -> None:
    write_cells(tmp_path)
    path = tmp_path / "experiment.yaml"
    path.write_text(path.read_text().replace("train-iters: 2", "train-iters: 3"))
    with pytest.raises(ConfigurationError, match="holds no cell of .*: cells count while their flags are those"):
        read_results(tmp_path)
