"""Conversions leave nothing behind, a rank reads its own part, a start is measured up to its first iteration's line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_peft.arguments import parse_arguments
from megatron_peft.benchmark import convert, loading, startup
from megatron_peft.benchmark.convert import convert_figures, load_whole, read_plainly
from megatron_peft.benchmark.subjects import Setting
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


def program(text: str) -> list[str]:
    return [sys.executable, "-u", "-c", text]


PROGRAM = """
import pathlib, time
print("loading"); print("iteration 1/2")
end = time.monotonic() + 20
while not pathlib.Path({folder!r}, "read").exists() and time.monotonic() < end: time.sleep(0.01)
pathlib.Path({folder!r}, "ended").touch()
print("iteration 2/2")
"""


def test_clock_stops_at_the_first_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program goes on when the clock has been read for the second time, or ends after a while."""
    had_ended: list[bool] = []

    def clock() -> float:
        had_ended.append((tmp_path / "ended").exists())
        if len(had_ended) == 2:
            (tmp_path / "read").touch()
        return len(had_ended)

    monkeypatch.setattr(startup.time, "perf_counter", clock)
    assert startup.seconds_to_first_step(program(PROGRAM.format(folder=str(tmp_path)))) == 1
    assert had_ended == [False, False]


def test_program_that_ends_before_is_an_error_with_its_words() -> None:
    with pytest.raises(startup.ProgramFailed, match="no such model"):
        startup.seconds_to_first_step(program("print('no such model')"))


def test_command_is_accepted(tmp_path: Path, tiny: Setting) -> None:
    command = startup._command(tiny, startup._save_samples(tmp_path / "a.jsonl"))
    config = parse_arguments(command[command.index(str(startup.PROGRAM)) + 1 :])
    assert config.training.train_iters == 2 and config.logging.log_interval == 1
    assert startup.PROGRAM.exists()


def test_two_ranks_read_their_halves_and_no_more(tiny: Setting) -> None:
    setting = replace(tiny, tensor_parallel=2)
    ranks = loading.run_ranks(2, loading.load, setting)
    (alone,) = loading.run_ranks(1, loading.load, tiny)
    for rank in ranks:
        assert rank.shard * 0.8 < rank.read <= rank.shard  # less by the padding of the vocabulary
        assert 0.5 <= rank.shard / alone.shard < 0.51  # norms are whole on each
        assert rank.peak > 50 * loading.MIB
