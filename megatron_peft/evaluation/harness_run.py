"""An evaluation from its settings: check the tasks, load the model, ask, write the results."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, Requirements, RunConfig, require
from megatron_peft.config.untrusted import parse_yaml, read_json_object, read_text
from megatron_peft.data.prepare import TaskLoader
from megatron_peft.evaluation.answers import check_output
from megatron_peft.evaluation.dispatch import Crew, make_crew
from megatron_peft.evaluation.harness import FinishedRequests
from megatron_peft.evaluation.model import AskedModel, load_model, model_fingerprint
from megatron_peft.runtime.launch import checked_together


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
    _check_task_files(include_paths)
    manager = TaskManager(include_path=list(include_paths), include_defaults=False)
    if not include_paths or set(names) - set(manager.all_tasks):
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
    """None names a function of a file beside it, which the harness would run when it loads the task, and all are YAML:
    the harness passes over others, and would search their tasks among thousands."""
    import lm_eval

    own = Path(lm_eval.__file__).parent.resolve()
    waiting = [path for folder in include_paths for path in sorted(Path(folder).rglob("*.yaml"))]
    seen: set[Path] = set()
    for path in waiting:  # which grows by the files that they include
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
            f"{path} is refused: the metric {', '.join(scripts)} is a script, which the harness would run. Name one of "
            "its own, or a function of megatron_peft.evaluation by !function.",
        )
        for function in functions:
            module = str(function).rpartition(".")[0]
            beside = path.resolve().parent / f"{module.replace('.', '/')}.py"
            is_ours = f"{module}.".startswith(("megatron_peft.evaluation.", "lm_eval.")) and "._" not in str(function)
            require(
                is_ours and not beside.exists(),
                f"{path} is refused: !function {function} is no function of megatron_peft.evaluation or lm_eval, and a "
                "task file runs no code of its own: add it to megatron_peft/evaluation/task_metrics.py.",
            )


def _metric_scripts(task: Any) -> list[str]:
    """Metrics that `evaluate.load` would look for on the disk, since the harness does not know them by name."""
    import lm_eval.api.metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY

    metrics = task.get("metric_list") if isinstance(task, dict) else None
    entries = [one for one in metrics if isinstance(one, dict)] if isinstance(metrics, list) else []
    asked = [
        (str(one.get("metric")), one.get("hf_evaluate")) for one in entries
    ]  # "None" is a !function, checked below
    loaded = [name for name, hf_evaluate in asked if hf_evaluate or name not in METRIC_REGISTRY]
    return [name for name in loaded if re.search(r"[/\\]|\.py$", name) or Path(name).exists()]


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


PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "lm-eval", "sacrebleu", "rouge-score")


@dataclass(frozen=True)
class HarnessSettings:
    """What tools/evaluate.py was asked for; its flags have these names."""

    tasks: Sequence[str]
    output: str
    include_path: Sequence[str] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int = 16
    apply_chat_template: bool = False
    sampling_seed: int = 1234
    log_samples: bool = False
    confirm_run_unsafe_code: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.positive("batch_size", "limit")
            require.not_negative("num_fewshot")
            whole = self.limit is None or self.limit < 1 or self.limit == int(self.limit)
            require(whole, f"--limit is {self.limit}; it is a number of questions, or below 1 a share of them.")

    def decisive(self) -> dict[str, Any]:
        """What the results depend on beside the model, as their file records it."""
        names = ("num_fewshot", "limit", "apply_chat_template", "sampling_seed")
        folders = list(self.include_path)
        return {"tasks": list(self.tasks), "include_path": folders, **{name: getattr(self, name) for name in names}}

    def beside(self, kind: str) -> Path:
        """`scores.json` -> `scores.<kind>.jsonl`."""
        return Path(self.output).with_suffix(f".{kind}.jsonl")


def evaluate(config: RunConfig, settings: HarnessSettings) -> None:
    """Write the results of `config`'s model on the tasks, within a started world.

    Raises:
        ConfigurationError: on every rank, before the model is loaded where that can be: tasks, folders, checkpoint.
    """
    tasks = checked_together(lambda: _checked_tasks(config, settings) if dist.get_rank() == 0 else None)
    model = load_model(config)
    crew = make_crew(model, settings.batch_size)
    if not crew.is_led_here:
        crew.serve()
        return
    results = _run_harness(model, crew, settings, tasks)
    crew.dismiss()
    _write(results, settings)


def _checked_tasks(config: RunConfig, settings: HarnessSettings) -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"the evaluation harness is missing ({error}): pip install 'megatron-peft[eval]'."
        ) from error

    check_output(settings.output)
    require(
        settings.overwrite or not Path(settings.output).exists() or _is_of_this_evaluation(config, settings),
        f"--output {settings.output} exists already, and holds no results of this model with these flags: give another "
        "file, or --overwrite.",
    )
    FinishedRequests(settings.beside("requests"), "")  # a file that cannot be read is told before the model is loaded
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return find_tasks(settings.tasks, settings.include_path, settings.num_fewshot)


def _is_of_this_evaluation(config: RunConfig, settings: HarnessSettings) -> bool:
    """Whether --output holds what the same command has written before, so that nothing is lost."""
    try:
        found = read_json_object(Path(settings.output)).get("config")
    except ConfigurationError:
        return False
    own = {"checkpoint_fingerprint": model_fingerprint(config), "evaluation": settings.decisive()}
    return isinstance(found, dict) and all(found.get(name) == value for name, value in own.items())


def _run_harness(model: AskedModel, crew: Crew, settings: HarnessSettings, tasks: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    from megatron_peft.evaluation.harness import HarnessModel

    fingerprint = model_fingerprint(model.config)
    finished = FinishedRequests(settings.beside("requests"), fingerprint)
    asked: Any = HarnessModel(model, crew, finished, settings.batch_size, settings.sampling_seed)
    limit = settings.limit
    results: Any = simple_evaluate(
        model=asked,
        tasks=list(settings.tasks),
        task_manager=tasks,
        num_fewshot=settings.num_fewshot,
        limit=limit if limit is None or limit < 1 else int(limit),
        batch_size=settings.batch_size,
        log_samples=settings.log_samples,
        apply_chat_template=settings.apply_chat_template,
        confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
    )
    results["config"]["checkpoint_fingerprint"] = fingerprint
    results["config"]["evaluation"] = settings.decisive()
    results["config"]["package_versions"] = {name: version(name) for name in PACKAGES}
    for kind, number in asked.truncated.items():
        if number:
            print(
                f"{number} texts to {kind} were longer than the model's {model.max_length} positions and lost "
                "their beginning"
            )
    return results


def _write(results: dict[str, Any], settings: HarnessSettings) -> None:
    """Questions and answers beside the results, the results last."""
    from lm_eval.utils import handle_non_serializable

    samples: Mapping[str, list[dict[str, Any]]] = results.pop("samples", {})
    if settings.log_samples:
        lines = [{"task": task, **sample} for task, of_task in samples.items() for sample in of_task]
        text = "".join(json.dumps(line, default=handle_non_serializable) + "\n" for line in lines)
        write_atomically(settings.beside("samples"), text)
    write_atomically(Path(settings.output), json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
    for task, scores in results["results"].items():
        shown = {name: value for name, value in scores.items() if isinstance(value, float)}
        print(f"{task}: " + ", ".join(f"{name.partition(',none')[0]} {value:.4f}" for name, value in shown.items()))
    print(f"wrote {settings.output}")
