"""Greedy answers, scores and speed of the split model beside those of transformers, on the same prompts."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmarks.measure import median_ratio, take_turns
from megatron_peft.benchmarks.subjects import Setting, join, leave, load_base, load_with_transformers
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.evaluation.scoring import Continuation, score
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.ranks import run_ranks

LARGEST_DIFFERENCE = 1e-4
NUM_PROMPTS, NUM_NEW, NUM_TIMED = 200, 16, 16
PROMPT_LENGTHS = 4, 32  # tokens, shortest and longest
TIMED_NEW = 32
BATCH_SIZE = 50
SEED = 0
LAYOUTS: tuple[dict[str, int], ...] = ({"tensor_parallel": 1}, {"tensor_parallel": 3}, {"pipeline_parallel": 2})
FOREVER = frozenset[int]()  # nothing ends an answer: both sides do the same work


@dataclass(frozen=True)
class Questions:
    """What every side is asked."""

    setting: Setting
    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Replies:
    """Greedy answers, and the log-likelihood of each (summed over its tokens)."""

    answers: list[list[int]]
    log_likelihoods: list[float]


def generation_figures(setting: Setting, turns: int) -> list[Figure]:
    """Prompts whose answer differs, the largest difference of a log-likelihood, and the quotient of CPU seconds."""
    questions = Questions(setting, some_prompts(read_shape(setting.checkpoint).vocab_size))
    expected = run_ranks(1, replies_of_transformers, questions, timeout=1800)[0]
    figures = []
    for layout in LAYOUTS:
        one = dataclasses.replace(questions, setting=dataclasses.replace(setting, **layout))
        found = run_ranks(one.setting.world_size, our_replies, one, timeout=1800)[0]
        figures += compare(one.setting.layout, found, expected)
    seconds = run_ranks(1, time_generation, (questions, turns), timeout=1800)[0]
    ratio = median_ratio(seconds["ours"], seconds["transformers"])
    note = f"{NUM_TIMED} prompts, {TIMED_NEW} new tokens each, greedy, one batch"
    return [*figures, Figure("TP1: CPU seconds / transformers' generate", ratio, 1.0, "", note)]


def some_prompts(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Random tokens, of unequal lengths."""
    draw = random.Random(SEED)
    return tuple(
        tuple(draw.randrange(vocab_size) for _ in range(draw.randint(*PROMPT_LENGTHS))) for _ in range(NUM_PROMPTS)
    )


def compare(layout: str, found: Replies, expected: Replies) -> list[Figure]:
    """Two figures of a layout."""
    differing = sum(ours != theirs for ours, theirs in zip(found.answers, expected.answers, strict=True))
    pairs = zip(found.log_likelihoods, expected.log_likelihoods, strict=True)
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    note = f"{len(expected.answers)} prompts, {NUM_NEW} greedy tokens each, float32"
    return [
        Figure(f"{layout}: answers that are not transformers'", differing, 0, "", note),
        Figure(f"{layout}: largest difference of an answer's log-likelihood", largest, LARGEST_DIFFERENCE, "", note),
    ]


def replies_of_transformers(questions: Questions) -> Replies:
    """By `generate`, and by one forward of prompt and answer for the scores. Started on a rank of its own.

    Prompts of one length go together, so that nothing is padded or masked.
    """
    model = load_with_transformers(questions.setting)
    numbers = sorted(range(len(questions.prompts)), key=lambda number: len(questions.prompts[number]))
    found: dict[int, tuple[list[int], float]] = {}
    for _, group in itertools.groupby(numbers, key=lambda number: len(questions.prompts[number])):
        alike = list(group)
        prompts = [questions.prompts[number] for number in alike]
        answers = _greedy(model, prompts, NUM_NEW)
        found |= zip(alike, zip(answers, _log_likelihoods(model, prompts, answers), strict=True), strict=True)
    in_order = [found[number] for number in range(len(numbers))]
    return Replies([answer for answer, _ in in_order], [total for _, total in in_order])


@torch.no_grad()
def _log_likelihoods(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:  # of prompts of one length
    whole = torch.tensor([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    logits = model(whole).logits[:, len(prompts[0]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answers)[:, :, None]).sum((1, 2)).tolist()


def our_replies(questions: Questions) -> Replies:
    """Started on every rank of the layout."""
    join(questions.setting)
    chunks: Any = load_base(questions.setting)[0]
    answers = generate(chunks, questions.prompts, GenerationSettings(FOREVER, NUM_NEW, batch_size=BATCH_SIZE))
    asked = [Continuation(prompt, tuple(ids)) for prompt, ids in zip(questions.prompts, answers, strict=True)]
    scores = score(chunks, asked, BATCH_SIZE)
    leave()
    return Replies(answers, [one.log_likelihood for one in scores])


def time_generation(job: tuple[Questions, int]) -> dict[str, list[float]]:
    """CPU seconds of each turn of both, in one process. Started on a rank of its own."""
    questions, turns = job
    torch.set_num_threads(1)
    join(questions.setting)
    chunks: Any = load_base(questions.setting)[0]
    model = load_with_transformers(questions.setting)
    prompts = questions.prompts[:NUM_TIMED]
    settings = GenerationSettings(FOREVER, TIMED_NEW, batch_size=NUM_TIMED)
    seconds = take_turns(
        {
            "ours": lambda: generate(chunks, prompts, settings),
            "transformers": lambda: _greedy(model, prompts, TIMED_NEW),
        },
        turns,
    )
    leave()
    return seconds


def _greedy(model: Any, prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
    """transformers' generate: left-padded, with its cache, nothing ends an answer."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        found = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[:, longest:].tolist()
