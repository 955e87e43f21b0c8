"""The benchmark of conversions measures every way and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_peft.benchmark import convert
from megatron_peft.benchmark.convert import convert_figures, load_whole, read_plainly
from tests.conversion.megatron_folders import save_random


def test_every_way_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "NUM_TURNS", 1)
    figures = convert_figures(save_random(tmp_path / "hf"), tmp_path / "work")
    told = " ".join(figure.name for figure in figures)
    assert all(way in told for way in ("load Hugging Face", "load Megatron", "hf-to-megatron", "megatron-to-hf"))
    assert all(figure.measured > 0 and figure.target is not None for figure in figures)
    assert figures[-1].unit == "MiB" and figures[-1].target == 400
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_both_sides_read_the_same_numbers(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "hf")
    plain, loaded = read_plainly(folder), load_whole(folder)
    assert sum(t.numel() for t in loaded) == sum(t.numel() for t in plain.values())
    assert sum(t.sum() for t in loaded).item() == pytest.approx(sum(t.sum() for t in plain.values()).item(), abs=1e-3)
    assert not torch.stack([t.isnan().any() for t in loaded]).any()
