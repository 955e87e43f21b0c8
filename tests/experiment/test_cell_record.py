"""What goes from a run's files into its cell's, and what is next, which follows from the files of the cells."""

import json
import math
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import cell_record
from megatron_peft.experiment.cell_record import (
    MOST_LAMBDAS,
    MOST_POINTS,
    cell_file,
    from_lambdas,
    from_metrics,
    of_cell,
    read_file,
    source_version,
    trainable_parameters,
    write_record,
)
from megatron_peft.experiment.process import TRACKER, checkpoints_folder
from megatron_peft.experiment.results import progress, work
from megatron_peft.experiment.spec import Cell, Group
from tests.experiment.small_experiment import experiment
from tests.recorded_calls import recorded_calls


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """Rates 0.1 and 0.4, seeds 1, 2, 3; tuned with seed 1, scored."""
    return experiment(tmp_path)[1][0]


def test_record_appears_whole_by_one_rename(tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that is killed while it writes leaves the old file or none, not a part."""
    cell, calls = group.tuning[0], recorded_calls(monkeypatch)
    write_record(tmp_path, cell, of_cell(cell, "trained"))
    renamed = [path for call, path in calls if call == "replace"]
    assert renamed == [tmp_path / "cells" / f"{cell.key}.json"]


def test_record_written_before_there_were_lambdas_is_read(tmp_path: Path, group: Group) -> None:
    cell = group.tuning[0]
    write_record(tmp_path, cell, of_cell(cell, "trained"))
    (path,) = (tmp_path / "cells").iterdir()
    text = path.read_text()
    fields = [line for line in text.splitlines() if not line.startswith((' "lambdas"', ' "sha256"'))]
    path.write_text("\n".join(fields).replace(",\n}", "\n}"))
    assert path.read_text() != text and read_file(path).lambdas == {}


@pytest.mark.parametrize("field", ["scores", "validation_loss", "versions", "provenance", "flags"])
def test_record_that_was_edited_is_refused(tmp_path: Path, group: Group, field: str) -> None:
    write_record(tmp_path, group.tuning[0], of_cell(group.tuning[0], "trained", scores={"BLEU": 14.0}))
    path = cell_file(tmp_path, group.tuning[0])
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, field: {"BLEU": 15.0}}))
    with pytest.raises(ConfigurationError, match="was changed after it was written: remove it"):
        read_file(path)


@pytest.mark.parametrize("sources", [None, [], {"training": 1}, {"training": {"cell_sha256": "", "data_sha256": 1}}])
def test_file_of_something_else_is_an_error(tmp_path: Path, group: Group, sources: object) -> None:
    write_record(tmp_path, group.tuning[0], of_cell(group.tuning[0], "trained"))
    values = json.loads(cell_file(tmp_path, group.tuning[0]).read_text())
    del values["sha256"]
    values |= {"provenance": sources} if sources is not None else {"flags": 1}
    (tmp_path / "x.json").write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="x.json is not the file of a cell"):
        read_file(tmp_path / "x.json")


def test_lambdas_are_thinned_to_the_same_iterations_for_all_layers() -> None:
    found = from_lambdas([{"iteration": at, "lambda": {"a": at / 1000, "b": 0.12345}} for at in range(1, 101)])
    assert len(found["iterations"]) <= MOST_LAMBDAS + 1
    assert found["iterations"][0] == 1 and found["iterations"][-1] == 100
    assert found["by_layer"]["a"][-1] == 0.1 and found["by_layer"]["b"][0] == 0.123
    assert {len(values) for values in found["by_layer"].values()} == {len(found["iterations"])}


def test_epoch_is_as_long_as_its_steps_and_a_killed_run_tells_no_parameters() -> None:
    assert trainable_parameters("killed") is None
    lines = [{"iteration": at, "epoch": at / 400, "loss": 1.0, "step_seconds": 0.5} for at in range(1, 401)]
    found = from_metrics(lines)
    assert found["epoch_seconds"] == pytest.approx(200) and len(found["curves"]["loss"]) <= MOST_POINTS + 1


def end(folder: Path, *cells: Cell, loss: float | None = 1.0, **values: object) -> None:
    for cell in cells:
        write_record(folder, cell, of_cell(cell, "trained", validation_loss=loss, **values))


def todo(folder: Path, group: Group) -> list[tuple[str, Cell]]:
    return [(one.kind, one.cell) for one in work(folder, group)]


def save(folder: Path, *cells: Cell) -> None:
    """Checkpoints of these cells."""
    for cell in cells:
        checkpoints_folder(folder, cell).mkdir(parents=True, exist_ok=True)
        (checkpoints_folder(folder, cell) / TRACKER).touch()


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
    for cell in finals:
        assert not progress(tmp_path, group).is_done
        end(tmp_path, cell, scores={"accuracy": 50.0})
    assert progress(tmp_path, group).is_done and todo(tmp_path, group) == []


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

    monkeypatch.setattr(cell_record.subprocess, "check_output", git)
    assert source_version() == {"commit": told}
