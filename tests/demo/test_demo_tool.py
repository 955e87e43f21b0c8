from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.demo import run, table
from tools import demo


@pytest.fixture
def calls(monkeypatch):
    made: list = []

    def run_demo(folder, method, extra_flags):
        made.append((folder, method, extra_flags))
        return "report"

    monkeypatch.setattr(run, "run_demo", run_demo)
    monkeypatch.setattr(table, "print_report", lambda report, folder: made.append((report, folder)))
    return made


def test_flags_that_are_not_the_demos_go_to_the_training(calls):
    assert demo.main(["--method", "full", "--lr", "1e-4", "--output", "there"]) == 0
    assert calls == [(Path("there"), "full", ["--lr", "1e-4"]), ("report", Path("there"))]


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [(ConfigurationError("no network"), 2, "demo: error: no network\n"), (KeyboardInterrupt(), 130, "")],
)
def test_what_goes_wrong_is_told_in_the_exit_code(monkeypatch, capsys, error, exit_code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(run, "run_demo", fail)
    assert demo.main([]) == exit_code
    assert capsys.readouterr().err == message
