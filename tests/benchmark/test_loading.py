"""The rank that is worst off speaks for all."""

from __future__ import annotations

import pytest

from megatron_peft.benchmark import loading
from megatron_peft.benchmark.loading import MIB, Loaded
from megatron_peft.benchmark.subjects import Setting


def test_worst_rank_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Loaded(100 * MIB, 100 * MIB, 500 * MIB), Loaded(60 * MIB, 50 * MIB, 900 * MIB)]
    monkeypatch.setattr(loading, "run_ranks", lambda *args: ranks)
    monkeypatch.setattr(loading, "peak_of_bare_torch", lambda: 200 * MIB)
    read, memory = loading.loading_figures(Setting("nowhere", tensor_parallel=2))
    assert read.measured == pytest.approx(1.2) and not read.reached
    assert memory.measured == pytest.approx(900 - 50 - 200) and not memory.reached


def test_a_rank_reads_its_parameters_and_no_more(tiny: Setting) -> None:
    (rank,) = loading.run_ranks(1, loading.load, tiny)
    assert rank.shard * 0.8 < rank.read <= rank.shard  # less by the padding of the vocabulary
    assert rank.peak > 50 * MIB
