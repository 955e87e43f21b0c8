"""The clock stops at the first iteration's line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_peft.benchmark import startup
from megatron_peft.benchmark.subjects import Setting


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
    from megatron_peft.arguments import parse_arguments

    command = startup._command(tiny, startup._save_samples(tmp_path / "a.jsonl"))
    config = parse_arguments(command[command.index(str(startup.PROGRAM)) + 1 :])
    assert config.training.train_iters == 2 and config.logging.log_interval == 1
    assert startup.PROGRAM.exists()
