"""A rank reads its own part of the model."""

from __future__ import annotations

from dataclasses import replace

from megatron_peft.benchmark import loading
from megatron_peft.benchmark.subjects import Setting


def test_two_ranks_read_their_halves_and_no_more(tiny: Setting) -> None:
    setting = replace(tiny, tensor_parallel=2)
    ranks = loading.run_ranks(2, "megatron_peft.benchmark.loading:load", setting)
    (alone,) = loading.run_ranks(1, "megatron_peft.benchmark.loading:load", tiny)
    for rank in ranks:
        assert rank.shard * 0.8 < rank.read <= rank.shard  # less by the padding of the vocabulary
        assert 0.5 <= rank.shard / alone.shard < 0.51  # norms are whole on each
        assert rank.peak > 50 * loading.MIB
