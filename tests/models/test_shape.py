from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.models.shape import ModelShape
from tests.tiny_gpt import SIZES


@pytest.mark.parametrize(
    "vocab_size, multiple, tensor_parallel_size, expected",
    [(37, 1, 1, 37), (37, 8, 1, 40), (40, 8, 1, 40), (37, 1, 3, 39), (37, 8, 3, 48), (49152, 128, 3, 49152)],
)
def test_the_vocabulary_is_padded_to_equal_multiples_on_every_rank(
    vocab_size, multiple, tensor_parallel_size, expected
):
    shape = ModelShape(**{**SIZES, "vocab_size": vocab_size})
    assert shape.padded_vocab_size(multiple, tensor_parallel_size) == expected


def test_heads_that_cannot_share_their_keys_are_refused():
    with pytest.raises(ConfigurationError, match="6 attention heads cannot share 4 key-value heads"):
        ModelShape(**{**SIZES, "num_attention_heads": 6, "num_query_groups": 4})
