"""Evaluations and answers of a trained run, alone and split among ranks, for test_harness.py.

They find a model in `base`, its training data in `pairs.jsonl`, tasks in `tasks`; what they write lies beside these.
"""

import contextlib
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils import collect_env

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import AnswerSettings, HarnessSettings
from megatron_peft.evaluation.answers import answer
from megatron_peft.evaluation.harness_run import evaluate
from megatron_peft.evaluation.model import saved_values
from megatron_peft.runtime.launch import start_world, stop_model_parallel
from megatron_peft.training.run import finetune
from tests.evaluation.local_tasks import TASKS

LAYOUTS = {"TP2": ["--tensor-model-parallel-size", "2"], "PP2": ["--pipeline-model-parallel-size", "2"], "DP2": []}


def run_flags(folder: Path) -> list[str]:
    return ["--load", str(folder / "run")]


def run_alone(folder: Path) -> dict[str, Any]:
    """Train, then ask the base, the run, and the base as the harness's own backend sees it."""
    start_world()
    _without_pip()
    _train(folder)
    base = ["--pretrained-checkpoint", str(folder / "base")]
    found = {"base": _evaluate(folder, "base", base), "run": _evaluate(folder, "run", run_flags(folder))}
    found["finished"] = len((folder / "run.requests.jsonl").read_text().splitlines())
    found["hf"] = _by_the_harness(folder)
    found["streamed"] = _printed(lambda: _answer(folder, prompt="w1 w2", max_new_tokens=5))
    _answer(folder, prompt_file=str(folder / "prompts.jsonl"), output=str(folder / "alone.jsonl"), max_new_tokens=16)
    found["complaints"] = [
        _complaint([*run_flags(folder), "--lora-rank", "4"], "w1"),
        _complaint([*run_flags(folder), "--pretrained-checkpoint", str(folder / "other")], "w1"),
        _complaint(run_flags(folder), "w1 " * 300),
    ]
    return found


def run_until_killed(job: tuple[Path, int, float]) -> None:
    """The evaluation of the run, killed so many seconds after so many of its requests are answered on disk."""
    folder, num_requests, seconds = job
    file = folder / "stopped.requests.jsonl"

    def kill() -> None:
        while not file.exists() or file.read_bytes().count(b"\n") < num_requests:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    start_world()
    threading.Thread(target=kill, daemon=True).start()
    _evaluate(folder, "stopped", run_flags(folder))


def run_again(folder: Path) -> dict[str, Any]:
    """To its end, and once more over the results that it has written."""
    start_world()
    _evaluate(folder, "stopped", run_flags(folder))
    return _evaluate(folder, "stopped", run_flags(folder))


def run_split(job: tuple[Path, list[str]]) -> dict[str, Any]:
    """The trained run at these layouts: results, and a file of answers that are drawn."""
    folder, layouts = job
    start_world()
    _without_pip()
    found: dict[str, Any] = {}
    drawn = {"temperature": 1.0, "num_samples": 2, "batch_size": 3, "max_new_tokens": 16}
    for layout in dict.fromkeys(layouts):
        flags = LAYOUTS[layout]
        found[layout] = _evaluate(folder, layout, [*run_flags(folder), *flags])
        _answer(folder, flags, prompt_file=str(folder / "prompts.jsonl"), output=str(folder / layout), **drawn)
    found["streamed"] = _printed(lambda: _answer(folder, LAYOUTS["DP2"], prompt="w1 w2", max_new_tokens=5))
    return found


def _without_pip() -> None:
    """The harness asks pip for every package and writes its list beside each result: two seconds each time."""
    collect_env.get_pip_packages = lambda *_: ("pip3", "")


def _train(folder: Path) -> None:
    flags = ["--pretrained-checkpoint", str(folder / "base"), "--train-data-path", str(folder / "pairs.jsonl")]
    flags += "--peft-method lora --lora-rank 3 --lora-alpha 9 --lr 2e-2 --seq-length 32 --num-workers 0".split()
    flags += ["--global-batch-size", "8", "--train-iters", "6", "--save", str(folder / "run"), "--seed", "5"]
    _printed(lambda: finetune(read_config(flags)))
    stop_model_parallel()


def _evaluate(folder: Path, name: str, flags: list[str]) -> dict[str, Any]:
    """The file of results, and the file of questions and answers by (task, number)."""
    output = folder / f"{name}.json"
    settings = HarnessSettings(list(TASKS), str(output), [str(folder / "tasks")], batch_size=4, log_samples=True)
    _ask(flags, lambda config: evaluate(config, settings))
    samples = map(json.loads, output.with_suffix(".samples.jsonl").read_text().splitlines())
    return {**json.loads(output.read_text()), "samples": {(one["task"], one["doc_id"]): one for one in samples}}


def _answer(folder: Path, flags: list[str] | None = None, **settings: Any) -> None:
    _ask([*run_flags(folder), *(flags or [])], lambda config: answer(config, AnswerSettings(**settings)))


def _ask(flags: list[str], question: Any) -> None:
    question(read_config(flags, {"WORLD_SIZE": str(dist.get_world_size())}, saved=saved_values))
    dist.barrier()
    stop_model_parallel()


def _by_the_harness(folder: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [name for name in TASKS if name != "tiny_drawn"]
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(folder / "base"), device="cpu", dtype="float32", batch_size=4)
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
