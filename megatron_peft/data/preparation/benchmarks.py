"""The benchmarks of the paper: which files, templates and tasks each is made of."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from megatron_peft.config import require
from megatron_peft.data.preparation.document import Document
from megatron_peft.data.preparation.records import read_gsm8k, read_humaneval, read_instructions
from megatron_peft.data.preparation.template import TaskTemplate
from megatron_peft.data.preparation.text_pairs import read_text_pairs
from megatron_peft.data.prepare import Benchmark, Tests
from megatron_peft.data.task_readers import GLUE_TASKS, read_glue

BLEU_TOKENS = ("13a", "zh", "char", "intl")
NUM_SAMPLES, LARGEST_K = 20, 10  # as in the template humaneval_sampled


def glue(name: str, folder: Path, skip_damaged: bool = False) -> Benchmark:
    """One task of GLUE; `folder` is GLUE's own, with MNLI/, QQP/, SST-2/ and QNLI/ in it."""
    task = GLUE_TASKS[name]
    tests = [
        Tests(
            (TaskTemplate(task_name),), read_glue(task, folder / task.folder / file, skip_damaged), f"{task_name}.jsonl"
        )
        for task_name, file in task.tests.items()
    ]
    documents = read_glue(task, folder / task.folder / "train.tsv", skip_damaged)
    return Benchmark(TaskTemplate(f"glue_{name}"), documents, tests)


def gsm8k(folder: Path) -> Benchmark:
    """`folder` holds train.jsonl and test.jsonl, as published."""
    template = TaskTemplate("gsm8k_8shot")
    tests = Tests((template,), read_gsm8k(folder / "test.jsonl"), "gsm8k_8shot.jsonl")
    return Benchmark(template, read_gsm8k(folder / "train.jsonl"), [tests])


def translation(
    files: Sequence[Path],
    test_files: Sequence[Path],
    languages: tuple[str, str],
    task: str = "translation",
    bleu_tokens: str = "13a",
) -> Benchmark:
    """Sentence pairs; without `test_files` the split's test part is scored. `languages` are named in the prompt."""
    require(bleu_tokens in BLEU_TOKENS, f"--bleu-tokenize is {bleu_tokens}; it is {', '.join(BLEU_TOKENS)}.")
    changes = {"task: translation": f"task: {task}"}
    if bleu_tokens != "13a":
        function = f"megatron_peft.evaluation.task_metrics.corpus_bleu_{bleu_tokens}"
        changes |= {"aggregation: bleu": f"aggregation: !function {function}", "tok:13a": f"tok:{bleu_tokens}"}
    template = TaskTemplate("translation", changes)
    documents = read_text_pairs(test_files, *languages) if test_files else ()
    return Benchmark(template, read_text_pairs(files, *languages), [Tests((template,), documents, f"{task}.jsonl")])


def humaneval(problems: Path, num_samples: int = NUM_SAMPLES) -> Benchmark:
    """HumanEval, for scoring only: greedy and sampled."""
    require(
        num_samples >= LARGEST_K,
        f"--num-samples is {num_samples}; pass@{LARGEST_K} needs at least {LARGEST_K} samples a problem. "
        "(For pass@1 alone there is the task humaneval_greedy.)",
    )
    sampled = TaskTemplate("humaneval_sampled", {f"repeats: {NUM_SAMPLES}": f"repeats: {num_samples}"})
    tests = Tests((TaskTemplate("humaneval_greedy"), sampled), read_humaneval(problems), "humaneval.jsonl")
    return Benchmark(None, tests=[tests])


def instructions(files: Sequence[Path], problems: Path) -> Benchmark:
    """Instruction data, for training only; nothing of HumanEval's problems stays in it."""
    documents: Iterator[Document] = chain.from_iterable(map(read_instructions, files))
    return Benchmark(TaskTemplate("instructions"), documents, held_out=read_humaneval(problems))
