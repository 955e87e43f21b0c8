"""Forwards without gradients: rows with a key-value cache, all pipeline stages, training's switches off."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

# One forward through all pipeline stages of a replica, and what its last stage tells the others.
#
# Training has megatron-core's schedules for this. A token of generation is a single microbatch with a cache, so here
# each stage just waits for the one before it.


def run_stages(
    model_chunks: Sequence[GPTModel], message: tuple[int, ...], forward: Callable[[GPTModel], Tensor]
) -> Tensor | None:
    """Run every chunk of every stage in order. A collective of the pipeline.

    Args:
        model_chunks: this rank's, one for each virtual stage.
        message: shape of what a stage hands on.
        forward: of one chunk, once it has its input.

    Returns:
        The output of the last chunk on its rank, None elsewhere.
    """
    for chunk in model_chunks:
        if not chunk.pre_process:
            chunk.set_input_tensor(_receive(chunk, message))
        output = forward(chunk)
        if chunk.post_process:
            return output
        _send(output)
    return None


def broadcast_from_last_stage(values: Tensor) -> Tensor:
    """`values` of the last stage's first tensor-parallel rank, in place, on every rank of the replica.

    All of them must see the very same tokens: one that ended a row on its own would wait for the others forever.
    """
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    _broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(), pipeline)
    _broadcast(values, parallel_state.get_tensor_model_parallel_src_rank(), tensor_parallel)
    return values


def _broadcast(values: Tensor, source: int, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.broadcast(values, source, group=group)


def _receive(chunk: GPTModel, shape: tuple[int, ...]) -> Tensor:
    hidden = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=torch.cuda.current_device())
    dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=_pipeline())
    return hidden


def _send(hidden: Tensor) -> None:
    dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=_pipeline())


def _pipeline() -> dist.ProcessGroup:
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    return group


# Rows that go through a model together, each with its own keys and values of what it has seen: a key-value cache.
#
# Texts of unequal length are padded on the left, so that every row's newest token stands in the last column. The
# padding is hidden from attention by a key mask; rotary and ALiBi positions are relative, so the shift changes
# nothing.
#
# Letters: b rows, s new positions of a forward, k positions in the cache, h hidden size.

try:
    from megatron.core.inference.utils import InferenceMode

    _inference_mode: Any = InferenceMode.active  # without it megatron-core 0.19 computes the logits of every position
except ImportError:  # older ones go by the cache that they are given
    _inference_mode = nullcontext


class CachedRows:
    """One batch. Every rank of a replica makes it and calls it alike, inside `inference`.

    Args:
        model_chunks: this rank's.
        padding: columns on the left of each row that hold no token.
        num_columns: the most that the cache will hold, padding included.
    """

    def __init__(self, model_chunks: Sequence[GPTModel], padding: Sequence[int], num_columns: int) -> None:
        self._chunks = model_chunks
        self._cache = StaticInferenceContext(len(padding), num_columns)
        self._padding = torch.tensor(padding, device=torch.cuda.current_device())  # [b]
        self._is_padded = any(padding)

    def forward(self, tokens: Tensor, every_position: bool = False) -> Tensor | None:
        """Logits after `tokens` [b, s], which follow what the cache holds.

        Returns:
            [b, 1, vocabulary] after the last column, or [b, s, vocabulary] for `every_position`, float32, on the last
            pipeline stage; None on the others.
        """
        done, (num_rows, num_new) = self._cache.sequence_len_offset, tokens.shape
        settings: Any = getattr(self._cache, "config", self._cache)  # the cache's own attributes up to 0.16
        settings.materialize_only_last_token_logits = not every_position
        positions = torch.arange(done, done + num_new, device=tokens.device).expand_as(tokens)
        hidden_keys = self._hidden_keys(done + num_new)
        with _inference_mode():
            logits = run_stages(
                self._chunks,
                (num_new, num_rows, self._chunks[0].config.hidden_size),
                lambda chunk: chunk(
                    input_ids=tokens,
                    position_ids=positions,
                    attention_mask=hidden_keys,
                    inference_context=self._cache,
                    runtime_gather_output=True,
                ),
            )
        self._cache.increment_sequence_len_offset(num_new)
        return None if logits is None else logits.float()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; one may be taken more than once."""
        memory = self._cache.key_value_memory_dict
        for layer, pair in memory.items():
            # [p, b, g, d], of which [b, g, p, d] is contiguous, and stays so.
            memory[layer] = tuple(x.permute(1, 2, 0, 3)[rows].permute(2, 0, 1, 3) for x in pair)
        self._padding = self._padding[rows]
        self._cache.max_batch_size = len(rows)  # of the memory that an empty cache is yet to take

    def _hidden_keys(self, num_keys: int) -> Tensor | None:
        """[b, 1, 1, k], True where a key is padding; None where no row has any."""
        if not self._is_padded:
            return None
        keys = torch.arange(num_keys, device=self._padding.device)
        return (keys < self._padding[:, None])[:, None, None]


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Rows of token ids as one tensor [b, longest], and the number of padded columns of each."""
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    padded = [[0] * missing + list(row) for missing, row in zip(padding, rows, strict=True)]
    return torch.tensor(padded, device=torch.cuda.current_device()), padding


# What modules and their configuration call it; static batching refuses all of it.
SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def inference(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, no dropout, no sequence parallelism; each chunk is left as it was found."""
    were_training = [chunk.training for chunk in model_chunks]
    for chunk in model_chunks:
        chunk.eval()
    try:
        with torch.no_grad(), _without_sequence_parallelism(model_chunks):
            yield
    finally:
        for chunk, was_training in zip(model_chunks, were_training, strict=True):
            chunk.train(was_training)


@contextmanager
def _without_sequence_parallelism(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Switch it off in modules and configurations, and afterwards on again exactly where it was on.

    megatron-core's own `set_model_to_sequence_parallel` remembers models by `id`, which a later model may inherit.
    """
    modules = (module for chunk in model_chunks for module in chunk.modules())
    owners = {id(owner): owner for module in modules for owner in (module, getattr(module, "config", None))}
    switched = [(o, name) for o in owners.values() for name in SEQUENCE_PARALLEL_SWITCHES if getattr(o, name, False)]
    for owner, name in switched:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
