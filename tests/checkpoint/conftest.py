"""The facts that the distributed tests of this folder look at, each world started once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop
from tests.checkpoint import rank_checks
from tests.checkpoint.runs import Files
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    """Base models: `base`, `other` of the same shape, `tied`; and data."""
    return make_files(tmp_path_factory.mktemp("checkpoint"))


def make_files(folder: Path) -> Files:
    save_llama(folder / "bases" / "base")
    save_llama(folder / "bases" / "other", seed=1)
    save_llama(folder / "bases" / "tied", tie_word_embeddings=True)
    return Files(str(folder / "bases"), str(save_pairs(folder / "pairs.jsonl")), str(folder / "work"))


@pytest.fixture(scope="session")
def two_ranks(files: Files) -> list[dict[str, Any]]:
    """`rank_checks.on_two_ranks` on each rank."""
    return run_ranks(2, rank_checks.on_two_ranks, files, limit=900)


@pytest.fixture(scope="session")
def facts(two_ranks) -> dict[str, Any]:
    """Those of the first rank."""
    return two_ranks[0]


@pytest.fixture
def alone():
    """A world of this process alone."""
    start_world(ParallelConfig())
    start_model_parallel(ParallelConfig(), seed=1)
    yield
    stop()
