"""Generation with a key-value cache, batched, at any layout.

Rows that have ended leave the batch: the longest answer alone pays for its length. Equal prompts of a batch go through
the model once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_peft.config import require
from megatron_peft.evaluation.forward import CachedRows, left_padded
from megatron_peft.evaluation.sampling import GREEDY, RandomStreams, Sampling, choose_tokens
from megatron_peft.evaluation.stages import broadcast_from_last_stage
from megatron_peft.evaluation.switches import inference

OnToken = Callable[[int, int], None]


def never(ids: Sequence[int]) -> bool:
    """Answers end at an end token or at their longest."""
    return False


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Args:
        end_ids: tokens that end an answer; they are not part of it.
        max_new_tokens: the longest answer.
        is_complete: asked after each token with the answer's ids so far; True ends it, its last token included.
        batch_size: answers that grow together, on each replica.
        sampling: what tokens are drawn from.
        seed: of everything that is drawn.
        max_length: of prompt and answer together, in tokens; None for no limit.
    """

    end_ids: frozenset[int]
    max_new_tokens: int
    is_complete: Callable[[Sequence[int]], bool] = never
    batch_size: int = 32
    sampling: Sampling = GREEDY
    seed: int = 0
    max_length: int | None = None

    def room(self, prompt: Sequence[int]) -> int:
        """The longest answer to a prompt, in tokens."""
        limit = self.max_new_tokens if self.max_length is None else self.max_length - len(prompt)
        return min(limit, self.max_new_tokens)


def generate(
    model_chunks: Sequence[GPTModel],
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    report: Callable[[int], None] = lambda n: None,
    *,
    names: Sequence[str] | None = None,
    on_token: OnToken = lambda row, token: None,
) -> list[list[int]]:
    """An answer to each prompt, token by token.

    Args:
        model_chunks: this rank's part of the model, not wrapped; every rank of a replica calls this alike. They are
            left as they were: training mode and sequence parallelism are off only meanwhile.
        prompts: token ids, each at least one. One that stands there n times gets n answers.
        settings: when an answer ends, and what tokens are drawn from.
        report: told how many prompts a batch finished.
        names: of the random streams, one for each prompt; by default its number.
        on_token: told (number of the prompt, id) of each new token, in time.

    Returns:
        New ids of each prompt, in the order of the prompts, the same on every rank of the replica.

    Raises:
        ConfigurationError: a prompt is empty.
    """
    require(all(prompts), "a prompt is empty: generation needs at least one token to start from.")
    streams = RandomStreams(settings.seed, names or [str(index) for index in range(len(prompts))])
    answers = _Answers(prompts, settings, on_token)
    running = [index for index, prompt in enumerate(prompts) if settings.room(prompt) > 0]
    running.sort(key=lambda index: (len(prompts[index]), tuple(prompts[index])))  # little padding in a batch
    report(len(prompts) - len(running))
    with inference(model_chunks):
        for start in range(0, len(running), settings.batch_size):
            batch = running[start : start + settings.batch_size]
            for indices, logits in _grow(model_chunks, batch, answers):
                draws = streams.draw(indices) if settings.sampling.temperature else None
                answers.append(indices, _choose(logits, settings.sampling, draws, len(indices)))
            report(len(batch))
    return answers.ids


class _Answers:
    """The answers so far, by the number of their prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, on_token: OnToken) -> None:
        self.prompts = prompts
        self.settings = settings
        self.ids: list[list[int]] = [[] for _ in prompts]
        self._on_token = on_token
        self._ended: set[int] = set()

    def append(self, indices: Sequence[int], tokens: Sequence[int]) -> None:
        for index, token in zip(indices, tokens, strict=True):
            if token not in self.settings.end_ids:
                self.ids[index].append(token)
                self._on_token(index, token)
            if token in self.settings.end_ids or self._is_complete(index):
                self._ended.add(index)

    def goes_on(self, index: int) -> bool:
        return index not in self._ended

    def _is_complete(self, index: int) -> bool:
        answer = self.ids[index]
        return len(answer) >= self.settings.room(self.prompts[index]) or self.settings.is_complete(answer)


def _grow(
    model_chunks: Sequence[GPTModel], batch: Sequence[int], answers: _Answers
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Runs one batch: yields rows that go on and the logits of their next token, until no row goes on.

    Whoever asks for the next has appended a token to each.
    """
    prompts = [tuple(answers.prompts[index]) for index in batch]
    distinct = list(dict.fromkeys(prompts))
    tokens, padding = left_padded(distinct)
    num_new = max(answers.settings.room(prompt) for prompt in distinct)
    rows = CachedRows(model_chunks, padding, tokens.shape[1] + num_new)
    logits = rows.forward(tokens)
    if len(distinct) < len(prompts):
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        copies = [row_of[prompt] for prompt in prompts]
        rows.keep(copies)
        logits = None if logits is None else logits[copies]
    running = list(batch)
    while True:
        yield running, logits
        kept = [row for row, index in enumerate(running) if answers.goes_on(index)]
        if not kept:
            return
        if len(kept) < len(running):
            rows.keep(kept)
            running = [running[row] for row in kept]
        newest = [[answers.ids[index][-1]] for index in running]
        logits = rows.forward(torch.tensor(newest, device=torch.cuda.current_device()))


def _choose(logits: Tensor | None, sampling: Sampling, draws: Tensor | None, num_rows: int) -> list[int]:
    """The next token of each row, from the logits [b, 1, v] of the last stage."""
    if logits is None:
        tokens = torch.empty(num_rows, dtype=torch.long, device=torch.cuda.current_device())
    else:
        tokens = choose_tokens(logits[:, -1], sampling, draws)
    return broadcast_from_last_stage(tokens).tolist()
