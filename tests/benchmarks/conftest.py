import pytest

from megatron_peft.benchmarks.subjects import Setting
from tests.tiny_llama import save_llama

EVEN = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
SETTING = {"rows": 2, "positions": 16, "rank": 4, "block_size": 2, "num_factors": 2, "turns": 1}


@pytest.fixture(scope="session")
def even(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A model that every method fits, uRNN's groups of 64 features too."""
    return Setting(str(save_llama(tmp_path_factory.mktemp("bench") / "even", **EVEN)), **SETTING)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(str(save_llama(tmp_path_factory.mktemp("bench") / "tiny")), **SETTING)
