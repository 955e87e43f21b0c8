"""What a run prints: parameter counts, the first lines, and progress."""

import io
import re
import sys
from dataclasses import replace

import numpy as np
from rich.console import Console

from megatron_peft.config import PeftConfig, TrainingConfig
from megatron_peft.data.samples import PackedOrder, SampleOrder
from megatron_peft.training import terminal as progress_module
from megatron_peft.training.terminal import Progress, count_parameters, large_batch_warning, training_summary

NAMES = [f"decoder.layers.{layer}.mlp.linear_fc{n}" for layer in (0, 1) for n in (1, 2)]
LORA = 2 * 4 * ((96 + 200) + (120 + 96) + (96 + 320) + (160 + 96))  # layers x rank x (in + out) of each linear layer


def _chunks(state):
    return [chunk.module for chunk in state.model_chunks]


def _summary(state, names=(), **peft):
    config = replace(state.config, peft=replace(state.config.peft, **peft))
    return training_summary(config, names, _chunks(state)).splitlines()


def test_the_lines_name_what_is_adapted_and_what_has_no_effect(start):
    state, full = start()[0], start(peft={"method": "full"})[0]
    trainable, total = count_parameters(_chunks(state))
    first, second = _summary(state, NAMES)
    assert trainable == LORA
    assert first == "--peft-method lora: 4 layers: linear_fc1 (2), linear_fc2 (2)"
    assert second == f"trainable parameters: {LORA:,} of {total:,} ({100 * LORA / total:.3f}%)"
    assert count_parameters(_chunks(full)) == (total - LORA, total - LORA)
    assert _summary(full)[0] == "--peft-method full: every parameter of the model"
    lines = _summary(state, NAMES, method="lora", boft_factors=2)
    assert lines[1] == "note: --boft-factors 2 has no effect with --peft-method lora"
    lines = _summary(state, NAMES, method="urnn", urnn_mode="replace")
    assert lines[1].startswith("WARNING: the pretrained weights of these layers are DISCARDED")


def test_a_batch_that_low_rank_factors_bear_badly_is_told(start):
    config = start()[0].config
    plain = SampleOrder(1000, 1, True)
    packs = PackedOrder(plain, np.full(1000, 32), 128)

    def told(size, order, **peft):
        return large_batch_warning(replace(config, peft=PeftConfig(**peft), training=TrainingConfig(1, size)), order)

    assert told(256, plain).startswith("WARNING: --global-batch-size 256 is 256 samples: ") and told(255, plain) == ""
    assert told(64, packs).startswith("WARNING: --global-batch-size 64 is 256 samples: ") and told(63, packs) == ""
    assert told(256, plain, method="hybrid", lora_rank=512) and told(256, plain, method="full") == ""


def test_a_note_for_part_of_a_fused_layer_that_is_adapted_whole(start):
    lines = _summary(start(peft={"lora_rank": 4, "target_modules": ("q_proj", "down_proj")})[0], NAMES)
    assert [line for line in lines if "is part of" in line] == [
        "note: q_proj is part of linear_qkv, which is adapted as a whole"
    ]


RECORD = {"iteration": 20, "consumed_samples": 160, "loss": 2.5, "learning_rate": 0.002, "grad_norm": 1.25}
RECORD |= {"step_seconds": 0.5, "tokens_per_second": 512.0}


def _shown(**settings):
    console = Console(file=io.StringIO(), **{"width": 140 if "force_terminal" in settings else 40, **settings})
    return console, console.file.getvalue


def test_a_file_gets_one_line_per_interval_at_any_width(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    console, text = _shown()
    with Progress(60, start_iteration=10, console=console) as progress:
        clock[0] = 30.0
        progress.advance(11)
        progress.update(RECORD)
        progress.message("saved [bold]run[/bold] at iteration 20")
        progress.update({**RECORD, "validation_loss": 1.75})
    assert text().startswith(
        "iteration       20/      60 | consumed samples:          160 | elapsed time per iteration (ms): 500.0 | "
        "learning rate: 2.000000E-03 | loss: 2.500000E+00 | grad norm: 1.250 | tokens per second: 512.0 | "
        "ETA: 0:02:00\n"  # 10 iterations took 30 s, 40 are left
        "saved [bold]run[/bold] at iteration 20\n"
        "iteration       20/      60 | "
    )
    assert text().count("validation loss") == text().count("validation loss: 1.750000E+00") == 1
    assert text().count("\n") == 3


def test_a_terminal_gets_a_line_per_interval_above_a_bar_that_fits_its_width():
    """80 columns, a million iterations and more than a day: nothing is cut."""
    console, text = _shown(force_terminal=True, width=80, color_system=None)
    with Progress(1_000_000, start_iteration=100_000, console=console) as progress:
        progress._started_at -= 130_000
        progress._bar.tasks[0].start_time -= 130_000
        progress.advance(123_456)
        progress.update({**RECORD, "iteration": 123_456, "validation_loss": 1.75, "tokens_per_second": 51200.0})
        progress.advance(123_457)
    rows = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", text()))
    assert max(map(len, rows)) <= 80 and not any("…" in row for row in rows)
    line, bar = next(row for row in rows if "valid" in row), [row for row in rows if "ETA" in row][-1]
    assert line == " 123456/1000000  loss 2.500  valid 1.750  norm 1.25  lr 2.00e-03  tok/s 51200"
    assert re.search(r"^\S+ +123457/1000000 1 day, 12:06:\d\d ETA 56 days, \d+:\d\d:\d\d loss 2.500$", bar.strip()), bar


def test_progress_of_a_validation_is_a_line_every_three_seconds_in_a_file_and_a_bar_at_a_terminal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    console, text = _shown()
    with Progress(60, console=console) as progress:
        for _ in progress.track(range(8), "validation", 8):
            clock[0] += 1.25
    assert text() == "validation: 3 of 8 batches\nvalidation: 6 of 8 batches\n"
    console, text = _shown(force_terminal=True, width=80, color_system=None)
    with Progress(60, console=console) as progress:
        for _ in progress.track(range(8), "validation", 8):
            progress._bar.refresh()
        assert len(progress._bar.tasks) == 1
    assert re.search(r" 5/8 +0:00:\d\d validation", text())


def test_a_line_takes_all_that_fits_a_terminal_and_no_more():
    parts = ["loss 2.500", "valid 1.750", "norm 1.25", "lr 2.00e-03", "tok/s 512", "s/step 0.50"]
    for width in range(20, 90):
        fits = "20/60"
        for part in parts:
            fits = f"{fits}  {part}" if len(f"{fits}  {part}") <= width else fits
        console, text = _shown(force_terminal=True, width=width, color_system=None)
        with Progress(60, console=console) as progress:
            progress.update({**RECORD, "validation_loss": 1.75})
        rows = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", text()))
        assert fits in [row.strip() for row in rows], width


def test_a_terminal_names_the_slowest_rank_and_times_below_the_line():
    console, text = _shown(force_terminal=True, width=80, color_system=None)
    slowest = {"rank": 5, "host": "n2", "seconds": 0.25, "median_seconds": 0.125}
    with Progress(60, console=console) as progress:
        progress.update({**RECORD, "timer_seconds": {"forward-backward": 0.5}, "slowest_rank": slowest})
    assert "slowest rank: 5 (n2) 250.0 ms, median 125.0 ms" in text()
    assert "slowest rank (ms): forward-backward 500.0" in text()


def test_the_first_step_is_a_line_in_a_file_and_is_in_the_bar_of_a_terminal():
    for settings, expected in (({}, "iteration       20/      60 |"), ({"force_terminal": True}, "loss 2.500")):
        console, text = _shown(**settings)
        with Progress(60, console=console) as progress:
            progress.update(RECORD, only_in_bar=True)
        assert expected in text() and text().count("norm") == (not settings)


def test_ranks_that_do_not_report_print_nothing():
    console, text = _shown(force_terminal=True)
    with Progress(60, enabled=False, console=console) as progress:
        progress.advance(1)
        progress.update(RECORD)
        progress.message("hello")
    assert text() == ""


class _NoReader(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_progress_is_closed_when_nobody_reads_a_line(monkeypatch):
    """rich would end this rank at once, before it can save."""
    progress = Progress(4)
    progress.message("a line")
    assert not progress.is_closed
    monkeypatch.setattr(sys, "stdout", _NoReader())
    for _ in range(2):
        progress.message("a line")
    assert progress.is_closed
