"""The clock stops at the first iteration's line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_peft.benchmark import startup
from megatron_peft.benchmark.subjects import Setting


def program(text: str) -> list[str]:
    return [sys.executable, "-u", "-c", text]


def test_clock_stops_at_the_first_iteration() -> None:
    text = (
        "import time; time.sleep(0.5); print('loading'); print('iteration 1/2'); time.sleep(2); print('iteration 2/2')"
    )
    assert 0.5 <= startup.seconds_to_first_step(program(text)) < 2.4


def test_program_that_ends_before_is_an_error_with_its_words() -> None:
    with pytest.raises(startup.ProgramFailed, match="no such model"):
        startup.seconds_to_first_step(program("print('no such model')"))


def test_command_is_accepted(tmp_path: Path, tiny: Setting) -> None:
    from megatron_peft.arguments import parse_arguments

    command = startup._command(tiny, startup._save_samples(tmp_path / "a.jsonl"))
    config = parse_arguments(command[command.index(str(startup.PROGRAM)) + 1 :])
    assert config.training.train_iters == 2 and config.logging.log_interval == 1
    assert startup.PROGRAM.exists()
