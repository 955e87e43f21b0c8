"""What goes from a run's files into its cell's, and what is next, which follows from the files of the cells."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_peft.checkpoint.folders import TRACKER
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import records, results
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.process import checkpoints_folder
from megatron_peft.experiment.records import (
    MAX_LAYER_POINTS,
    MAX_POINTS,
    by_layer,
    cell_file,
    from_items,
    from_log,
    from_metrics,
    of_cell,
    read_records,
    source_version,
    write_parquet,
    write_record,
)
from megatron_peft.experiment.results import Result
from tests.experiment.small_experiment import experiment
from tests.recorded_calls import recorded_calls


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """Ranks 4 and 8, seeds 1, 2, 3; tuned with seed 1, scored. Only grids of rates grow."""
    return experiment(tmp_path, methods={"lora": {"grid": {"lora-rank": [4, 8]}}})[1][0]


def test_record_appears_whole_by_one_rename(tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that is killed while it writes leaves the old file or none, not a part."""
    cell, calls = group.tuning[0], recorded_calls(monkeypatch)
    write_record(tmp_path, of_cell(cell, "trained"))
    renamed = [path for call, path in calls if call == "replace"]
    assert renamed == [tmp_path / "cells" / f"{cell.key}.json"]


def test_records_of_older_and_newer_versions_are_read(tmp_path: Path, group: Group) -> None:
    record = of_cell(group.tuning[0], "trained")
    write_record(tmp_path, record)
    path = cell_file(tmp_path, record)
    values = {**json.loads(path.read_text()), "provenance": {}}
    del values["lambdas"]
    path.write_text(json.dumps(values))
    assert read_records(tmp_path) == {record.key: record}


def test_one_parquet_file_has_all_records_and_single_files_are_newer(tmp_path: Path, group: Group) -> None:
    first, second = (of_cell(cell, "trained", curves={"loss": [[1, 0.5, 2.0]]}) for cell in group.tuning)
    write_parquet(tmp_path / "cells.parquet", [first, replace(second, seconds=None, data={"a": "b"})])
    assert read_records(tmp_path) == {first.key: first, second.key: replace(second, seconds=None, data={"a": "b"})}
    write_record(tmp_path, replace(first, iterations=7))
    assert read_records(tmp_path)[first.key].iterations == 7


CHANGES = [
    ({"flags": 1}, "flags is 1: "),
    ({"settings": None}, "settings is None: "),
    ({"curves": 3}, "curves is 3: "),
    ({"curves": {"grad_norm": [[1, 0.5, "red"]]}}, r"curves.grad_norm.0.2\..* is red: "),
    ({"items": {"validation loss": [[1.0]]}}, "items.validation loss.0 is .1.0.: "),
    ({"grad_norms": {"by_layer": {"0": [{}]}}}, "grad_norms.by_layer.0.0 is {}: "),
    ({"status": "x"}, "status is x: "),
]


@pytest.mark.parametrize(("changes", "problem"), CHANGES)
def test_file_of_something_else_is_an_error(tmp_path: Path, group: Group, changes: dict, problem: str) -> None:
    record = of_cell(group.tuning[0], "trained")
    write_record(tmp_path, record)
    path = cell_file(tmp_path, record)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigurationError, match=rf"seed=1.json is not the record of a cell \({problem}"):
        read_records(tmp_path)


def test_damaged_or_misnamed_files_are_errors(tmp_path: Path, group: Group) -> None:
    record = of_cell(group.tuning[0], "trained")
    write_parquet(tmp_path / "cells.parquet", [record])
    content = (tmp_path / "cells.parquet").read_bytes()
    (tmp_path / "cells.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match="cells.parquet cannot be read"):
        read_records(tmp_path)
    (tmp_path / "cells.parquet").unlink()
    write_record(tmp_path, record)
    cell_file(tmp_path, record).rename(tmp_path / "cells" / "other.json")
    with pytest.raises(ConfigurationError, match="other.json is the record of tiny,talk,lora,lora-rank=4,seed=1"):
        read_records(tmp_path)


def test_lambdas_are_thinned_to_the_same_iterations_for_all_layers() -> None:
    found = by_layer([{"iteration": at, "lambda": {"a": at / 1000, "b": 0.12345}} for at in range(1, 101)], "lambda")
    assert len(found.iterations) <= MAX_LAYER_POINTS + 1
    assert found.iterations[0] == 1 and found.iterations[-1] == 100
    assert found.by_layer["a"][-1] == 0.1 and found.by_layer["b"][0] == 0.123
    assert {len(values) for values in found.by_layer.values()} == {len(found.iterations)}


def test_values_are_of_the_end_the_whole_run_and_the_score_and_items_are_kept(tmp_path: Path, group: Group) -> None:
    log = "test loss at iteration 2: 3.5E+00\n...\ntest loss at iteration 4: 2.500000E-01\n"
    assert from_log(log) == {"trainable_parameters": None, "test_loss": 0.25}
    assert from_log("test loss at iteration 4: not measured")["test_loss"] is None
    lines = [{"loss_sums": {"0": loss, "1": 2.0}, "num_tokens": {"0": 3, "1": 4}} for loss in (9.0, 1.23456789)]
    items = {"validation loss": from_items(lines)}
    assert items == {"validation loss": [[1.234568, 3], [2.0, 4]]} and from_items([]) == []
    assert from_items([*lines, {"loss_sums": {"0": None}, "num_tokens": {"0": 3}}]) == []
    curves = {"validation_loss": [[2, 0.5, 4.0], [4, 1.0, 1.0]]}
    values = {"validation_loss": 1.0, "test_loss": 0.25, "scores": {"BLEU": 9.0}, "curves": curves, "items": items}
    write_record(tmp_path, of_cell(group.tuning[0], "trained", **values))
    (record,) = read_records(tmp_path).values()
    found = {metric: record.value(metric) for metric in ("validation loss", "test loss", "area", "BLEU", "other")}
    assert found == {"validation loss": 1.0, "test loss": 0.25, "area": 2.5, "BLEU": 9.0, "other": None}
    assert record.items == items


def test_epoch_is_as_long_as_its_steps_and_a_killed_run_tells_no_parameters() -> None:
    peaks = {200: 9, 400: 5}  # the highest need not be the last
    lines = [
        {"iteration": at, "epoch": at / 200, "loss": 1.0, "step_seconds": 0.5, "peak_memory_bytes": peaks.get(at, 1)}
        for at in range(1, 401)
    ]
    found = from_metrics(lines)
    assert found["peak_memory_bytes"] == 9
    assert found["epoch_seconds"] == pytest.approx(100) and len(found["curves"]["loss"]) <= MAX_POINTS + 1


def progress(folder: Path, group: Group) -> Result:
    return results.progress(read_records(folder), group)


def end(folder: Path, *cells: Cell, loss: float | None = 1.0, **values: object) -> None:
    for cell in cells:
        write_record(folder, of_cell(cell, "trained", validation_loss=loss, **values))


def todo(folder: Path, group: Group) -> list[tuple[str, Cell]]:
    return [(one.kind, one.cell) for one in results.work(folder, read_records(folder), group)]


def save(folder: Path, *cells: Cell, iteration: int = 0) -> None:
    """Checkpoints of these cells."""
    for cell in cells:
        checkpoints_folder(folder, cell).mkdir(parents=True, exist_ok=True)
        (checkpoints_folder(folder, cell) / TRACKER).write_text(f"{iteration}\n")


def test_first_the_grid_and_no_seed_before_all_of_it(tmp_path: Path, group: Group) -> None:
    low, high = group.tuning
    assert todo(tmp_path, group) == [("train", low), ("train", high)]
    end(tmp_path, high)
    assert todo(tmp_path, group) == [("train", low)]


@pytest.mark.parametrize(("losses", "best"), [((2.0, 1.0), 1), ((1.0, 1.0), 0), ((math.nan, 9.0), 1), ((None, 9.0), 1)])
def test_least_validation_loss_is_chosen(tmp_path: Path, group: Group, losses: tuple, best: int) -> None:
    for cell, loss in zip(group.tuning, losses, strict=True):
        end(tmp_path, cell, loss=loss)
    tuned, *others = group.finals[best]
    save(tmp_path, tuned)
    assert progress(tmp_path, group).best == best
    assert todo(tmp_path, group) == [*(("train", cell) for cell in others), ("score", tuned)]


def test_scores_need_the_checkpoint_and_end_the_group(tmp_path: Path, group: Group) -> None:
    finals = group.finals[0]
    end(tmp_path, *group.tuning, *finals)
    assert todo(tmp_path, group) == [("train", cell) for cell in finals]
    save(tmp_path, *finals)
    assert todo(tmp_path, group) == [("score", cell) for cell in finals]
    save(tmp_path, *finals, iteration=7)  # of a training that is repeated
    assert todo(tmp_path, group) == [("train", cell) for cell in finals]
    save(tmp_path, *finals)
    for cell in finals:
        assert not progress(tmp_path, group).is_done
        end(tmp_path, cell, scores={"accuracy": 50.0})
    assert progress(tmp_path, group).is_done and todo(tmp_path, group) == []


def tuned(folder: Path, group: Group, loss_at: Callable[[dict[str, float]], float | None]) -> tuple[list[str], Result]:
    """The points in the order in which they are tried, each by itself, and the end of it; nothing is kept between."""
    tried = []
    while cells := [cell for kind, cell in todo(folder, group) if cell.seed == group.tuning_seed]:
        assert cells == [cell for _, cell in todo(folder, group)], "no final run while the grid grows"
        end(folder, cells[0], loss=loss_at({flag: float(value) for flag, value in cells[0].settings.items()}))
        tried.append(cells[0].point)
    return tried, progress(folder, group)


def grid_of(folder: Path, **grid: list[float]) -> Group:
    return experiment(folder, methods={"lora": {"grid": grid}}, tuning_seed=9)[1][0]


@pytest.mark.parametrize(
    ("rates", "best", "added"),
    [
        ([0.1, 0.2], 0.9, ["0.4", "0.8", "1.6"]),  # by 2, until the best has a worse one on both sides
        ([0.01, 0.1], 0.0009, ["0.001", "0.0001"]),  # by the grid's own ratio
        ([0.1, 0.2, 0.6], 0.7, ["1.2"]),  # which is not constant: by 2
        ([0.1, 0.2, 0.4], 0.2, []),
    ],
)
def test_a_grid_of_rates_grows_until_its_best_is_inside(tmp_path: Path, rates, best, added) -> None:
    group = grid_of(tmp_path, lr=rates)
    tried, now = tuned(tmp_path, group, lambda at: abs(math.log(at["lr"] / best)))
    assert tried == [f"lr={rate}" for rate in (*rates, *added)]
    assert now.edges == () and now.untried == () and "not tuned" not in now.chosen_point
    assert [cell for _, cell in todo(tmp_path, group)] == list(now.chosen) and len(now.chosen) == 3


def test_a_rate_is_not_followed_for_ever_and_is_not_tuned_then(tmp_path: Path) -> None:
    group = grid_of(tmp_path, lr=[0.1, 0.2])
    tried, now = tuned(tmp_path, group, lambda at: -at["lr"])
    assert tried[2:] == ["lr=0.4", "lr=0.8", "lr=1.6", "lr=3.2", "lr=6.4", "lr=12.8"]
    assert now.edges == ("lr",) and now.chosen_point == "lr=12.8, not tuned"
    assert [cell for _, cell in todo(tmp_path, group)] == list(now.chosen), "it is run all the same"


def test_a_rate_of_nothing_is_no_start_of_a_grid(tmp_path: Path) -> None:
    tried, now = tuned(tmp_path, grid_of(tmp_path, lr=[0, 0.1]), lambda at: at["lr"])
    assert tried == ["lr=0", "lr=0.1"] and now.edges == ()


def test_rates_grow_beside_one_another_and_other_numbers_do_not(tmp_path: Path) -> None:
    group = grid_of(tmp_path, **{"lr": [1, 2], "peft-lr-rotation": [1, 2], "lora-rank": [4, 8]})
    tried, now = tuned(
        tmp_path, group, lambda at: abs(at["lr"] - 8) + abs(at["peft-lr-rotation"] - 0.25) - at["lora-rank"]
    )
    assert now.chosen[0].point == "lr=8 peft-lr-rotation=0.25 lora-rank=8" and now.edges == ()
    assert not [point for point in tried if point.endswith(("=16", "=2 lora-rank=4 "))]
    assert len(tried) < 30


def test_a_rate_whose_loss_is_not_finite_has_been_tried_and_one_that_failed_has_not(tmp_path: Path) -> None:
    group = grid_of(tmp_path, lr=[0.1, 0.2])
    end(tmp_path, group.tuning[0], loss=2.0)
    end(tmp_path, group.tuning[1], loss=1.0)
    beyond = progress(tmp_path, group).untried
    assert [cell.point for cell in beyond] == ["lr=0.4"]
    write_record(tmp_path, of_cell(beyond[0], "failed"))
    assert progress(tmp_path, group).untried == beyond and progress(tmp_path, group).edges == ("lr",)
    write_record(tmp_path, of_cell(beyond[0], "diverged"))
    assert progress(tmp_path, group).untried == progress(tmp_path, group).edges == ()


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_only_a_single_point_needs_no_finite_loss(tmp_path: Path, group: Group, loss: float | None) -> None:
    end(tmp_path, *group.tuning, loss=loss)
    assert progress(tmp_path, group).best is None and todo(tmp_path, group) == []
    (single,) = experiment(tmp_path, methods={"lora": {}})[1]
    end(tmp_path, single.tuning[0], loss=loss)
    assert progress(tmp_path, single).best == 0


@pytest.mark.parametrize(("changes", "told"), [("", "abc"), (" M a.py\n", "abc with changes")])
def test_the_commit_says_whether_the_source_has_changes(monkeypatch, changes, told):
    def git(words, **_):
        return "abc\n" if "rev-parse" in words else changes

    monkeypatch.setattr(records.subprocess, "check_output", git)
    assert source_version() == {"commit": told}
