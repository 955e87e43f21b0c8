"""Tasks of the evaluation harness by name, checked before a model is loaded."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_yaml, read_text
from megatron_peft.data.prepare import TaskLoader


def find_tasks(names: Sequence[str], include_paths: Sequence[str], num_fewshot: int | None = None) -> Any:
    """The harness's TaskManager that knows these tasks. Its own tasks are only read for names that are found nowhere
    else: there are thousands.

    Raises:
        ConfigurationError: an unknown name, told with the nearest known; a folder that is not there; data that cannot
            be read, or that a task's templates do not fit; a label that is none of the choices; fewer solved items
            than `num_fewshot`, or none but those that are scored.
    """
    from lm_eval.tasks import TaskManager

    missing = [path for path in include_paths if not Path(path).is_dir()]
    require(not missing, f"--include-path {' '.join(missing)}: no such folder.")
    manager = TaskManager(include_path=list(include_paths), include_defaults=False)
    if not include_paths or set(names) - set(manager.all_tasks):
        _check_task_files(include_paths)
        manager = TaskManager(include_path=list(include_paths))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigurationError(*(_unknown(name, manager.all_tasks) for name in unknown))
    for name in names:
        for task in _load(name, manager):
            _check_labels(name, task)
            _check_examples(name, task, num_fewshot)
    return manager


def _check_task_files(include_paths: Sequence[str]) -> None:
    """A file that is no YAML is passed over by the harness, and its task would be searched among thousands."""
    for path in (path for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))):
        parse_yaml(read_text(path), str(path), TaskLoader)


def _unknown(name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, 1, 0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else "--include-path FOLDER names a folder with its file."
    return f"--tasks {name}: no task has this name; {hint}"


def _load(name: str, manager: Any) -> Iterable[Any]:
    """The task, or the tasks of a group or tag, with their data; the harness tries the templates on the first item."""
    from jinja2 import UndefinedError

    try:
        return manager.load([name])["tasks"].values()
    except UndefinedError as error:
        raise ConfigurationError(
            f"--tasks {name} cannot be loaded: its data lacks a column that its templates name ({error})."
        ) from error
    except IndexError as error:
        raise ConfigurationError(
            f"--tasks {name} cannot be loaded: the first item's label is none of its choices ({error})."
        ) from error
    except Exception as error:  # noqa: BLE001 - whatever a task's file or its data make the harness raise
        raise ConfigurationError(f"--tasks {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _check_labels(name: str, task: Any) -> None:
    """The right choice of every item is there. (Of an item without one the harness would count 0 and go on.)"""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(task.eval_docs):
        choices, label = task.doc_to_choice(doc), task.doc_to_target(doc)
        if isinstance(label, int) and not 0 <= label < len(choices):
            raise ConfigurationError(
                f"--tasks {name}: the label of item {number} is {label}; choices are numbered from 0 to "
                f"{len(choices) - 1}."
            )


def _check_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """That many solved items are there, and are not those that are scored: the harness would show a question solved."""
    if not num_fewshot:
        return
    asked = getattr(task, "fewshot_cfg", None)
    given = asked is not None and (asked.split is not None or asked.samples is not None)
    require(
        given or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs()),
        f"--num-fewshot {num_fewshot}: --tasks {name} has no items but those that are scored; leave --num-fewshot out, "
        f"or give the task a fewshot_split.",
    )
    num_items = len(task.fewshot_docs())
    require(
        num_items >= num_fewshot,
        f"--num-fewshot {num_fewshot}: --tasks {name} has {num_items} solved items to show.",
    )
