"""Rows that go through a model together, each with its own keys and values of what it has seen: a key-value cache.

Texts of unequal length are padded on the left, so that every row's newest token stands in the last column. The padding
is hidden from attention by a key mask; rotary and ALiBi positions are relative, so the shift changes nothing.

Letters: b rows, s new positions of a forward, k positions in the cache, h hidden size.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_peft.evaluation.stages import run_stages

try:
    from megatron.core.inference.utils import InferenceMode

    _inference_mode: Any = InferenceMode.active  # without it megatron-core 0.19 computes the logits of every position
except ImportError:  # older ones go by the cache that they are given
    _inference_mode = nullcontext


class CachedRows:
    """One batch. Every rank of a replica makes it and calls it alike, inside `switches.inference`.

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
