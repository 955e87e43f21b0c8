"""Inference at any layout: forward passes with a key-value cache, batched generation, log-likelihoods of continuations.

Letters: b rows, s tokens of the longest continuation, h hidden size, v vocabulary.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from megatron_peft.adapters.step import adapters_step
from megatron_peft.config import require
from megatron_peft.config.evaluation import Sampling
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.evaluation.model import InferenceModel
from megatron_peft.models.loss import ChunkedLossModel, chunk_tokens
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.launch import gather_over_world
from megatron_peft.serving.engine import Engine


def from_last_stage(values: Tensor) -> Tensor:
    """Broadcast `values`, in place, from the last stage's first tensor-parallel rank to all ranks of the replica.

    All of them need identical tokens: a rank that ended a row alone would leave the others waiting forever.
    """
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    if pipeline.size() > 1:
        dist.broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    if tensor_parallel.size() > 1:
        dist.broadcast(values, parallel_state.get_tensor_model_parallel_src_rank(), group=tensor_parallel)
    return values


try:
    from megatron.core.inference.utils import InferenceMode

    _inference_mode: Any = InferenceMode.active  # without it megatron-core 0.19 computes the logits of every position
except ImportError:  # earlier versions check whether a cache is passed
    _inference_mode = nullcontext


class CachedRows:
    """A batch of rows and their key-value cache. Every rank of a replica makes the same calls, inside `inference`.

    Rows of unequal length are padded on the left, so each row's newest token is in the last column. A key mask hides
    the padding; rotary and ALiBi positions are relative, so the shift changes nothing.

    Letters: b rows, s new positions of a forward, k positions in the cache, g key-value heads, d their size. `padding`
    has the number of padded columns of each row; `num_columns`, the capacity of the cache, includes them.
    """

    def __init__(self, model_chunks: Sequence[ChunkedLossModel], padding: Sequence[int], num_columns: int) -> None:
        self._chunks = model_chunks
        self._cache = StaticInferenceContext(len(padding), num_columns)
        self._padding = torch.tensor(padding, device=torch.cuda.current_device())  # [b]
        self._is_padded = any(padding)

    def forward(self, tokens: Tensor, only_hidden: bool = False) -> Tensor | None:
        """Logits after the last column of `tokens` [b, s], which follow the cached ones, [b, 1, vocabulary] in float32.

        only_hidden: hidden states after every column instead, [b, s, h], of which `logits_of` makes logits.
        None except on the last pipeline stage.
        """
        done, (num_rows, num_new) = self._cache.sequence_len_offset, tokens.shape
        settings: Any = getattr(self._cache, "config", self._cache)  # up to 0.16 these are the cache's own attributes
        settings.materialize_only_last_token_logits = not only_hidden
        columns = torch.arange(done + num_new, device=tokens.device)
        positions = columns[done:].expand_as(tokens)
        padding_mask = (columns < self._padding[:, None])[:, None, None] if self._is_padded else None  # [b, 1, 1, k]
        # All stages in order, as one microbatch: a rank has a chunk for each of its virtual stages.
        pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
        logits = None
        for chunk in self._chunks:
            if not chunk.pre_process:
                shape = num_new, num_rows, chunk.config.hidden_size
                hidden = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=tokens.device)
                dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=pipeline)
                chunk.set_input_tensor(hidden)
            with _inference_mode():
                output = chunk(
                    input_ids=tokens,
                    position_ids=positions,
                    attention_mask=padding_mask,
                    inference_context=self._cache,
                    runtime_gather_output=True,
                    only_hidden=only_hidden,
                )
            if chunk.post_process:
                logits = output if only_hidden else output.float()
            else:
                dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=pipeline)
        self._cache.increment_sequence_len_offset(num_new)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows, in this order; a row may be repeated."""
        memory = self._cache.key_value_memory_dict
        for layer, pair in memory.items():
            # Keys and values are [k, b, g, d] views of contiguous [b, g, k, d] tensors, and stay so.
            memory[layer] = tuple(x.permute(1, 2, 0, 3)[rows].permute(2, 0, 1, 3) for x in pair)
        self._padding = self._padding[rows]
        self._cache.max_batch_size = len(rows)  # an empty cache allocates its memory later, for this many rows


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Rows of token ids as a tensor [b, longest], and the number of padded columns of each row."""
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    padded = [[0] * missing + list(row) for missing, row in zip(padding, rows, strict=True)]
    return torch.tensor(padded, device=torch.cuda.current_device()), padding


# Attributes of modules and of their configuration. megatron-core's static batching refuses all of them.
SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def inference(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, no dropout, no sequence parallelism; afterwards each chunk is as before."""
    were_training = [chunk.training for chunk in model_chunks]
    # megatron-core's own `set_model_to_sequence_parallel` remembers models by `id`, which a later model may reuse.
    modules = (module for chunk in model_chunks for module in chunk.modules())
    owners = {id(owner): owner for module in modules for owner in (module, getattr(module, "config", None))}
    switched = [(o, name) for o in owners.values() for name in SEQUENCE_PARALLEL_SWITCHES if getattr(o, name, False)]
    for chunk in model_chunks:
        chunk.eval()
    for owner, name in switched:
        setattr(owner, name, False)
    try:
        with torch.no_grad(), adapters_step(model_chunks, is_training=False):
            yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
        for chunk, was_training in zip(model_chunks, were_training, strict=True):
            chunk.train(was_training)


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
    """How to generate. `is_complete` gets the ids of an answer after each token; True ends it after that token."""

    end_ids: frozenset[int]  # they end an answer and are not part of it
    max_new_tokens: int
    is_complete: Callable[[Sequence[int]], bool] | None = None
    batch_size: int = 32  # prompts, on each replica
    sampling: Sampling = Sampling()
    seed: int = 0
    max_length: int = sys.maxsize  # of prompt and answer together, in tokens

    def room(self, prompt: Sequence[int]) -> int:
        """Length limit of the answer to this prompt, in tokens."""
        return min(self.max_new_tokens, self.max_length - len(prompt))


OnToken = Callable[[int, int], None]


def generate(
    model_chunks: Sequence[ChunkedLossModel],
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    report: Callable[[int], None] = lambda n: None,
    *,
    names: Sequence[str] | None = None,
    on_token: OnToken = lambda row, token: None,
) -> list[list[int]]:
    """New ids for each prompt, in their order. All ranks of a replica call it together, and get the same.

    model_chunks: of this rank, without a data-parallel wrapper; restored to their mode afterwards.
    prompts: token ids, at least one each.
    report: called with the number of prompts that have just been answered.
    names: of the prompts' random streams; by default the prompts' numbers.
    on_token: called with (number of the prompt, id) as each token is generated.
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
        batch = [tuple(prompts[index]) for index in running]
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(batch))}
        tokens, padding = left_padded([*row_of])  # equal prompts go through the model once
        rows = CachedRows(model_chunks, padding, tokens.shape[1] + max(map(settings.room, row_of)))
        logits = rows.forward(tokens)
        if len(row_of) < len(batch):
            copies = [row_of[prompt] for prompt in batch]
            rows.keep(copies)
            logits = None if logits is None else logits[copies]
        while True:
            if logits is None:  # another stage's
                chosen = torch.empty(len(running), dtype=torch.long, device=tokens.device)
            else:
                draws = [torch.rand(1, generator=streams[index], dtype=torch.float64) for index in running]
                chosen = choose_tokens(logits[:, -1], settings.sampling, torch.cat(draws))
            newest = zip(running, from_last_stage(chosen).tolist(), strict=True)
            kept = [row for row, (index, token) in enumerate(newest) if goes_on(index, token)]
            if len(kept) < len(running):  # answers that have ended leave the batch
                report(len(running) - len(kept))
                if not kept:
                    return
                rows.keep(kept)
                running = [running[row] for row in kept]
            logits = rows.forward(torch.tensor([answers[index][-1:] for index in running], device=tokens.device))

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
        tail = self._tokenizer.decode(ids[-self._num_tokens :]) if self.texts else ""
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        """The answer before the first of the texts."""
        for stop in self.texts:
            text = text.split(stop, 1)[0]
        return text


class Continuation(NamedTuple):
    """Token ids to score and the context before them, at least one of each."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


class ContinuationScore(NamedTuple):
    """log p(ids | context), summed over the ids, in nats; whether each id was the likeliest at its position."""

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    model_chunks: Sequence[ChunkedLossModel], continuations: Sequence[Continuation], batch_size: int
) -> list[ContinuationScore]:
    """Score each continuation, `batch_size` per forward. All ranks of a replica call it and get the same result.

    The chunks of this rank, without a data-parallel wrapper, are restored to their mode afterwards.
    """
    require(
        all(context and ids for context, ids in continuations),
        "a context or a continuation has no token: a score needs at least one of each.",
    )
    # The longest first; continuations of one context next to each other.
    keys = [(len(context), context, len(ids)) for context, ids in continuations]
    order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
    scores: dict[int, ContinuationScore] = {}
    with inference(model_chunks):
        while len(scores) < len(order):
            batch = order[len(scores) :][:batch_size]
            scored = _score_batch(model_chunks, [continuations[index] for index in batch])
            scores |= zip(batch, scored, strict=True)
    return [scores[index] for index in range(len(order))]


def _score_batch(model_chunks: Sequence[ChunkedLossModel], batch: Sequence[Continuation]) -> list[ContinuationScore]:
    inputs = [(context, ids[:-1]) for context, ids in batch]  # all tokens but the last go into the model
    rows, lengths = sorted(set(inputs)), [len(ids) for _, ids in batch]
    hidden = _hidden_states(model_chunks, rows)
    scores = torch.zeros(len(batch), 2, dtype=torch.float64, device=torch.cuda.current_device())
    if hidden is not None:
        # Logits are made of a few positions at a time, once for all continuations that ask for one of them.
        first_place = [rows.index(row) * hidden.shape[1] for row in inputs]
        places = [
            start + column for start, length in zip(first_place, lengths, strict=True) for column in range(length)
        ]
        place, wanted = torch.tensor([places, [token for _, ids in batch for token in ids]], device=hidden.device)
        likelihoods, is_likeliest = wanted.float(), wanted.bool()
        model, first = model_chunks[-1], 0
        for some in hidden.flatten(0, 1).split(chunk_tokens(None, model.vocab_size)):
            log_probabilities = model.logits_of(some).log_softmax(-1)  # [n, v]
            asked_here = (first <= place) & (place < first + len(some))
            here, ids = place[asked_here] - first, wanted[asked_here]
            likelihoods[asked_here] = log_probabilities[here, ids]
            is_likeliest[asked_here] = log_probabilities.argmax(-1)[here] == ids
            first += len(some)
        for number, scored in enumerate(zip(likelihoods.split(lengths), is_likeliest.split(lengths), strict=True)):
            scores[number, 0], scores[number, 1] = scored[0].sum(), scored[1].all()
    return [ContinuationScore(total, bool(greedy)) for total, greedy in from_last_stage(scores).tolist()]


def _hidden_states(
    model_chunks: Sequence[ChunkedLossModel], rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Tensor | None:
    """[b, s, h] on the last stage: after each context, and after each token of its continuation."""
    # Each distinct context fills the cache once, without its last token.
    contexts = list(dict.fromkeys(context for context, _ in rows))
    tokens, padding = left_padded([context[:-1] for context in contexts])
    longest = 1 + max(len(before_last) for _, before_last in rows)
    cached = CachedRows(model_chunks, padding, tokens.shape[1] + longest)
    if tokens.shape[1]:
        cached.forward(tokens)
    cached.keep([contexts.index(context) for context, _ in rows])
    following = [[context[-1], *before_last] for context, before_last in rows]
    padded = [row + [0] * (longest - len(row)) for row in following]  # on the right, where causal attention ignores it
    return cached.forward(torch.tensor(padded, device=torch.cuda.current_device()), only_hidden=True)


def over_replicas(items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """`work(items)`, divided among the data-parallel replicas: an answer for each item, in their order, on every rank.

    A collective of all ranks.
    """
    group: Any = parallel_state.get_data_parallel_group()
    # Rounded up, so that a single item goes to replica 0, which may stream its answer.
    start, end = (-(-len(items) * share // group.size()) for share in (group.rank(), group.rank() + 1))
    shares = gather_over_world(list(work(items[start:end])), group)
    return [answer for share in shares for answer in share]


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
        if model.engine is not None:
            return _answers_of(model.engine, ids, settings, stop.texts, names, on_token)
        return generate(model.chunks, ids, settings, names=names, on_token=on_token)

    return over_replicas(prompts, work)


def _answers_of(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    until: Sequence[str],
    names: Sequence[str],
    on_token: OnToken,
) -> list[list[int]]:
    """What `generate` returns, from an engine, whose random numbers are others. It batches as it sees fit."""
    rows = [row for row, prompt in enumerate(prompts) if settings.room(prompt) > 0]
    how = settings.sampling
    reply = engine.ask(
        "generate",
        prompts=[list(prompts[row]) for row in rows],
        max_tokens=[settings.room(prompts[row]) for row in rows],
        seeds=[generator_for(settings.seed, names[row]).initial_seed() % 2**63 for row in rows],
        sampling={"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k},
        stop=list(until),
        ends=sorted(settings.end_ids),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    for row, ids in zip(rows, reply["answers"], strict=True):
        answers[row] = ids[:-1] if ids and ids[-1] in settings.end_ids else ids
        for token in answers[row]:
            on_token(row, token)
    return answers


def score_all(model: InferenceModel, continuations: Sequence[Continuation], batch_size: int) -> list[ContinuationScore]:
    """Scores by all replicas together, each of which passes `batch_size` continuations at once."""
    if model.engine is not None:
        pairs = [[list(context), list(ids)] for context, ids in continuations]
        return [ContinuationScore(*score) for score in model.engine.ask("score", pairs=pairs)["scores"]]
    return over_replicas(continuations, lambda share: score_continuations(model.chunks, share, batch_size))
