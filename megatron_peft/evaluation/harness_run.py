"""`megatron-peft evaluate`: check the tasks, load the model, run lm-evaluation-harness, write the results."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lm_eval import evaluator_utils
from lm_eval.api.metrics import acc_all, bootstrap_stderr, bypass_agg, mean, stderr_for_metric
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import handle_non_serializable

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.config.evaluation import HarnessSettings
from megatron_peft.config.untrusted import limited_to, read_json_object
from megatron_peft.evaluation import harness
from megatron_peft.evaluation.answers import check_output
from megatron_peft.evaluation.harness import FinishedRequests, HarnessModel, RankDispatcher
from megatron_peft.evaluation.model import InferenceModel, load_model, model_fingerprint
from megatron_peft.evaluation.task_files import find_tasks, told
from megatron_peft.runtime.launch import checked_together

JUDGING_SECONDS = 10.0  # for the filters of a task, or to score one answer
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

    Raises:
        ConfigurationError: on every rank: wrong tasks or files (before the model is loaded), or a wrong checkpoint.
    """
    checked = checked_together(lambda: _checked_tasks(config, settings) if dist.get_rank() == 0 else None)
    model = load_model(config)
    dispatcher = RankDispatcher(model)
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
    fingerprint = model_fingerprint(config)
    if Path(settings.output).exists() and not settings.overwrite:
        try:
            existing = read_json_object(Path(settings.output)).get("config")
        except ConfigurationError:
            existing = None
        of_this_command = {"checkpoint_fingerprint": fingerprint, "evaluation": settings.result_settings()}
        require(
            isinstance(existing, dict) and of_this_command.items() <= existing.items(),
            f"--output {settings.output} exists already, and is not a result of this model with these flags: give "
            "another file, or --overwrite.",
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    may_run_code = settings.confirm_run_unsafe_code
    tasks = find_tasks(settings.tasks, settings.include_path, settings.num_fewshot, settings.limit, may_run_code)
    return tasks, FinishedRequests(settings.side_file("requests"), fingerprint)


def _run_harness(
    model: InferenceModel, dispatcher: RankDispatcher, settings: HarnessSettings, tasks: Any, finished: FinishedRequests
) -> dict[str, Any]:
    harness_model: Any = HarnessModel(model, dispatcher, finished, settings.batch_size, settings.sampling_seed)
    limit, asked = settings.limit, []
    for name in settings.tasks:
        loaded = tasks.load([name])
        for task in loaded["tasks"].values():
            task.apply_filters = _in_time(task.apply_filters, lambda task=task: len(task.instances))
            task.process_results = _in_time(task.process_results)
        group = loaded.get("groups", {}).get(name)
        asked += [group] if group is not None else loaded["tasks"].values()  # of a tag, or a single task
    with told(" ".join(settings.tasks), "scored", except_in=harness.__file__):
        results: Any = simple_evaluate(
            model=harness_model,
            tasks=asked,
            task_manager=tasks,
            bootstrap_iters=NUM_DRAWS,
            num_fewshot=settings.num_fewshot,
            limit=limit if limit is None or limit < 1 else int(limit),
            batch_size=settings.batch_size,
            log_samples=settings.log_samples,
            apply_chat_template=settings.apply_chat_template,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        )
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
