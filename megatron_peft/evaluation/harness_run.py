"""`megatron-peft evaluate`: check the tasks, load the model, run lm-evaluation-harness, write the results."""

import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # fills the registries
import lm_eval.utils
import torch.distributed as dist
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY
from lm_eval.evaluator import simple_evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.config.evaluation import HarnessSettings
from megatron_peft.config.templates import render
from megatron_peft.config.untrusted import limited_to, read_json_object
from megatron_peft.evaluation import harness
from megatron_peft.evaluation.answers import check_output
from megatron_peft.evaluation.dispatch import RankDispatcher, make_dispatcher
from megatron_peft.evaluation.harness import FinishedRequests, HarnessModel
from megatron_peft.evaluation.model import InferenceModel, load_model, model_fingerprint
from megatron_peft.evaluation.standard_errors import WithError
from megatron_peft.evaluation.task_files import check_task_files
from megatron_peft.evaluation.task_names import harness_folders, require_known_tasks
from megatron_peft.runtime.launch import checked_together


def _apply_template(template: str, doc: Mapping[str, Any]) -> str:
    try:
        return render("task", template, doc)
    except ConfigurationError as error:
        shown = f"{template[:100]}..." if len(template) > 100 else template
        raise ConfigurationError(f"the template {shown!r} fails on an item with {', '.join(doc)}: {error}") from error


lm_eval.utils.apply_template = _apply_template  # the harness's own runs any code

MOST_REQUESTS = 1_000_000  # of a task: the harness keeps all of them in memory
JUDGING_SECONDS = 10.0  # for the filters of a task, or to score one answer


def find_tasks(
    names: Sequence[str],
    include_paths: Sequence[str],
    num_fewshot: int | None = None,
    limit: float | None = None,
    may_run_code: bool = False,
) -> Any:
    """The harness's TaskManager for these tasks, each of which loads, and asks its first question.

    Raises:
        ConfigurationError: an unknown name; a folder that does not exist; a task file that would run code; data that
            cannot be read or does not fit the task's templates; a label outside the choices; fewer solved examples
            than `num_fewshot`, or only those that are scored; an unknown metric; too many requests.
    """
    require_known_tasks(names, include_paths)
    check_task_files(include_paths, may_run_code)
    # Of the harness's own thousands of files only those of these tasks are parsed. A later folder comes first.
    folders = [*harness_folders(names, include_paths), *include_paths]
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    for name in names:
        with _told(name, "loaded"):
            for task in _loaded(name, manager):
                _check_metrics(task)
                _check_requests(task, limit)
                _check_examples(task, num_fewshot)
                task.build_all_requests(limit=1)
    return manager


def _loaded(name: str, manager: Any) -> Sequence[Any]:
    """The task, or the tasks of a group or tag, with their data; the harness renders the first item."""
    try:
        return [*manager.load([name])["tasks"].values()]
    except IndexError as error:
        raise ConfigurationError(f"the first item's label is not one of its choices ({error}).") from error


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
        told = f"{type(error).__name__} in {frames[-1].name} of {Path(frames[-1].filename).name}: {error}"
        raise ConfigurationError(f"--tasks {tasks} cannot be {done}: {told}.") from error


def _check_metrics(task: Any) -> None:
    """Each metric, aggregation and filter exists; the harness would fail when all questions are answered."""
    given = [one.get("aggregation") for one in task.config.metric_list or ()]
    bad = [one for one in given if isinstance(one, str) and one not in AGGREGATION_REGISTRY]
    require(not bad, f"no aggregation {', '.join(bad)}; there are {', '.join(AGGREGATION_REGISTRY)}.")
    bad = [name for name, function in task._metric_fn_list.items() if function is None]
    known = task.config.process_results is not None or not bad
    require(known, f"no metric {', '.join(bad)}; there are {', '.join(METRIC_REGISTRY)}.")
    for make_filter in (one for ensemble in task._filters for one in ensemble.filters):
        make_filter()


def _check_requests(task: Any, limit: float | None) -> None:
    """There are not too many, and each item's label is one of its choices: the harness would score other items 0."""
    repeats, num_items = task.config.repeats, get_sample_size(task, limit) or len(task.eval_docs)
    require(type(repeats) is int and repeats > 0, f"repeats is {repeats!r}; it must be a number above 0.")
    num_asked = 0
    for number, doc in enumerate(task.eval_docs):
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else "1"
        num_asked += len(choices) * repeats * (number < num_items)
        require(
            num_asked <= MOST_REQUESTS,
            f"it asks more than {MOST_REQUESTS:,} times ({repeats:,} for each item and choice), which is the limit: "
            "lower its repeats, or give --limit.",
        )
        label = task.doc_to_target(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
        if isinstance(label, int) and not 0 <= label < len(choices):
            raise ConfigurationError(
                f"the label of item {number} is {label}; choices are numbered from 0 to {len(choices) - 1}."
            )


def _check_examples(task: Any, num_fewshot: int | None) -> None:
    """The task has enough solved examples that are not scored: the harness would show the scored items solved."""
    flag = f"--num-fewshot {num_fewshot}" if num_fewshot is not None else f"num_fewshot: {task.config.num_fewshot}"
    wanted = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    if not wanted:
        return
    settings = task.fewshot_cfg
    given = settings.split is not None or settings.samples is not None
    given = given or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs())
    require(
        given or num_fewshot is None,
        f"{flag}: it has only items that are scored; omit --num-fewshot, or give the task a fewshot_split.",
    )
    num_items = len(task.fewshot_docs()) - (settings.split is not None and settings.split == task.config.test_split)
    require(num_items >= wanted, f"{flag}: it has {num_items} solved items besides the one that is asked.")
    task.set_config("num_fewshot", wanted)


HAVE_A_FORMULA = (lm_eval.api.metrics.mean, lm_eval.api.metrics.acc_all)
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "lm-eval", "sacrebleu", "rouge-score")


def evaluate(config: RunConfig, settings: HarnessSettings) -> None:
    """Write the results of `config`'s model on the tasks, in a started world.

    Raises:
        ConfigurationError: on every rank: wrong tasks or files (before the model is loaded), or a wrong checkpoint.
    """
    checked = checked_together(lambda: _checked_tasks(config, settings) if dist.get_rank() == 0 else None)
    model = load_model(config)
    dispatcher = make_dispatcher(model, settings.batch_size)
    if checked is None:
        dispatcher.serve()
        return
    results = _run_harness(model, dispatcher, settings, *checked)
    dispatcher.stop()
    try:
        _write(results, settings)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} cannot be written ({error.strerror}): free disk space, and the same command goes on."
        ) from error


def _checked_tasks(config: RunConfig, settings: HarnessSettings) -> tuple[Any, FinishedRequests]:
    check_output(settings.output)
    require(
        settings.overwrite or not Path(settings.output).exists() or _is_of_this_evaluation(config, settings),
        f"--output {settings.output} exists already, and is not a result of this model with these flags: give another "
        "file, or --overwrite.",
    )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    may_run_code = settings.confirm_run_unsafe_code
    found = find_tasks(settings.tasks, settings.include_path, settings.num_fewshot, settings.limit, may_run_code)
    return found, FinishedRequests(settings.side_file("requests"), model_fingerprint(config))


def _is_of_this_evaluation(config: RunConfig, settings: HarnessSettings) -> bool:
    """Whether --output is a result of the same command, which may be replaced."""
    try:
        found = read_json_object(Path(settings.output)).get("config")
    except ConfigurationError:
        return False
    own = {"checkpoint_fingerprint": model_fingerprint(config), "evaluation": settings.result_settings()}
    return isinstance(found, dict) and all(found.get(name) == value for name, value in own.items())


def _run_harness(
    model: InferenceModel, dispatcher: RankDispatcher, settings: HarnessSettings, tasks: Any, finished: FinishedRequests
) -> dict[str, Any]:
    harness_model: Any = HarnessModel(model, dispatcher, finished, settings.batch_size, settings.sampling_seed)
    limit = settings.limit
    loaded = [tasks.load([name]) for name in settings.tasks]
    statistics = {name: _with_errors(task) for one in loaded for name, task in one["tasks"].items()}
    for task in (task for one in loaded for task in one["tasks"].values()):
        task.apply_filters = _in_time(task.apply_filters, lambda task=task: len(task.instances))
        task.process_results = _in_time(task.process_results)
    with _told(" ".join(settings.tasks), "scored"):
        results: Any = simple_evaluate(
            model=harness_model,
            tasks=[one for name, found in zip(settings.tasks, loaded, strict=True) for one in _named(name, found)],
            task_manager=tasks,
            bootstrap_iters=1,  # no more than a switch: standard errors that have a formula are the harness's own
            num_fewshot=settings.num_fewshot,
            limit=limit if limit is None or limit < 1 else int(limit),
            batch_size=settings.batch_size,
            log_samples=settings.log_samples,
            apply_chat_template=settings.apply_chat_template,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        )
    results["config"]["bootstrap_iters"] = 0
    for name, measured in statistics.items():
        _add_errors(results["results"][name], measured)
    results["config"]["checkpoint_fingerprint"] = finished.model
    results["config"]["evaluation"] = settings.result_settings()
    results["config"]["package_versions"] = {name: version(name) for name in PACKAGES}
    for kind, number in harness_model.truncated.items():
        if number:
            print(f"{number} {kind} requests were cut at the beginning to fit the model's {model.max_length} positions")
    return results


def _in_time(judge: Callable[..., Any], num_answers: Callable[[], int] = lambda: 0) -> Callable[..., Any]:
    """`judge`, with a limit: a regular expression of a task may take forever for one answer."""

    def limited(*arguments: Any) -> Any:
        try:
            with limited_to(JUDGING_SECONDS + num_answers() / 1000):
                return judge(*arguments)
        except TimeoutError as error:
            raise ConfigurationError(f"its filters and metrics: {error}; simplify their patterns.") from error

    return limited


def _named(name: str, found: Mapping[str, Any]) -> list[Any]:
    """The group of this name, or the task or the tasks of the tag."""
    group = found.get("groups", {}).get(name)
    return [group] if group is not None else list(found["tasks"].values())


def _with_errors(task: Any) -> dict[str, WithError]:
    """Put in the place of a task's statistics those that keep their standard errors; without a formula of the harness.

    The harness would compute such a statistic 100,000 times.
    """
    statistics = task.aggregation()
    measured = {metric: WithError(one) for metric, one in statistics.items() if one not in HAVE_A_FORMULA}
    statistics.update(measured)
    return measured


def _add_errors(scores: dict[str, Any], measured: Mapping[str, WithError]) -> None:
    """Standard errors beside the scores of a task, which are in the order in which they were computed."""
    for metric, statistic in measured.items():
        filters = [name.partition(",")[2] for name in scores if name.partition(",")[0] == metric]
        for kind, error in zip(filters, statistic.errors, strict=True):
            scores[f"{metric}_stderr,{kind}"] = "N/A" if error is None else error


def _write(results: dict[str, Any], settings: HarnessSettings) -> None:
    """Write questions and answers, then the results, and print the scores."""
    samples: Mapping[str, list[dict[str, Any]]] = results.pop("samples", {})
    if settings.log_samples:
        lines = [{"task": task, **sample} for task, of_task in samples.items() for sample in of_task]
        text = "".join(json.dumps(line, default=handle_non_serializable) + "\n" for line in lines)
        write_atomically(settings.side_file("samples"), text)
    write_atomically(Path(settings.output), json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
    for task, scores in results["results"].items():
        shown = {name: value for name, value in scores.items() if isinstance(value, float)}
        print(f"{task}: " + ", ".join(f"{name.partition(',none')[0]} {value:.4f}" for name, value in shown.items()))
    print(f"wrote {settings.output}")
