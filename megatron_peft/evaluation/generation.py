"""Batched generation with a key-value cache, at any layout. Letters: b rows, v vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_peft.config import require
from megatron_peft.config.evaluation import Sampling
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.evaluation.model import InferenceModel
from megatron_peft.evaluation.scoring import CachedRows, from_last_stage, inference, left_padded, over_replicas
from megatron_peft.parallel.layout import generator_for

GREEDY = Sampling()


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The next token of each row [b]: the likeliest, or the first whose cumulative probability exceeds its draw.

    logits: [b, v], float32; draws: [b], from 0 to 1, ignored at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
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
    is_complete: Callable[[Sequence[int]], bool] | None = None
    batch_size: int = 32
    sampling: Sampling = GREEDY
    seed: int = 0
    max_length: int | None = None

    def room(self, prompt: Sequence[int]) -> int:
        """Length limit of the answer to this prompt, in tokens."""
        limit = self.max_new_tokens if self.max_length is None else self.max_length - len(prompt)
        return min(limit, self.max_new_tokens)


OnToken = Callable[[int, int], None]


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
        model_chunks: of this rank, without a data-parallel wrapper; restored to their mode afterwards.
        prompts: token ids, at least one each.
        report: called with the number of prompts that have just been answered.
        names: of the prompts' random streams; by default the prompts' numbers.
        on_token: called with (number of the prompt, id) as each token is generated.

    Returns:
        New ids for each prompt, in the order of the prompts, the same on every rank of the replica.
    """
    require(all(prompts), "a prompt is empty: generation needs at least one token to start from.")
    answers: list[list[int]] = [[] for _ in prompts]
    # Each token takes a number, from 0 to 1, from the random stream of its prompt, so that an answer depends neither on
    # the other rows nor on the layout.
    streams = [generator_for(settings.seed, name) for name in names or map(str, range(len(prompts)))]

    def goes_on(index: int, token: int) -> bool:
        """Add the token to its answer, and say whether that answer continues."""
        if token in settings.end_ids:
            return False
        answers[index].append(token)
        on_token(index, token)
        is_complete = settings.is_complete is not None and settings.is_complete(answers[index])
        return len(answers[index]) < settings.room(prompts[index]) and not is_complete

    def answer(running: Sequence[int]) -> None:
        batch = [prompts[index] for index in running]
        tokens, padding = left_padded(batch)
        rows = CachedRows(model_chunks, padding, tokens.shape[1] + max(map(settings.room, batch)))
        while running:
            logits = rows.forward(tokens)
            if logits is None:  # another stage's
                chosen = torch.empty(len(running), dtype=torch.long, device=tokens.device)
            else:
                draws = [torch.rand(1, generator=streams[index], dtype=torch.float64) for index in running]
                chosen = choose_tokens(logits[:, -1], settings.sampling, torch.cat(draws))
            newest = zip(running, from_last_stage(chosen).tolist(), strict=True)
            kept = [row for row, (index, token) in enumerate(newest) if goes_on(index, token)]
            if len(kept) < len(running):  # answers that have ended leave the batch
                report(len(running) - len(kept))
                rows.keep(kept)
                running = [running[row] for row in kept]
            tokens = torch.tensor([answers[index][-1:] for index in running], device=tokens.device)

    pending = [index for index, prompt in enumerate(prompts) if settings.room(prompt) > 0]
    pending.sort(key=lambda index: (len(prompts[index]), tuple(prompts[index])))  # so that batches need little padding
    report(len(prompts) - len(pending))
    with inference(model_chunks):
        for start in range(0, len(pending), settings.batch_size):
            answer(pending[start : start + settings.batch_size])
    return answers


class StopTexts:
    """Texts that end an answer as soon as it contains one of them, however the tokens split the text.

    `end_ids` are the texts that are special tokens, which a decoded answer never shows. Empty texts are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self.end_ids = frozenset(special[text] for text in texts if text in special)
        self.texts = [text for text in texts if text and text not in special]
        # A visible token has at least one byte, so this many of the last tokens hold any text that has just ended. Four
        # more, since a tokenizer may treat the first token of a text differently.
        self._num_tokens = max((len(text.encode()) for text in self.texts), default=0) + 4

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether the newest token completes one of the texts."""
        tail = self._tokenizer.decode(ids[-self._num_tokens :]) if self.texts else ""
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        """The answer before the first of the texts."""
        for stop in self.texts:
            text = text.split(stop, 1)[0]
        return text


def generate_answers(
    model: InferenceModel,
    prompts: Sequence[tuple[Sequence[int], str]],
    until: Sequence[str],
    settings: GenerationSettings,
    on_token: OnToken = lambda row, token: None,
) -> list[list[int]]:
    """Token ids of an answer to each prompt (token ids, name of its random stream), generated by all replicas together.

    A collective of all ranks. The texts of `until` end an answer, in addition to the model's end tokens.
    """
    stop = StopTexts(model.tokenizer, until)
    ends = settings.end_ids | model.end_ids | stop.end_ids
    settings = replace(settings, end_ids=ends, is_complete=stop.is_complete, max_length=model.max_length)

    def work(share: Sequence[tuple[Sequence[int], str]]) -> list[list[int]]:
        ids, names = [ids for ids, _ in share], [name for _, name in share]
        return generate(model.chunks, ids, settings, names=names, on_token=on_token)

    return over_replicas(prompts, work)
