"""Generation with a key-value cache, batched, at any layout.

Rows that have ended leave the batch: the longest answer alone pays for its length. Equal prompts of a batch go through
the model once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_peft.config import Requirements, require
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.evaluation.forward import CachedRows, broadcast_from_last_stage, inference, left_padded
from megatron_peft.parallel.layout import generator_for

# Which token comes next: the likeliest, or one drawn from the likeliest.
#
# Every row has a random stream of its own, seeded by the run's seed and the row's name, and a token takes one number
# from it. So a row's answer depends neither on the rows beside it nor on the layout.
#
# Letters: b rows, v vocabulary.


@dataclass(frozen=True)
class Sampling:
    """What is drawn from.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: of those, the fewest likeliest ones that together have this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.not_negative("temperature", "top_k")
            require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it is a probability, above 0 and at most 1.")


GREEDY = Sampling()


class RandomStreams:
    """Numbers between 0 and 1 for rows with names."""

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self._generators = [generator_for(seed, name) for name in names]

    def draw(self, rows: Sequence[int]) -> Tensor:
        """The next number of each of these rows: [b], float64."""
        return torch.cat([torch.rand(1, generator=self._generators[row], dtype=torch.float64) for row in rows])


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """The next token of each row: the first whose cumulative probability, in the order of ids, exceeds its draw.

    The order of ids, unlike that of probabilities, is not upset by rounding.

    Args:
        logits: [b, v], float32.
        draws: [b], between 0 and 1; not looked at when the likeliest is taken.

    Returns:
        [b] ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    cumulative = probabilities(logits, sampling).double().cumsum(-1)
    targets = draws.to(logits.device) * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """[b, v] -> [b, v]: softmax(logits / temperature) over the tokens that are drawn from, 0 elsewhere."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(_beyond(logits, sampling.top_p), -torch.inf)
    return logits.softmax(-1)


def _beyond(logits: Tensor, top_p: float) -> Tensor:
    """True for tokens before which, by falling probability, `top_p` is reached already."""
    ordered, ids = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return (before >= top_p).scatter(-1, ids, before >= top_p)


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


_FURTHER_TOKENS = 4  # a tokenizer may treat the first token of a text differently


class StopTexts:
    """Ends an answer as soon as one of some texts stands in it, however its tokens are cut.

    Args:
        tokenizer: of the model.
        texts: empty ones end nothing.

    `end_ids` are those of them that are special tokens: they never appear in a decoded text.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self.end_ids = frozenset(special[text] for text in texts if text in special)
        self.texts = [text for text in texts if text and text not in special]
        # A token that shows holds at least one byte, so that many tokens from the end are enough.
        self._num_tokens = max((len(text.encode()) for text in self.texts), default=0) + _FURTHER_TOKENS

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether the answer so far holds one of the texts, the newest token being part of it."""
        if not self.texts:
            return False
        tail = self._tokenizer.decode(ids[-self._num_tokens :])
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        """An answer up to the first of the texts."""
        for stop in self.texts:
            text = text.split(stop, 1)[0]
        return text
