from __future__ import annotations

import io

from rich.console import Console

from megatron_peft.training import progress as module
from megatron_peft.training.progress import Progress

RECORD = {
    "iteration": 20,
    "consumed_samples": 160,
    "loss": 2.5,
    "learning_rate": 0.002,
    "grad_norm": 1.25,
    "step_seconds": 0.5,
    "tokens_per_second": 512.0,
}


def _file_console():
    return Console(file=io.StringIO(), width=40)


def test_a_file_gets_one_line_an_interval_however_narrow(monkeypatch):
    clock = iter([0.0, 0.0, 30.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    console = _file_console()
    with Progress(60, start_iteration=10, console=console) as progress:
        progress.advance(11)
        progress.update(RECORD)
    assert console.file.getvalue() == (
        "iteration       20/      60 | consumed samples:          160 | elapsed time per iteration (ms): 500.0 | "
        "learning rate: 2.000000E-03 | loss: 2.500000E+00 | grad norm: 1.250 | tokens per second: 512.0 | "
        "ETA: 0:02:00\n"  # 10 iterations took 30 s, 40 are left
    )


def test_validation_loss_is_shown_when_it_was_measured():
    console = _file_console()
    Progress(60, console=console).update({**RECORD, "validation_loss": 1.75})
    assert "validation loss: 1.750000E+00" in console.file.getvalue()


def test_messages_are_printed_as_they_are():
    console = _file_console()
    Progress(60, console=console).message("saved [bold]run[/bold] at iteration 20")
    assert console.file.getvalue() == "saved [bold]run[/bold] at iteration 20\n"


def test_a_terminal_gets_a_bar_that_keeps_the_last_validation_loss():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with Progress(60, console=console) as progress:
        progress.update({**RECORD, "validation_loss": 1.75})
        progress.update({**RECORD, "iteration": 30, "loss": 2.25})
    last_frame = console.file.getvalue().split("training")[-1]
    assert "30/60" in last_frame and "ETA" in last_frame
    assert "loss 2.250 valid 1.750 norm 1.25 tok/s 512" in last_frame


def test_ranks_that_do_not_report_print_nothing():
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(60, enabled=False, console=console) as progress:
        progress.advance(1)
        progress.update(RECORD)
        progress.message("hello")
    assert console.file.getvalue() == ""
