from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.demo import experiment_data
from megatron_peft.demo.pairs import Pair, PairFiles, read_pairs

PAIRS = [Pair(f"message number {'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10 % 10]} x{i}", "le") for i in range(800)]


def test_tuning_and_training_messages_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = PairFiles(tmp_path / "data" / "train.jsonl", tmp_path / "data" / "valid.jsonl")
    (tmp_path / "data").mkdir()
    experiment_data._write_lines(files.train, PAIRS)
    monkeypatch.setattr(experiment_data, "prepare_model", lambda *_: None)
    monkeypatch.setattr(experiment_data, "prepare_reviews", lambda *_: None)
    monkeypatch.setattr(experiment_data, "prepare_pairs", lambda *_: files)
    experiment_data.prepare(tmp_path)
    parts = [read_pairs(tmp_path / "data" / "experiment" / name) for name in ("train.jsonl", "tuning.jsonl")]
    assert sorted(parts[0] + parts[1], key=str) == sorted(PAIRS, key=str)
    assert 0 < len(parts[1]) < 50


def test_same_words_fall_on_the_same_side() -> None:
    assert all(
        experiment_data.is_for_tuning(pair) == experiment_data.is_for_tuning(Pair(pair.english.upper() + "!", "la"))
        for pair in PAIRS
    )
