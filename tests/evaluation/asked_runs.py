"""Evaluations and answers of a trained run, alone and split; started on ranks by test_harness.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_peft.arguments import parse_arguments
from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.evaluation.answers import AnswerSettings, answer
from megatron_peft.evaluation.harness_run import HarnessSettings, evaluate
from megatron_peft.evaluation.run_flags import model_flags
from megatron_peft.runtime.launch import start_world, stop_model_parallel
from megatron_peft.training.finetune import finetune
from tests.evaluation.local_tasks import TASKS

LAYOUTS = {"TP2": ["--tensor-model-parallel-size", "2"], "PP2": ["--pipeline-model-parallel-size", "2"], "DP2": []}


@dataclass(frozen=True)
class Place:
    """Files of a test: a base model, its training data, a folder of tasks, and where everything else goes."""

    work: str
    base: str
    data: str
    tasks: str

    def path(self, name: str) -> Path:
        return Path(self.work, name)

    @property
    def run(self) -> list[str]:
        return ["--load", str(self.path("run"))]


def run_alone(place: Place) -> dict[str, Any]:
    """Train, then ask the base, the run, and the base as the harness's own backend sees it."""
    start_world(ParallelConfig())
    _train(place)
    base = ["--pretrained-checkpoint", place.base]
    found = {"base": _evaluate(place, "base", base), "run": _evaluate(place, "run", place.run)}
    found["finished"] = len(place.path("run.requests.jsonl").read_text().splitlines())
    found["hf"] = _by_the_harness(place)
    found["streamed"] = _printed(lambda: _answer(place, prompt="w1 w2", max_new_tokens=5))
    _answer(place, prompt_file=str(place.path("prompts.jsonl")), output=str(place.path("alone.jsonl")))
    found["complaints"] = [
        _complaint([*place.run, "--lora-rank", "4"], "w1"),
        _complaint([*place.run, "--pretrained-checkpoint", str(place.path("other"))], "w1"),
        _complaint(place.run, "w1 " * 300),
    ]
    return found


def run_until_killed(job: tuple[Place, int, float]) -> None:
    """The evaluation of the run, killed so many seconds after so many of its requests are answered on disk."""
    place, num_requests, seconds = job
    file = place.path("stopped.requests.jsonl")

    def kill() -> None:
        while not file.exists() or file.read_bytes().count(b"\n") < num_requests:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    start_world(ParallelConfig())
    threading.Thread(target=kill, daemon=True).start()
    _evaluate(place, "stopped", place.run)


def run_again(place: Place) -> dict[str, Any]:
    start_world(ParallelConfig())
    return _evaluate(place, "stopped", place.run)


def run_split(place: Place) -> dict[str, Any]:
    """The trained run at each layout: results, and a file of answers that are drawn."""
    start_world(ParallelConfig())
    found: dict[str, Any] = {}
    drawn = {"temperature": 1.0, "num_samples": 2, "batch_size": 3}
    for layout, flags in LAYOUTS.items():
        found[layout] = _evaluate(place, layout, [*place.run, *flags])
        _answer(place, flags, prompt_file=str(place.path("prompts.jsonl")), output=str(place.path(layout)), **drawn)
    found["streamed"] = _printed(lambda: _answer(place, LAYOUTS["DP2"], prompt="w1 w2", max_new_tokens=5))
    return found


def _train(place: Place) -> None:
    flags = ["--pretrained-checkpoint", place.base, "--train-data-path", place.data, "--num-workers", "0"]
    flags += ["--peft-method", "lora", "--lora-rank", "3", "--lora-alpha", "9", "--lr", "2e-2", "--seq-length", "32"]
    flags += ["--global-batch-size", "8", "--train-iters", "6", "--save", str(place.path("run")), "--seed", "5"]
    with contextlib.redirect_stdout(io.StringIO()):
        finetune(parse_arguments(flags))
    stop_model_parallel()


def _evaluate(place: Place, name: str, flags: list[str]) -> dict[str, Any]:
    """The file of results, and the file of questions and answers by (task, number)."""
    output = place.path(f"{name}.json")
    settings = HarnessSettings(list(TASKS), str(output), [place.tasks], batch_size=4, log_samples=True)
    _ask(flags, lambda config: evaluate(config, settings))
    samples = map(json.loads, output.with_suffix(".samples.jsonl").read_text().splitlines())
    return {**json.loads(output.read_text()), "samples": {(one["task"], one["doc_id"]): one for one in samples}}


def _answer(place: Place, flags: list[str] | None = None, **settings: Any) -> None:
    _ask([*place.run, *(flags or [])], lambda config: answer(config, AnswerSettings(**settings)))


def _ask(flags: list[str], question: Any) -> None:
    question(parse_arguments(model_flags(flags), {"WORLD_SIZE": str(dist.get_world_size())}))
    dist.barrier()
    stop_model_parallel()


def _by_the_harness(place: Place) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [name for name in TASKS if name != "tiny_drawn"]
    manager = TaskManager(include_path=place.tasks, include_defaults=False)
    model = HFLM(pretrained=place.base, device="cpu", dtype="float32", batch_size=4)
    results: Any = simple_evaluate(model=model, tasks=names, task_manager=manager)  # pyright: ignore
    plain = json.loads(json.dumps(results["samples"], default=str))
    samples = {(task, one["doc_id"]): one for task, of_task in plain.items() for one in of_task}
    return {"results": results["results"], "samples": samples}


def _printed(work: Any) -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        work()
    return written.getvalue()


def _complaint(flags: list[str], prompt: str) -> str:
    try:
        _ask(flags, lambda config: answer(config, AnswerSettings(prompt=prompt)))
    except ConfigurationError as error:
        stop_model_parallel()
        return str(error)
    return "nothing"
