"""Holds every cell's flags against pretrain_peft.py's own rules, before anything runs."""

from collections.abc import Iterable
from pathlib import Path

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.models.families import read_shape

MODEL_FLAG = "--pretrained-checkpoint"


def check_flags(groups: Iterable[Group]) -> None:
    """Parse the flags of every cell, with the shape of its model where that is on this disk.

    Raises:
        ConfigurationError: with each problem once, after the first cell that has it.
    """
    first_with: dict[str, str] = {}
    for cell in (cell for group in groups for cell in group.tuning):
        for problem in flag_problems(cell):
            first_with.setdefault(problem, cell.key)
    if first_with:
        raise ConfigurationError(*(f"{key}: {problem}" for problem, key in first_with.items()))


def flag_problems(cell: Cell) -> tuple[str, ...]:
    """What pretrain_peft.py would say against the cell's flags.

    A model that prepare: makes, or that lies on a cluster's disk, is not here yet: its own run will check it.
    """
    read = read_shape if _model_is_here(cell) else None
    try:
        read_config([*cell.flags, "--save", "the cell's own"], {"WORLD_SIZE": str(cell.processes)}, read)
    except ConfigurationError as error:
        return error.problems
    return ()


def _model_is_here(cell: Cell) -> bool:
    if MODEL_FLAG not in cell.flags[:-1]:
        return False
    folder = cell.flags[cell.flags.index(MODEL_FLAG) + 1]
    return Path(folder, "config.json").is_file()
