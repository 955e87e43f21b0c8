"""An evaluation from its settings: check the tasks, load the model, ask, write the results."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, Requirements, RunConfig
from megatron_peft.evaluation.dispatch import Crew
from megatron_peft.evaluation.finished import FinishedRequests
from megatron_peft.evaluation.model import AskedModel, load_model, model_fingerprint
from megatron_peft.evaluation.orders import make_crew
from megatron_peft.evaluation.output import check_output
from megatron_peft.runtime.launch import checked_together

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

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.positive("batch_size", "limit")
            require.not_negative("num_fewshot")
            whole = self.limit is None or self.limit < 1 or self.limit == int(self.limit)
            require(whole, f"--limit is {self.limit}; it is a number of questions, or below 1 a share of them.")

    def beside(self, kind: str) -> Path:
        """`scores.json` -> `scores.<kind>.jsonl`."""
        return Path(self.output).with_suffix(f".{kind}.jsonl")


def evaluate(config: RunConfig, settings: HarnessSettings) -> None:
    """Write the results of `config`'s model on the tasks, within a started world.

    Raises:
        ConfigurationError: on every rank, before the model is loaded where that can be: tasks, folders, checkpoint.
    """
    tasks = checked_together(lambda: _checked_tasks(settings) if dist.get_rank() == 0 else None)
    model = load_model(config)
    crew = make_crew(model, settings.batch_size)
    if not crew.is_led_here:
        crew.serve()
        return
    results = _run_harness(model, crew, settings, tasks)
    crew.dismiss()
    _write(results, settings)


def _checked_tasks(settings: HarnessSettings) -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"the evaluation harness is missing ({error}): pip install 'megatron-peft[eval]'."
        ) from error
    from megatron_peft.evaluation.harness_tasks import find_tasks

    check_output(settings.output)
    FinishedRequests(settings.beside("requests"), "")  # a file that cannot be read is told before the model is loaded
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return find_tasks(settings.tasks, settings.include_path, settings.num_fewshot)


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
