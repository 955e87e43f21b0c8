"""Batched generation with a key-value cache, at any layout. Letters: b rows, v vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_peft.config import require
from megatron_peft.config.evaluation import Sampling
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.evaluation.scoring import CachedRows, broadcast_from_last_stage, inference, left_padded
from megatron_peft.parallel.layout import generator_for

GREEDY = Sampling()


class RandomStreams:
    """A random stream for each row, seeded by the run's seed and the row's name.

    Each token takes one number of its row's stream, so an answer depends neither on the other rows nor on the layout.
    """

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self._generators = [generator_for(seed, name) for name in names]

    def draw(self, rows: Sequence[int]) -> Tensor:
        """The next number of each of these rows, from 0 to 1: [b], float64."""
        return torch.cat([torch.rand(1, generator=self._generators[row], dtype=torch.float64) for row in rows])


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """The next token of each row: the likeliest, or the first whose cumulative probability exceeds its draw.

    Args:
        logits: [b, v], float32.
        draws: [b], from 0 to 1; ignored at temperature 0.

    Returns:
        [b] ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    # In the order of ids: rounding would change the order of probabilities.
    cumulative = probabilities(logits, sampling).double().cumsum(-1)
    targets = draws.to(logits.device) * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """[b, v] -> [b, v]: softmax(logits / temperature) over the tokens that top_k and top_p leave, 0 elsewhere."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, ids = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        is_beyond = before >= sampling.top_p  # the likelier tokens reach top_p without this one
        logits = logits.masked_fill(is_beyond.scatter(-1, ids, is_beyond), -torch.inf)
    return logits.softmax(-1)


OnToken = Callable[[int, int], None]


def never(ids: Sequence[int]) -> bool:
    """The default `is_complete`: only an end token or the length limit ends an answer."""
    return False


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Args:
        end_ids: tokens that end an answer and are not part of it.
        max_new_tokens: length limit of an answer.
        is_complete: called with the ids of an answer after each token; True ends the answer after that token.
        batch_size: prompts per batch, on each replica.
        seed: of sampling.
        max_length: limit of prompt and answer together, in tokens; None for no limit.
    """

    end_ids: frozenset[int]
    max_new_tokens: int
    is_complete: Callable[[Sequence[int]], bool] = never
    batch_size: int = 32
    sampling: Sampling = GREEDY
    seed: int = 0
    max_length: int | None = None

    def room(self, prompt: Sequence[int]) -> int:
        """Length limit of the answer to this prompt, in tokens."""
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
    """Generate an answer to each prompt. All ranks of a replica call it together.

    Args:
        model_chunks: of this rank, without a data-parallel wrapper; their training mode and sequence parallelism are
            restored afterwards.
        prompts: token ids, at least one each. A prompt that is given n times gets n answers.
        report: called with the number of prompts that have just been answered.
        names: of the prompts' random streams; by default the prompts' numbers.
        on_token: called with (number of the prompt, id) as each token is generated.

    Returns:
        New ids for each prompt, in the order of the prompts, the same on every rank of the replica.

    Raises:
        ConfigurationError: a prompt is empty.
    """
    require(all(prompts), "a prompt is empty: generation needs at least one token to start from.")
    streams = RandomStreams(settings.seed, names or [str(index) for index in range(len(prompts))])
    answers = _Answers(prompts, settings, on_token)
    running = [index for index, prompt in enumerate(prompts) if settings.room(prompt) > 0]
    running.sort(key=lambda index: (len(prompts[index]), tuple(prompts[index])))  # so that batches need little padding
    report(len(prompts) - len(running))
    with inference(model_chunks):
        for start in range(0, len(running), settings.batch_size):
            batch = running[start : start + settings.batch_size]
            for indices, logits in _run_batch(model_chunks, batch, answers):
                draws = streams.draw(indices) if settings.sampling.temperature else None
                tokens = (
                    torch.empty(len(indices), dtype=torch.long, device=torch.cuda.current_device())
                    if logits is None  # another stage's
                    else choose_tokens(logits[:, -1], settings.sampling, draws)
                )
                if num_ended := answers.append(indices, broadcast_from_last_stage(tokens).tolist()):
                    report(num_ended)
    return answers.ids


class _Answers:
    """The answers so far, in the order of the prompts."""

    def __init__(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, on_token: OnToken) -> None:
        self.prompts = prompts
        self.settings = settings
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.ended: set[int] = set()
        self._on_token = on_token

    def append(self, indices: Sequence[int], tokens: Sequence[int]) -> int:
        """Add a token to each of these answers; returns how many of them end with it."""
        before = len(self.ended)
        for index, token in zip(indices, tokens, strict=True):
            if token not in self.settings.end_ids:
                self.ids[index].append(token)
                self._on_token(index, token)
            if token in self.settings.end_ids or self._is_complete(index):
                self.ended.add(index)
        return len(self.ended) - before

    def _is_complete(self, index: int) -> bool:
        answer = self.ids[index]
        return len(answer) >= self.settings.room(self.prompts[index]) or self.settings.is_complete(answer)


def _run_batch(
    model_chunks: Sequence[GPTModel], batch: Sequence[int], answers: _Answers
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Run one batch: yields the prompts' numbers and the logits [b, 1, v] of their next tokens, until all have ended.

    The caller appends a token to each of these answers before it resumes the generator.
    """
    prompts = [tuple(answers.prompts[index]) for index in batch]
    distinct = list(dict.fromkeys(prompts))
    tokens, padding = left_padded(distinct)
    num_new = max(answers.settings.room(prompt) for prompt in distinct)
    rows = CachedRows(model_chunks, padding, tokens.shape[1] + num_new)
    logits = rows.forward(tokens)
    if len(distinct) < len(prompts):  # equal prompts went through the model once
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        copies = [row_of[prompt] for prompt in prompts]
        rows.keep(copies)
        logits = None if logits is None else logits[copies]
    running = list(batch)
    while True:
        yield running, logits
        kept = [row for row, index in enumerate(running) if index not in answers.ended]
        if not kept:
            return
        if len(kept) < len(running):  # answers that have ended leave the batch
            rows.keep(kept)
            running = [running[row] for row in kept]
        newest = [[answers.ids[index][-1]] for index in running]
        logits = rows.forward(torch.tensor(newest, device=torch.cuda.current_device()))


_FURTHER_TOKENS = 4  # a tokenizer may treat the first token of a text differently


class StopTexts:
    """Texts that end an answer as soon as it contains one of them, however the tokens split the text.

    `end_ids` are the texts that are special tokens, which a decoded answer never shows. Empty texts are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self.end_ids = frozenset(special[text] for text in texts if text in special)
        self.texts = [text for text in texts if text and text not in special]
        # A visible token has at least one byte, so this many of the last tokens hold any text that has just ended.
        self._num_tokens = max((len(text.encode()) for text in self.texts), default=0) + _FURTHER_TOKENS

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether the newest token completes one of the texts."""
        if not self.texts:
            return False
        tail = self._tokenizer.decode(ids[-self._num_tokens :])
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        """The answer before the first of the texts."""
        for stop in self.texts:
            text = text.split(stop, 1)[0]
        return text
