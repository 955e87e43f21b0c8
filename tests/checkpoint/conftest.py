"""Facts that the distributed tests of this folder check; each world is started once."""

from typing import Any

import pytest

from tests.checkpoint import rank_checks
from tests.checkpoint.runs import Files
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    """Base models: `base`, `other` of the same shape, `tied`; and data."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_llama(folder / "bases" / "base")
    save_llama(folder / "bases" / "other", seed=1)
    save_llama(folder / "bases" / "tied", tie_word_embeddings=True)
    return Files(str(folder / "bases"), str(save_pairs(folder / "pairs.jsonl")), str(folder / "work"))


@pytest.fixture(scope="session")
def two_ranks(files: Files) -> list[dict[str, Any]]:
    return run_ranks(2, rank_checks.on_two_ranks, files, limit=900)


@pytest.fixture(scope="session")
def two_slow_ranks(files: Files) -> list[dict[str, Any]]:
    return run_ranks(2, rank_checks.slowly_on_two_ranks, files, limit=900)


@pytest.fixture
def alone():
    with one_rank():
        yield
