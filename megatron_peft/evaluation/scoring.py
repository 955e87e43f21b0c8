"""Batched log-likelihoods of continuations. Letters: b rows, s tokens of the longest continuation, v vocabulary."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_peft.config import require
from megatron_peft.evaluation.forward import CachedRows, broadcast_from_last_stage, inference, left_padded

MAX_LOGITS = 2**28  # per forward on the last stage: 1 GiB in float32


@dataclass(frozen=True)
class Continuation:
    """Token ids to score and the context before them, at least one of each."""

    context: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def row(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that go into the model: all but the last."""
        return self.context, self.ids[:-1]


@dataclass(frozen=True)
class ContinuationScore:
    """log p(ids | context), summed over the ids, in nats; whether each id was the likeliest at its position."""

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    model_chunks: Sequence[GPTModel], continuations: Sequence[Continuation], batch_size: int
) -> list[ContinuationScore]:
    """Score each continuation. All ranks of a replica call it together and get the same result.

    Args:
        model_chunks: of this rank, without a data-parallel wrapper; their modes are restored afterwards.
        batch_size: continuations per forward.

    Raises:
        ConfigurationError: a context or a continuation is empty.
    """
    require(
        all(one.context and one.ids for one in continuations),
        "a context or a continuation has no token: a score needs at least one of each.",
    )
    scores = [ContinuationScore(0.0, False)] * len(continuations)
    order = sorted(range(len(continuations)), key=lambda index: _by_length(continuations[index]), reverse=True)
    with inference(model_chunks):
        for batch in _batches(order, continuations, batch_size, model_chunks[0].vocab_size):
            found = _score_batch(model_chunks, [continuations[index] for index in batch])
            for index, one in zip(batch, found, strict=True):
                scores[index] = one
    return scores


def _by_length(one: Continuation) -> tuple[int, tuple[int, ...], int]:
    """Continuations of one context next to each other."""
    return len(one.context), one.context, len(one.ids)


def _batches(
    order: Sequence[int], continuations: Sequence[Continuation], batch_size: int, vocab_size: int
) -> Iterator[list[int]]:
    """At most `batch_size` continuations and MAX_LOGITS logits each; a continuation with more logits goes alone."""
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, len(continuations[index].ids))
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest * vocab_size > MAX_LOGITS):
            yield batch
            batch, longest = [], len(continuations[index].ids)
        batch.append(index)
    if batch:
        yield batch


def _score_batch(model_chunks: Sequence[GPTModel], batch: Sequence[Continuation]) -> list[ContinuationScore]:
    rows = sorted({one.row for one in batch})
    logits = _logits(model_chunks, rows)
    found = torch.zeros(len(batch), 2, dtype=torch.float64, device=torch.cuda.current_device())
    if logits is not None:
        row_of = {row: number for number, row in enumerate(rows)}
        log_probabilities = logits.log_softmax(-1)
        for number, one in enumerate(batch):
            found[number] = _score_row(log_probabilities[row_of[one.row]], one.ids)
    return [ContinuationScore(total, bool(greedy)) for total, greedy in broadcast_from_last_stage(found).tolist()]


def _score_row(log_probabilities: Tensor, ids: Sequence[int]) -> Tensor:
    """[s, v] of a row -> [2]: the sum over the ids, and 1 if each was the likeliest, else 0."""
    wanted = torch.tensor(ids, device=log_probabilities.device)
    own = log_probabilities[: len(ids)]
    total = own.gather(-1, wanted[:, None]).sum()
    return torch.stack([total, (own.argmax(-1) == wanted).all()])


def _logits(model_chunks: Sequence[GPTModel], rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor | None:
    """[b, s, v] on the last stage: logits after each context, and after each token of its continuation."""
    # Each distinct context fills the cache once, without its last token, so logits are computed for continuations only.
    contexts = list(dict.fromkeys(context for context, _ in rows))
    tokens, padding = left_padded([context[:-1] for context in contexts])
    longest = 1 + max(len(before_last) for _, before_last in rows)
    cached = CachedRows(model_chunks, padding, tokens.shape[1] + longest)
    if tokens.shape[1]:
        cached.forward(tokens)
    row_of = {context: row for row, context in enumerate(contexts)}
    cached.keep([row_of[context] for context, _ in rows])
    following = [[context[-1], *before_last] for context, before_last in rows]
    padded = [row + [0] * (longest - len(row)) for row in following]  # on the right, where causal attention ignores it
    return cached.forward(torch.tensor(padded, device=torch.cuda.current_device()), every_position=True)
