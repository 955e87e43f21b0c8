"""Greedy generation with a key-value cache, batched, at any tensor-parallel size.

Prompts of unequal length are padded on the left, so that every row's newest token stands in the last column. The
padding is hidden from attention by a key mask; rotary and ALiBi positions are relative, so the shift changes nothing.
Finished rows leave the batch: the longest answer alone pays for its length.

Letters: b rows, s new positions of a forward, k positions in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_peft.config import require

# What modules and their configuration call it; static batching refuses all of it.
SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


def never(ids: Sequence[int]) -> bool:
    """Answers end at the end-of-sequence token or at their longest."""
    return False


@dataclass(frozen=True)
class Greedy:
    """How to generate.

    Args:
        eos_id: ends an answer; it is not part of it.
        max_new_tokens: the longest answer.
        is_complete: asked after each token with the answer's ids so far; True ends it, its last token included.
        batch_size: prompts that run together.
    """

    eos_id: int
    max_new_tokens: int
    is_complete: Callable[[Sequence[int]], bool] = never
    batch_size: int = 32


def generate(
    model: GPTModel, prompts: Sequence[Sequence[int]], settings: Greedy, report: Callable[[int], None] = lambda n: None
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token.

    Args:
        model: the whole model (one pipeline stage), not wrapped; every tensor-parallel rank calls this alike. It is
            left as it was: training mode and sequence parallelism are off only meanwhile.
        prompts: token ids, each at least one.
        settings: when an answer ends.
        report: told how many prompts a batch finished.

    Returns:
        New ids of each prompt, in the order of the prompts, the same on every rank.

    Raises:
        ConfigurationError: the model is split over pipeline stages, or a prompt is empty.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    require(stages == 1, f"generation runs at --pipeline-model-parallel-size 1, not {stages}: tensor-parallel only.")
    require(all(prompts), "a prompt is empty: generation needs at least one token to start from.")
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding in a batch
    with torch.no_grad(), _evaluating(model), _without_sequence_parallelism(model):
        for start in range(0, len(prompts), settings.batch_size):
            rows = by_length[start : start + settings.batch_size]
            for row, answer in zip(rows, _continue(model, [prompts[row] for row in rows], settings), strict=True):
                answers[row] = answer
            report(len(rows))
    return answers


def _continue(model: GPTModel, prompts: Sequence[Sequence[int]], settings: Greedy) -> list[list[int]]:
    """Answers of one batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    batch = _Batch(model, prompts, settings.max_new_tokens)
    running = list(range(len(prompts)))  # the prompt of each row of the batch
    tokens = batch.prompt_tokens
    for _ in range(settings.max_new_tokens):
        tokens = batch.next_tokens(tokens)
        kept = []
        for row, (index, token) in enumerate(zip(running, tokens.flatten().tolist(), strict=True)):
            if token == settings.eos_id:
                continue
            answers[index].append(token)
            if not settings.is_complete(answers[index]):
                kept.append(row)
        if not kept:
            break
        if len(kept) < len(running):
            running = [running[row] for row in kept]
            tokens = batch.keep(kept, tokens)
    return answers


class _Batch:
    """Rows that are generated together: the model's cache, and which of its positions are padding."""

    def __init__(self, model: GPTModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        longest = max(map(len, prompts))
        device = next(model.parameters()).device
        self._model = model
        self._cache = StaticInferenceContext(len(prompts), longest + max_new_tokens)
        padding = [longest - len(prompt) for prompt in prompts]
        self._padding = torch.tensor(padding, device=device)  # [b], on the left
        self.prompt_tokens = torch.tensor(
            [[0] * missing + list(prompt) for missing, prompt in zip(padding, prompts, strict=True)], device=device
        )

    def next_tokens(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, 1]
        """The likeliest token after `tokens`, which follow what the cache holds."""
        done = self._cache.sequence_len_offset
        positions = torch.arange(done, done + tokens.shape[1], device=tokens.device)
        logits = self._model(
            input_ids=tokens,
            position_ids=positions.expand_as(tokens),
            attention_mask=self._hidden_keys(done + tokens.shape[1]),
            inference_context=self._cache,
            runtime_gather_output=True,
        )  # [b, 1, vocabulary]: megatron-core computes the last position only
        self._cache.increment_sequence_len_offset(tokens.shape[1])
        return logits[:, -1:].argmax(-1)

    def keep(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Drop all other rows, of `tokens` [b, 1] too."""
        memory = self._cache.key_value_memory_dict
        for layer, pair in memory.items():
            memory[layer] = tuple(x[:, rows] for x in pair)
        self._padding = self._padding[rows]
        return tokens[rows]

    def _hidden_keys(self, num_keys: int) -> Tensor:  # -> [b, 1, 1, k]
        """True where a key is padding."""
        keys = torch.arange(num_keys, device=self._padding.device)
        return (keys < self._padding[:, None])[:, None, None]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _without_sequence_parallelism(model: nn.Module) -> Iterator[None]:
    """Switch it off in modules and configurations, and afterwards on again exactly where it was on.

    megatron-core's own `set_model_to_sequence_parallel` remembers models by `id`, which a later model may inherit.
    """
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))}
    switched = [(o, name) for o in owners.values() for name in SEQUENCE_PARALLEL_SWITCHES if getattr(o, name, False)]
    for owner, name in switched:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
