"""Every benchmark is documented, and measures what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_peft.benchmark import registry
from megatron_peft.benchmark.registry import BENCHMARKS, Workplace

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_benchmarks_are_those_of_the_documentation() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \|", PAGE.read_text(), re.M) == list(BENCHMARKS)


def test_model_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(registry, "loading_figures", lambda setting: seen.append(setting) or [])
    (tmp_path / "model").mkdir()
    BENCHMARKS["loading"].measure(Workplace(tmp_path, tmp_path / "model", turns=1))
    assert seen[0].checkpoint == str(tmp_path / "model") and seen[0].tensor_parallel == 3
