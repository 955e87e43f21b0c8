from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.benchmark.subjects import Setting
from tests.tiny_llama import save_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder: Path = save_llama(tmp_path_factory.mktemp("bench") / "tiny")
    return Setting(str(folder), rows=2, positions=16, rank=4, block_size=2, num_factors=2)
