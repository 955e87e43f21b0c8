import json
from pathlib import Path

import datasets
import pytest
import sentencepiece

from megatron_peft.data.tokenizers import HuggingFaceTokenizer
from tests.data.tiny_tokenizers import CORPUS, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def hf(tokenizer_folder) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return prefix.with_suffix(".model")


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch) -> Path:
    """Where `datasets` writes: not to the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


@pytest.fixture
def write_lines(tmp_path):
    """Write records (or raw lines) as JSON lines; returns the path as text."""

    def write(records: list, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    return write
