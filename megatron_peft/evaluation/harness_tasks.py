"""Tasks of the evaluation harness by name, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require


def find_tasks(names: Sequence[str], include_paths: Sequence[str]) -> Any:
    """The harness's TaskManager that knows these tasks. Its own tasks are only read for names that are found nowhere
    else: there are thousands.

    Raises:
        ConfigurationError: an unknown name, told with the nearest known; a folder that is not there; data that cannot
            be read, or that a task's templates do not fit.
    """
    from lm_eval.tasks import TaskManager

    missing = [path for path in include_paths if not Path(path).is_dir()]
    require(not missing, f"--include-path {' '.join(missing)}: no such folder.")
    manager = TaskManager(include_path=list(include_paths), include_defaults=False)
    if not include_paths or set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=list(include_paths))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigurationError(*(_unknown(name, manager.all_tasks) for name in unknown))
    for name in names:
        _load(name, manager)
    return manager


def _unknown(name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, 1, 0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else "--include-path FOLDER names a folder with its file."
    return f"--tasks {name}: no task has this name; {hint}"


def _load(name: str, manager: Any) -> None:
    """Read the task's data once; the harness tries its templates on the first question as it does so."""
    from jinja2 import UndefinedError

    try:
        manager.load([name])
    except UndefinedError as error:
        raise ConfigurationError(
            f"--tasks {name} cannot be loaded: its data lacks a column that its templates name ({error})."
        ) from error
    except Exception as error:  # noqa: BLE001 - whatever a task's file or its data make the harness raise
        raise ConfigurationError(f"--tasks {name} cannot be loaded: {type(error).__name__}: {error}") from error
