"""What goes from a run's files into its cell's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.record import (
    MOST_LAMBDAS,
    MOST_POINTS,
    from_lambdas,
    from_metrics,
    of_cell,
    read_file,
    read_record,
    thinned,
    trainable_parameters,
    write_record,
)
from tests.experiment.small_experiment import experiment
from tests.recorded_calls import recorded_calls


def test_record_is_read_back_as_written(tmp_path: Path) -> None:
    cell = experiment(tmp_path)[1][0].tuning[0]
    record = of_cell(cell, "trained", validation_loss=1.5, lambdas={"iterations": [1], "by_layer": {"a": [0.5]}})
    write_record(tmp_path, cell, record)
    assert read_record(tmp_path, cell) == record


def test_record_appears_whole_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that is killed while it writes leaves the old file or none, not a part."""
    cell, calls = experiment(tmp_path)[1][0].tuning[0], recorded_calls(monkeypatch)
    write_record(tmp_path, cell, of_cell(cell, "trained"))
    assert calls == [("replace", tmp_path / "cells" / f"{cell.key}.json")]


def test_file_written_before_there_were_lambdas_is_read(tmp_path: Path) -> None:
    cell = experiment(tmp_path)[1][0].tuning[0]
    write_record(tmp_path, cell, of_cell(cell, "trained"))
    (path,) = (tmp_path / "cells").iterdir()
    text = path.read_text()
    path.write_text(text.replace(' "lambdas": {},\n', ""))
    assert path.read_text() != text and read_file(path).lambdas == {}


def test_file_of_something_else_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="x.json is not the file of a cell"):
        read_file(path)


def test_lambdas_are_thinned_to_the_same_iterations_for_all_layers() -> None:
    found = from_lambdas([{"iteration": at, "lambda": {"a": at / 1000, "b": 0.12345}} for at in range(1, 101)])
    assert len(found["iterations"]) <= MOST_LAMBDAS + 1 and found["iterations"][-1] == 100
    assert found["by_layer"]["a"][-1] == 0.1 and found["by_layer"]["b"][0] == 0.123
    assert {len(values) for values in found["by_layer"].values()} == {len(found["iterations"])}


@pytest.mark.parametrize("length", [0, 1, 7, 20, 21, 399])
def test_thinned_keeps_both_ends(length: int) -> None:
    kept = thinned(range(length), 20)
    assert len(kept) <= 21 and kept[:1] == list(range(length))[:1] and kept[-1:] == list(range(length))[-1:]


def test_epoch_is_as_long_as_its_steps() -> None:
    lines = [{"iteration": at, "epoch": at / 400, "loss": 1.0, "step_seconds": 0.5} for at in range(1, 401)]
    found = from_metrics(lines)
    assert found["epoch_seconds"] == pytest.approx(200) and len(found["curves"]["loss"]) <= MOST_POINTS + 1


def test_trainable_parameters_are_those_that_the_run_tells() -> None:
    assert trainable_parameters("x\ntrainable parameters: 4,055,040 of 138,000,000 (3%)\n") == 4055040
    assert trainable_parameters("killed") is None
