"""What is next follows from the files of the cells."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.plan import losses_of_grid, progress, work
from megatron_peft.experiment.record import of_cell, write_record
from tests.experiment.small_experiment import experiment


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """Rates 0.1 and 0.4, seeds 1, 2, 3; tuned with seed 1, scored."""
    return experiment(tmp_path)[1][0]


def end(folder: Path, cell: Cell, loss: float | None, **values: object) -> None:
    write_record(folder, cell, of_cell(cell, "trained", validation_loss=loss, **values))


def todo(folder: Path, group: Group, has_checkpoint: bool = True, gave_up: frozenset[str] = frozenset()):
    return [(one.kind, one.cell) for one in work(folder, group, lambda cell: has_checkpoint, gave_up)]


def test_first_the_grid_and_no_seed_before_all_of_it(tmp_path: Path, group: Group) -> None:
    low, high = group.tuning
    assert todo(tmp_path, group) == [("train", low), ("train", high)]
    end(tmp_path, high, 1.0)
    assert todo(tmp_path, group) == [("train", low)]


@pytest.mark.parametrize(("losses", "best"), [((2.0, 1.0), 1), ((1.0, 1.0), 0), ((math.nan, 9.0), 1), ((None, 9.0), 1)])
def test_least_validation_loss_is_chosen(tmp_path: Path, group: Group, losses: tuple, best: int) -> None:
    for cell, loss in zip(group.tuning, losses, strict=True):
        end(tmp_path, cell, loss)
    tuned, *others = group.finals[best]
    assert progress(tmp_path, group).best == best
    assert todo(tmp_path, group) == [*(("train", cell) for cell in others), ("score", tuned)]


def test_failed_cell_is_tried_again_but_not_twice_in_one_call(tmp_path: Path, group: Group) -> None:
    low, high = group.tuning
    write_record(tmp_path, low, of_cell(low, "failed"))
    end(tmp_path, high, 1.0)
    assert todo(tmp_path, group) == [("train", low)]
    assert ("train", low) not in todo(tmp_path, group, gave_up=frozenset({low.key}))
    assert progress(tmp_path, group, gave_up={low.key}).best == 1


def test_scores_need_the_checkpoint_and_end_the_group(tmp_path: Path, group: Group) -> None:
    for cell in group.tuning:
        end(tmp_path, cell, 1.0)
    for cell in group.finals[0]:
        end(tmp_path, cell, 1.0)
    assert todo(tmp_path, group) == [("score", cell) for cell in group.finals[0]]
    assert todo(tmp_path, group, has_checkpoint=False) == [("train", cell) for cell in group.finals[0]]
    for cell in group.finals[0]:
        assert not progress(tmp_path, group).is_done
        end(tmp_path, cell, 1.0, scores={"accuracy": 50.0})
    assert progress(tmp_path, group).is_done and todo(tmp_path, group) == []


def test_points_of_the_grid_are_named_by_their_settings(tmp_path: Path, group: Group) -> None:
    end(tmp_path, group.tuning[0], 1.5)
    assert losses_of_grid(group, progress(tmp_path, group).tuning) == {"lr=0.1": 1.5, "lr=0.4": None}


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_grid_without_a_finite_loss_goes_no_further(tmp_path: Path, group: Group, loss: float | None) -> None:
    for cell in group.tuning:
        end(tmp_path, cell, loss)
    assert progress(tmp_path, group).best is None
    assert todo(tmp_path, group) == []


def test_a_single_point_needs_no_validation_loss(tmp_path: Path) -> None:
    (group,) = experiment(tmp_path, methods={"lora": {}})[1]
    end(tmp_path, group.tuning[0], None)
    assert progress(tmp_path, group).best == 0
