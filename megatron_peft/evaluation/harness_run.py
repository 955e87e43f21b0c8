"""`megatron-peft evaluate`: check the tasks, load the model, run lm-evaluation-harness, write the results.

Whatever the harness would evaluate, load or call because a file of --include-path says so is refused before the harness
reads the file. Then each task is loaded, and asks its first question; only then the model is loaded.
"""

import importlib.metadata
import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from glob import has_magic, iglob
from inspect import isfunction
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from lm_eval import evaluator, evaluator_utils, utils
from lm_eval.api.metrics import acc_all, bootstrap_stderr, bypass_agg, mean, stderr_for_metric
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.tasks import TaskManager

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, RunConfig, require, writing
from megatron_peft.config.evaluation import HarnessSettings
from megatron_peft.config.templates import render_task
from megatron_peft.config.untrusted import parse_yaml, read_json_object, read_text, require_regular
from megatron_peft.evaluation import harness
from megatron_peft.evaluation.answers import check_output
from megatron_peft.evaluation.harness import FinishedRequests, HarnessModel, RankDispatcher
from megatron_peft.evaluation.model import model_fingerprint, opened_model
from megatron_peft.evaluation.task_names import harness_files, harness_folders, own_files, require_known_tasks, texts_of
from megatron_peft.runtime.launch import checked_together
from megatron_peft.tasks.prepare import TaskLoader

NUM_DRAWS = 100  # of a bootstrap, which tell an error to 7%; the harness's 100,000 take hours for F1 of 40,000 answers
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "lm-eval", "sacrebleu", "rouge-score")


def _stderr_for_metric(metric: Callable[..., float], bootstrap_iters: int) -> Callable[[Sequence[Any]], float] | None:
    """The harness's formula or bootstrap, the latter for every statistic: it has a list, without perplexities."""
    if metric in (mean, acc_all, bypass_agg):
        return stderr_for_metric(metric, bootstrap_iters)

    def drawn(items: Sequence[Any]) -> float:
        # It prints the metric's name, and sklearn warns about labels that no drawn item has.
        with redirect_stdout(None), warnings.catch_warnings(action="ignore"):
            return bootstrap_stderr(metric, items, iters=NUM_DRAWS)

    return drawn


evaluator_utils.stderr_for_metric = _stderr_for_metric
os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork a process that has joined a world


def evaluate(config: RunConfig, settings: HarnessSettings) -> None:
    """Write the results of `config`'s model on the tasks, in a started world.

    ConfigurationErrors are raised on every rank; those of tasks and files before the model is loaded.
    """
    checked = checked_together(lambda: _checked_tasks(config, settings) if dist.get_rank() == 0 else None)
    with opened_model(config, settings, settings.output) as model:
        dispatcher = RankDispatcher(model)
        if checked is None:
            dispatcher.serve()
        else:
            _answer_tasks(dispatcher, settings, *checked)


def _answer_tasks(
    dispatcher: RankDispatcher, settings: HarnessSettings, tasks: Any, finished: FinishedRequests
) -> None:
    selected: list[Any] = []
    for name in settings.tasks:
        loaded = tasks.load([name])
        group = loaded.get("groups", {}).get(name)
        selected += [group] if group is not None else loaded["tasks"].values()  # of a tag, or a single task
    model: Any = HarnessModel(dispatcher, finished, settings.batch_size, settings.sampling_seed)
    limit = settings.limit
    with _told(" ".join(settings.tasks), "scored"):
        results: Any = evaluator.simple_evaluate(
            model=model,
            tasks=selected,
            task_manager=tasks,
            bootstrap_iters=NUM_DRAWS,
            num_fewshot=settings.num_fewshot,
            limit=limit if limit is None or limit < 1 else int(limit),
            batch_size=settings.batch_size,
            log_samples=settings.log_samples,
            apply_chat_template=settings.apply_chat_template,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        )
    dispatcher.stop()
    results["config"]["checkpoint_fingerprint"] = finished.model
    results["config"]["evaluation"] = settings.result_settings()
    results["config"]["package_versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    for kind, number in (+model.truncated).items():
        print(f"{number} {kind} requests were cut at the beginning to fit the model's {model.max_length} positions")
    with writing(way_out="free disk space, and the same command goes on"):
        _write(results, settings)


def _checked_tasks(config: RunConfig, settings: HarnessSettings) -> tuple[Any, FinishedRequests]:
    check_output(settings.output)
    output, fingerprint = Path(settings.output), model_fingerprint(config)
    if output.exists() and not settings.overwrite:
        existing = None
        with suppress(ConfigurationError):
            existing = read_json_object(output).get("config")
        of_this_command = {"checkpoint_fingerprint": fingerprint, "evaluation": settings.result_settings()}
        is_same = isinstance(existing, dict) and of_this_command.items() <= existing.items()
        problem = f"--output {output} exists already, and is not a result of this model with these flags"
        require(is_same, f"{problem}: give another file, or --overwrite.")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    may_run_code = settings.confirm_run_unsafe_code
    tasks = find_tasks(settings.tasks, settings.include_path, settings.num_fewshot, may_run_code)
    engine = (settings.engine, settings.engine_lora, *settings.engine_args) if settings.engine else ()
    return tasks, FinishedRequests(settings.side_file("requests"), fingerprint, engine)


def _write(results: dict[str, Any], settings: HarnessSettings) -> None:
    as_json = partial(json.dumps, default=utils.handle_non_serializable)
    samples: Mapping[str, list[dict[str, Any]]] = results.pop("samples", {})
    if settings.log_samples:
        lines = [as_json({"task": task, **sample}) + "\n" for task, of_task in samples.items() for sample in of_task]
        write_atomically(settings.side_file("samples"), "".join(lines))
    write_atomically(Path(settings.output), as_json(results, indent=2) + "\n")
    for task, scores in results["results"].items():
        shown = {name: value for name, value in scores.items() if isinstance(value, float)}
        print(f"{task}: " + ", ".join(f"{name.partition(',none')[0]} {value:.4f}" for name, value in shown.items()))
    print(f"wrote {settings.output}")


def _apply_template(template: str, doc: Mapping[str, Any]) -> str:
    try:
        return render_task(template, doc)
    except ConfigurationError as error:
        shown = f"{template[:100]}..." if len(template) > 100 else template
        raise ConfigurationError(f"the template {shown!r} fails on an item with {', '.join(doc)}: {error}") from error


utils.apply_template = _apply_template  # the one that it replaces runs any code


def find_tasks(
    names: Sequence[str], include_paths: Sequence[str], num_fewshot: int | None = None, may_run_code: bool = False
) -> Any:
    """The harness's TaskManager for these tasks, each of which has passed all checks and asks its first question."""
    require_known_tasks(names, include_paths)
    check_task_files(include_paths, may_run_code)
    # Only those of the harness's thousands of files are parsed that these tasks need. A later folder comes first.
    folders: list[Any] = [*harness_folders(names, include_paths), *include_paths]
    manager = TaskManager(include_path=folders, include_defaults=False)
    for name in names:
        with _told(name, "loaded"):
            try:
                tasks = [*manager.load([name])["tasks"].values()]  # the harness renders their first items
            except IndexError as error:
                raise ConfigurationError(f"the first item's label is not one of its choices ({error}).") from error
            for task in tasks:
                _check_metrics(task)
                _check_requests(task)
                _check_examples(task, num_fewshot)
                task.build_all_requests(limit=1)
    return manager


@contextmanager
def _told(tasks: str, done: str) -> Iterator[None]:
    """The harness may raise anything for what is wrong with a task's file or data: all of it is a ConfigurationError,
    except for what our model raises, which the harness calls."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"--tasks {tasks}: {error}") from error
    except Exception as error:  # noqa: BLE001
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.filename == harness.__file__ for frame in frames):
            raise
        what = f"{type(error).__name__} in {frames[-1].name} of {Path(frames[-1].filename).name}: {error}"
        raise ConfigurationError(f"--tasks {tasks} cannot be {done}: {what}.") from error


def _check_metrics(task: Any) -> None:
    """Each metric, aggregation and filter exists: the harness would fail when all questions are answered."""
    given = [entry.get("aggregation") for entry in task.config.metric_list or ()]
    unknown = [name for name in given if isinstance(name, str) and name not in AGGREGATION_REGISTRY]
    require(not unknown, f"no aggregation {', '.join(unknown)}; there are {', '.join(AGGREGATION_REGISTRY)}.")
    unknown = [name for name, function in task._metric_fn_list.items() if function is None]
    is_scored = task.config.process_results is not None or not unknown
    require(is_scored, f"no metric {', '.join(unknown)}; there are {', '.join(METRIC_REGISTRY)}.")
    for make_filter in chain.from_iterable(ensemble.filters for ensemble in task._filters):
        make_filter()


def _check_requests(task: Any) -> None:
    """Check that each item's label is one of its choices: the harness would score other items 0."""
    repeats = task.config.repeats
    require(type(repeats) is int and repeats > 0, f"repeats is {repeats!r}; it must be a number above 0.")
    for number, doc in enumerate(task.eval_docs if task.OUTPUT_TYPE == "multiple_choice" else ()):
        num_choices, label = len(task.doc_to_choice(doc)), task.doc_to_target(doc)
        message = f"the label of item {number} is {label}; choices are numbered from 0 to {num_choices - 1}."
        require(not isinstance(label, int) or 0 <= label < num_choices, message)


def _check_examples(task: Any, num_fewshot: int | None) -> None:
    """The task has enough solved examples that are not scored: the harness would show the scored items solved."""
    wanted = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    if not wanted:
        return
    split, has_samples = task.fewshot_cfg.split, task.fewshot_cfg.samples is not None
    is_apart = split is not None or has_samples or task.has_training_docs()
    is_apart |= task.has_validation_docs() and task.has_test_docs()
    ways = "omit --num-fewshot, or give the task a fewshot_split"
    message = f"--num-fewshot {num_fewshot}: it has only items that are scored; {ways}."
    require(num_fewshot is None or is_apart, message)
    num_items = len(task.fewshot_docs()) - (split is not None and split == task.config.test_split)
    flag = f"num_fewshot: {wanted}" if num_fewshot is None else f"--num-fewshot {wanted}"
    require(num_items >= wanted, f"{flag}: it has {num_items} solved items besides the one that is asked.")
    task.set_config("num_fewshot", wanted)


HARNESS = Path(utils.__file__).parent.resolve()
FUNCTIONS_OF = ("megatron_peft.evaluation.task_metrics", "lm_eval.api.metrics")
READERS = {"arrow", "csv", "json", "parquet", "text"}  # of datasets' own; others read pickles, or ask databases
DATA = {"dataset_path", "dataset_name", "dataset_kwargs"}
DATA_SETTINGS = {"data_dir", "data_files", "field", "revision", "trust_remote_code"}  # the last one is ignored
DATA_SETTINGS |= {"column_names", "delimiter", "encoding", "header", "names", "quotechar", "sep"}  # of tables
CALLING = {"class", "custom_dataset", "use_prompt"}  # keys of a task that call what they name


def check_task_files(include_paths: Sequence[str], may_run_code: bool = False) -> None:
    """Raises ConfigurationError for a file that would make the harness run code, and for one that is not YAML, which
    the harness would skip.

    may_run_code: functions of the harness's own tasks are allowed, of which some run programs that stand in the data.
    """
    waiting = [(path, path) for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))]
    of_user, seen = own_files(include_paths), set[Path]()
    for path, origin in waiting:  # grows by the files that these build on
        is_of_harness = path.resolve().is_relative_to(HARNESS)
        if path.resolve() in seen or (path is origin and is_of_harness):
            continue
        seen.add(path.resolve())
        functions: list[str] = []  # that !function tags name
        loader: Any = type("Loader", (TaskLoader,), {})
        loader.add_constructor(
            "!function", lambda load, node, to=functions: to.append(str(load.construct_scalar(node)))
        )
        values = parse_yaml(read_text(path), str(path), loader)
        tasks = [value for value in _values_within(values) if isinstance(value, dict)]  # members of groups too
        if is_of_harness:
            require(
                may_run_code or not functions,
                f"{origin} is refused: with data of its own it builds on {path.name} of the harness, whose functions "
                f"({''.join(functions[:1])}, ...) may run code that stands in them: give --confirm-run-unsafe-code if "
                "you trust the data.",
            )
        else:
            for function in functions:
                _check_function(path, function, may_run_code)
            for task in tasks:
                _check_task(path, task)
        built_on = [path.parent / name for task in tasks for name in texts_of(task.get("include"))]
        members = {name for task in tasks for name in texts_of(task.get("task"))} - of_user.keys()
        built_on += [Path(file.path) for name in members for file in harness_files().get(name, ())]
        names_data = path is not origin or any(DATA & task.keys() for task in tasks)
        waiting += [(base, origin) for base in built_on if names_data or not base.resolve().is_relative_to(HARNESS)]


def _values_within(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values_within(inner)


def _check_function(path: Path, function: str, may_run_code: bool) -> None:
    module, _, name = function.rpartition(".")
    named = getattr(importlib.import_module(module), name, None) if module in FUNCTIONS_OF else None
    allowed = isfunction(named) and named.__module__ == module  # not what it imports
    allowed |= may_run_code and f"{module}.".startswith("lm_eval.") and "._" not in function
    script = path.resolve().parent / f"{module.replace('.', '/')}.py"
    require(
        allowed and not script.exists(),  # the harness would run a script next to the task file
        f"{path} is refused: !function {function} is not a function of megatron_peft.evaluation.task_metrics or "
        "lm_eval.api.metrics (lm_eval.tasks too with --confirm-run-unsafe-code), and a task file must not run its own "
        "code: add it to megatron_peft/evaluation/task_metrics.py.",
    )


def _check_task(path: Path, task: dict[str, Any]) -> None:
    refused = {*(CALLING & task.keys()), *({"unsafe_code: false"} if not task.get("unsafe_code", True) else ())}
    require(not refused, f"{path} is refused: {', '.join(sorted(refused))} could run code: remove it.")
    # `evaluate.load` would look on the disk for a metric that the harness does not know. A !function is None here.
    name = str(task.get("metric"))
    is_own = name in METRIC_REGISTRY and not task.get("hf_evaluate")
    require(
        is_own or not ("/" in name or Path(name).exists()),
        f"{path} is refused: the metric {name} is a script, which the harness would run. Use one of its own "
        "metrics, or a function of megatron_peft.evaluation by !function.",
    )
    reader, settings = str(task.get("dataset_path", "")), task.get("dataset_kwargs") or {}
    unknown = settings.keys() - DATA_SETTINGS if isinstance(settings, dict) else {"dataset_kwargs"}
    require(not unknown, f"{path} is refused: dataset_kwargs takes {', '.join(sorted(DATA_SETTINGS))}, not {unknown}.")
    may_load = reader in READERS or reader not in _PACKAGED_DATASETS_MODULES
    ways = f"give {', '.join(sorted(READERS))}, a folder, or a name on the Hub"
    require(may_load, f"{path} is refused: dataset_path {reader} may run code: {ways}.")
    for given in (reader, *(value for value in _values_within(settings) if isinstance(value, str))):
        require("://" not in given and "::" not in given, f"{path} is refused: {given} is no file: download it first.")
        for file in _files_of(given) if given and given not in READERS else ():
            require_regular(file, f"{path}: dataset_kwargs:")


def _files_of(given: str) -> Iterator[Path]:
    """The files that a path, a folder or a pattern names."""
    for place in map(Path, chain([given], iglob(given, recursive=True) if has_magic(given) else ())):
        inside = place.rglob("*") if place.is_dir() else [place]
        yield from (path for path in inside if path.exists() and not path.is_dir())
