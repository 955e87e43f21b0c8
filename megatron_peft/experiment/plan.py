"""What is to be done next, derived from the files of the cells alone: so a new runner goes on where a killed one was.

A group's grid is run with the tuning seed. When each of its points has been tried, the point with the least validation
loss at the end of its run is chosen, and its other seeds are run and scored. Scores play no part in the choice.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.record import CellRecord, read_record
from megatron_peft.experiment.spec import Score


@dataclass(frozen=True)
class Work:
    """A cell to train, or a trained one to score."""

    kind: Literal["train", "score"]
    cell: Cell
    score: Score | None = None


@dataclass(frozen=True)
class Progress:
    """Where a group is: trained cells of its grid, the point that was chosen, its final cells and how far they are."""

    tuning: tuple[CellRecord | None, ...]
    best: int | None
    finals: tuple[CellRecord | None, ...]
    num_scored: int
    is_scored: bool  # whether the task has a score

    @property
    def is_done(self) -> bool:
        trained = bool(self.finals) and all(record is not None and record.is_trained for record in self.finals)
        return trained and (not self.is_scored or self.num_scored == len(self.finals))


def progress(folder: Path, group: Group, gave_up: Set[str] = frozenset()) -> Progress:
    """Args: gave_up: keys of cells that this runner has tried and lost; a grid is complete without them."""
    tuning = tuple(read_record(folder, cell) for cell in group.tuning)
    best = _best(group, tuning, gave_up)
    finals = () if best is None else tuple(read_record(folder, cell) for cell in group.finals[best])
    score = group.task.score
    scored = sum(score is not None and record is not None and has_scores(record, score) for record in finals)
    return Progress(tuning, best, finals, scored, score is not None)


def work(
    folder: Path, group: Group, has_checkpoint: Callable[[Cell], bool], gave_up: Set[str] = frozenset()
) -> Iterator[Work]:
    """What of the group can be done now, in order. A cell to be scored that has no checkpoint is trained anew."""
    now = progress(folder, group, gave_up)
    yield from _to_train(group.tuning, now.tuning, gave_up)
    if now.best is None:
        return
    cells, score = group.finals[now.best], group.task.score
    yield from _to_train(cells, now.finals, gave_up)
    for cell, record in zip(cells, now.finals, strict=True):
        if score and record and record.is_trained and cell.key not in gave_up and not has_scores(record, score):
            yield Work("score", cell, score) if has_checkpoint(cell) else Work("train", cell)


def has_scores(record: CellRecord, score: Score) -> bool:
    return record.is_trained and score.metrics.keys() <= record.scores.keys()


def _to_train(cells: tuple[Cell, ...], records: tuple[CellRecord | None, ...], gave_up: Set[str]) -> Iterator[Work]:
    for cell, record in zip(cells, records, strict=True):
        if cell.key not in gave_up and (record is None or not record.is_trained):
            yield Work("train", cell)


def _best(group: Group, tuning: tuple[CellRecord | None, ...], gave_up: Set[str]) -> int | None:
    """The point of the grid with the least validation loss, once all were tried; the first of equals.

    A point whose loss is no number is none to go on with, unless it is the only one there is.
    """
    losses: dict[int, float] = {}
    for at, (cell, record) in enumerate(zip(group.tuning, tuning, strict=True)):
        if record is not None and record.is_trained:
            if len(group.tuning) == 1 or math.isfinite(_comparable(record)):
                losses[at] = _comparable(record)
        elif cell.key not in gave_up:
            return None
    return min(losses, key=losses.__getitem__, default=None)


def _comparable(record: CellRecord) -> float:
    loss = record.validation_loss
    return math.inf if loss is None or math.isnan(loss) else loss


def losses_of_grid(group: Group, tuning: tuple[CellRecord | None, ...]) -> Mapping[str, float | None]:
    """Point of the grid, as `lr=0.1 ...` -> its validation loss."""
    return {
        " ".join(f"{name}={value}" for name, value in cell.settings.items()): record and record.validation_loss
        for cell, record in zip(group.tuning, tuning, strict=True)
    }
