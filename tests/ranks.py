"""Tests start ranks as the benchmarks do; see `megatron_peft.runtime.ranks`."""

from __future__ import annotations

from megatron_peft.runtime.ranks import RanksFailed as RanksFailed
from megatron_peft.runtime.ranks import run_ranks as run_ranks
