"""Task files of --include-path, read before the harness reads them: what would make it run others' code is refused."""

from collections.abc import Iterator, Sequence
from glob import has_magic, iglob
from importlib import import_module
from inspect import isfunction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # fills METRIC_REGISTRY
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from lm_eval.api.registry import METRIC_REGISTRY

from megatron_peft.config import require
from megatron_peft.config.untrusted import parse_yaml, read_text, require_regular
from megatron_peft.data.files import open_json, require_limits
from megatron_peft.evaluation.task_names import harness_files, own_files
from megatron_peft.tasks.template import TaskLoader

HARNESS = Path(lm_eval.__file__).parent.resolve()
FUNCTIONS_OF = ("megatron_peft.evaluation.task_metrics", "megatron_peft.evaluation.humaneval", "lm_eval.api.metrics")
READERS = {"arrow", "csv", "json", "parquet", "text"}  # of datasets' own; others read pickles, or ask databases
DATA = {"dataset_path", "dataset_name", "dataset_kwargs"}
DATA_SETTINGS = {"data_dir", "data_files", "field", "revision", "trust_remote_code"}  # the last one is ignored
DATA_SETTINGS |= {"column_names", "delimiter", "encoding", "header", "names", "quotechar", "sep"}  # of tables
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gzip, ...
MOST_FILES = 10_000  # of a task's data
CALLING = {"class", "custom_dataset", "use_prompt"}  # keys of a task that call what they name


def check_task_files(include_paths: Sequence[str], may_run_code: bool = False) -> None:
    """Raises ConfigurationError for a file that would make the harness run code, and for one that is not YAML, which
    the harness would skip.

    may_run_code: functions of the harness's own tasks are allowed, of which some run programs that stand in the data.
    """
    waiting = [(path, path) for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))]
    own = {file.name for file in own_files(include_paths)}
    seen: set[Path] = set()
    for path, origin in waiting:  # grows by the files that these build on
        if path.resolve() in seen or (path is origin and path.resolve().is_relative_to(HARNESS)):
            continue
        seen.add(path.resolve())
        values, functions = _read(path)
        if not path.resolve().is_relative_to(HARNESS):
            _check(path, values, functions, may_run_code)
        else:
            require(
                may_run_code or not functions,
                f"{origin} is refused: with data of its own it builds on {path.name} of the harness, whose functions "
                f"({functions[0] if functions else ''}, ...) may run code that stands in them: give "
                "--confirm-run-unsafe-code if you trust the data.",
            )
        tasks = list(_tasks_in(values))
        included = values.get("include", []) if isinstance(values, dict) else []
        built_on = [path.parent / str(name) for name in (included if isinstance(included, list) else [included])]
        members = {str(one.get("task")) for one in tasks[1:]} - own
        built_on += [Path(file.path) for name in members for file in (harness_files().get(name, ()))]
        names_data = path is not origin or any(DATA & one.keys() for one in tasks)
        waiting += [(one, origin) for one in built_on if names_data or not one.resolve().is_relative_to(HARNESS)]


def _read(path: Path) -> tuple[Any, list[str]]:
    """The values of a file, and what its !function tags name."""
    functions: list[str] = []
    loader: Any = type("Loader", (TaskLoader,), {})
    loader.add_constructor("!function", lambda load, node: functions.append(str(load.construct_scalar(node))))
    return parse_yaml(read_text(path), str(path), loader), functions


def _tasks_in(values: Any) -> Iterator[dict[str, Any]]:
    """The settings of a task or a group, and of the tasks in it."""
    if isinstance(values, dict):
        yield values
        members = values.get("task")
        for member in members if isinstance(members, list) else ():
            yield from _tasks_in(member if isinstance(member, dict) else {"task": member})


def _check(path: Path, values: Any, functions: Sequence[str], may_run_code: bool) -> None:
    for function in functions:
        module, _, name = function.rpartition(".")
        found = getattr(import_module(module), name, None) if module in FUNCTIONS_OF else None
        allowed = isfunction(found) and found.__module__ == module  # not what it imports
        allowed |= may_run_code and f"{module}.".startswith("lm_eval.") and "._" not in function
        script = path.resolve().parent / f"{module.replace('.', '/')}.py"
        require(
            allowed and not script.exists(),  # the harness would run a script next to the task file
            f"{path} is refused: !function {function} is not a function of megatron_peft.evaluation.task_metrics or "
            "lm_eval.api.metrics (lm_eval.tasks too with --confirm-run-unsafe-code), and a task file must not run its "
            "own code: add it to megatron_peft/evaluation/task_metrics.py.",
        )
    for task in _tasks_in(values):
        refused = {*(CALLING & task.keys()), *({"unsafe_code: false"} if not task.get("unsafe_code", True) else ())}
        require(not refused, f"{path} is refused: {', '.join(sorted(refused))} could run code: remove it.")
        scripts = [name for name in _metrics_to_load(task) if "/" in name or Path(name).exists()]
        require(
            not scripts,
            f"{path} is refused: the metric {', '.join(scripts)} is a script, which the harness would run. Use one of "
            "its own metrics, or a function of megatron_peft.evaluation by !function.",
        )
        _check_data(path, task)


def _metrics_to_load(task: dict[str, Any]) -> list[str]:
    """Names that the harness does not know: `evaluate.load` would look for them on the disk."""
    metrics = task.get("metric_list")
    entries = [one for one in metrics if isinstance(one, dict)] if isinstance(metrics, list) else []
    # A !function is None here, and is checked as one.
    named = [(str(one.get("metric")), one.get("hf_evaluate")) for one in entries]
    return [name for name, hf_evaluate in named if hf_evaluate or name not in METRIC_REGISTRY]


def _check_data(path: Path, task: dict[str, Any]) -> None:
    reader, settings = str(task.get("dataset_path", "")), task.get("dataset_kwargs") or {}
    unknown = settings.keys() - DATA_SETTINGS if isinstance(settings, dict) else {"dataset_kwargs"}
    require(not unknown, f"{path} is refused: dataset_kwargs takes {', '.join(sorted(DATA_SETTINGS))}, not {unknown}.")
    readers = ", ".join(sorted(READERS))
    require(
        reader in READERS or reader not in _PACKAGED_DATASETS_MODULES,
        f"{path} is refused: dataset_path {reader} may run code: give {readers}, a folder, or a name on the Hub.",
    )
    for given in (reader, *_texts(settings)):
        require("://" not in given and "::" not in given, f"{path} is refused: {given} is no file: download it first.")
        files = islice(() if not given or given in READERS else _files_of(given), MOST_FILES + 1)
        for number, file in enumerate(files):
            require(number < MOST_FILES, f"{path} is refused: {given} names more than {MOST_FILES:,} files.")
            _require_readable(file, f"{path}: dataset_kwargs:")


def _files_of(given: str) -> Iterator[Path]:
    """That a path, a folder or a pattern names."""
    for name in chain([given], iglob(given, recursive=True) if has_magic(given) else ()):
        inside = Path(name).rglob("*") if Path(name).is_dir() else [Path(name)]
        yield from (one for one in inside if one.exists() and not one.is_dir())


def _require_readable(file: Path, flag: str) -> None:
    """Raises ConfigurationError for what `datasets` would take a machine's memory for, or unpack."""
    require_regular(file, flag)
    with file.open("rb") as opened:
        start = opened.read(max(map(len, PACKED)))
    require(not start.startswith(PACKED), f"{flag} {file} is compressed: unpack it first.")
    if file.suffix in (".json", ".jsonl"):
        open_json(file, with_digest=False)
    require_limits(file, flag)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
