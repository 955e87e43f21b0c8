"""`megatron-peft evaluate`: check the tasks, load the model, run lm-evaluation-harness, write the results."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # fills METRIC_REGISTRY
import torch.distributed as dist
from jinja2 import UndefinedError
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.config.evaluation import HarnessSettings
from megatron_peft.config.untrusted import parse_yaml, read_json_object, read_text
from megatron_peft.data.prepare import TaskLoader
from megatron_peft.evaluation.answers import check_output
from megatron_peft.evaluation.dispatch import RankDispatcher, make_dispatcher
from megatron_peft.evaluation.harness import FinishedRequests, HarnessModel
from megatron_peft.evaluation.model import InferenceModel, load_model, model_fingerprint
from megatron_peft.evaluation.standard_errors import WithError
from megatron_peft.evaluation.task_names import harness_folders, require_known_tasks
from megatron_peft.runtime.launch import checked_together


def find_tasks(names: Sequence[str], include_paths: Sequence[str], num_fewshot: int | None = None) -> Any:
    """The harness's TaskManager for these tasks, each of which loads.

    Raises:
        ConfigurationError: an unknown name; a folder that does not exist; a task file that would run code; data that
            cannot be read or does not fit the task's templates; a label outside the choices; fewer solved examples
            than `num_fewshot`, or only those that are scored.
    """
    require_known_tasks(names, include_paths)
    _check_task_files(include_paths)
    # Of the harness's own thousands of files only those of these tasks are parsed. A later folder comes first.
    folders = [*harness_folders(names, include_paths), *include_paths]
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    for name in names:
        for task in _load(name, manager):
            _check_labels(name, task)
            _check_examples(name, task, num_fewshot)
    return manager


def _check_task_files(include_paths: Sequence[str]) -> None:
    """Refuse files that make the harness run code of theirs, and those that are not YAML, which it would skip."""
    own = Path(lm_eval.__file__).parent.resolve()
    waiting = [path for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))]
    seen: set[Path] = set()
    for path in waiting:  # grows by the included files
        if path.resolve() in seen or path.resolve().is_relative_to(own):
            continue
        seen.add(path.resolve())
        functions: list[str] = []
        loader: Any = type("Loader", (TaskLoader,), {})
        loader.add_constructor(
            "!function", lambda load, node, found=functions: found.append(load.construct_scalar(node))
        )
        task = parse_yaml(read_text(path), str(path), loader)
        included = task.get("include", []) if isinstance(task, dict) else []
        waiting += [path.parent / str(name) for name in (included if isinstance(included, list) else [included])]
        scripts = _metric_scripts(task)
        require(
            not scripts,
            f"{path} is refused: the metric {', '.join(scripts)} is a script, which the harness would run. Use one of "
            "its own metrics, or a function of megatron_peft.evaluation by !function.",
        )
        for function in functions:
            module = str(function).rpartition(".")[0]
            script = path.resolve().parent / f"{module.replace('.', '/')}.py"
            is_ours = f"{module}.".startswith(("megatron_peft.evaluation.", "lm_eval.")) and "._" not in str(function)
            require(
                is_ours and not script.exists(),  # the harness would run a script next to the task file
                f"{path} is refused: !function {function} is not a function of megatron_peft.evaluation or lm_eval, "
                "and a task file must not run its own code: add it to megatron_peft/evaluation/task_metrics.py.",
            )


def _metric_scripts(task: Any) -> list[str]:
    """Metrics that the harness does not know by name and `evaluate.load` would find on the disk."""
    metrics = task.get("metric_list") if isinstance(task, dict) else None
    entries = [one for one in metrics if isinstance(one, dict)] if isinstance(metrics, list) else []
    # The loader of the caller gives None for a !function, which is checked there.
    named = [(str(one.get("metric")), one.get("hf_evaluate")) for one in entries]
    loaded = [name for name, hf_evaluate in named if hf_evaluate or name not in METRIC_REGISTRY]
    return [name for name in loaded if re.search(r"[/\\]|\.py$", name) or Path(name).exists()]


def _load(name: str, manager: Any) -> Iterable[Any]:
    """The task, or the tasks of a group or tag, with their data; the harness renders the first item."""
    reasons = {
        UndefinedError: "its data lacks a column that its templates use",
        IndexError: "the first item's label is not one of its choices",
    }
    try:
        return manager.load([name])["tasks"].values()
    except Exception as error:  # noqa: BLE001 - a task's file or data may make the harness raise anything
        reason = reasons.get(type(error), type(error).__name__)
        raise ConfigurationError(f"--tasks {name} cannot be loaded: {reason} ({error}).") from error


def _check_labels(name: str, task: Any) -> None:
    """Each item's label is one of its choices; the harness would silently score other items 0."""
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
    """The task has enough solved examples that are not scored: the harness would show the scored items solved."""
    if not num_fewshot:
        return
    settings = getattr(task, "fewshot_cfg", None)
    given = settings is not None and (settings.split is not None or settings.samples is not None)
    require(
        given or task.has_training_docs() or (task.has_validation_docs() and task.has_test_docs()),
        f"--num-fewshot {num_fewshot}: --tasks {name} has only items that are scored; omit --num-fewshot, or give the "
        "task a fewshot_split.",
    )
    num_items = len(task.fewshot_docs())
    require(num_items >= num_fewshot, f"--num-fewshot {num_fewshot}: --tasks {name} has {num_items} solved items.")


HAVE_A_FORMULA = (lm_eval.api.metrics.mean, lm_eval.api.metrics.acc_all)
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "lm-eval", "sacrebleu", "rouge-score")


def evaluate(config: RunConfig, settings: HarnessSettings) -> None:
    """Write the results of `config`'s model on the tasks, in a started world.

    Raises:
        ConfigurationError: on every rank: wrong tasks or files (before the model is loaded), or a wrong checkpoint.
    """
    tasks = checked_together(lambda: _checked_tasks(config, settings) if dist.get_rank() == 0 else None)
    model = load_model(config)
    dispatcher = make_dispatcher(model, settings.batch_size)
    if dist.get_rank() != 0:
        dispatcher.serve()
        return
    results = _run_harness(model, dispatcher, settings, tasks)
    dispatcher.stop()
    _write(results, settings)


def _checked_tasks(config: RunConfig, settings: HarnessSettings) -> Any:
    check_output(settings.output)
    require(
        settings.overwrite or not Path(settings.output).exists() or _is_of_this_evaluation(config, settings),
        f"--output {settings.output} exists already, and is not a result of this model with these flags: give another "
        "file, or --overwrite.",
    )
    FinishedRequests(settings.side_file("requests"), "")  # fails here if the file cannot be read
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return find_tasks(settings.tasks, settings.include_path, settings.num_fewshot)


def _is_of_this_evaluation(config: RunConfig, settings: HarnessSettings) -> bool:
    """Whether --output is a result of the same command, which may be replaced."""
    try:
        found = read_json_object(Path(settings.output)).get("config")
    except ConfigurationError:
        return False
    own = {"checkpoint_fingerprint": model_fingerprint(config), "evaluation": settings.result_settings()}
    return isinstance(found, dict) and all(found.get(name) == value for name, value in own.items())


def _run_harness(
    model: InferenceModel, dispatcher: RankDispatcher, settings: HarnessSettings, tasks: Any
) -> dict[str, Any]:
    fingerprint = model_fingerprint(model.config)
    finished = FinishedRequests(settings.side_file("requests"), fingerprint)
    harness_model: Any = HarnessModel(model, dispatcher, finished, settings.batch_size, settings.sampling_seed)
    limit = settings.limit
    loaded = [tasks.load([name]) for name in settings.tasks]
    statistics = {name: _with_errors(task) for one in loaded for name, task in one["tasks"].items()}
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
    results["config"]["checkpoint_fingerprint"] = fingerprint
    results["config"]["evaluation"] = settings.result_settings()
    results["config"]["package_versions"] = {name: version(name) for name in PACKAGES}
    for kind, number in harness_model.truncated.items():
        if number:
            print(f"{number} {kind} requests were cut at the beginning to fit the model's {model.max_length} positions")
    return results


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
