"""The facts that the distributed tests of this folder look at, each world started once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoint.runs import Files
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs

CHECKS = "tests.checkpoint.rank_checks"


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    """A base model, another one of the same shape beside it (`-2`), and data."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_llama(folder / "base-2", seed=1)
    return Files(str(save_llama(folder / "base")), str(save_pairs(folder / "pairs.jsonl")), str(folder / "work"))


@pytest.fixture(scope="session")
def two_ranks(files: Files) -> list[dict[str, Any]]:
    """`rank_checks.on_two_ranks` on each rank."""
    return run_ranks(2, f"{CHECKS}:on_two_ranks", files)


@pytest.fixture(scope="session")
def facts(two_ranks) -> dict[str, Any]:
    """Those of the first rank."""
    return two_ranks[0]
