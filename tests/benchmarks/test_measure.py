"""Times, memory, files and starts are measured as they are, and a figure is judged by its target."""

import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_peft import benchmarks
from megatron_peft.benchmarks import files, measure
from megatron_peft.benchmarks.files import convert_figures, load_whole, read_plainly
from megatron_peft.benchmarks.measure import Figure, print_table, write_json
from megatron_peft.benchmarks.subjects import Setting, Step
from megatron_peft.cli.parser import read_config
from megatron_peft.commands import bench
from megatron_peft.config import ConfigurationError
from megatron_peft.training.metrics import memory_bytes
from tests.conversion.megatron_folders import save_random
from tests.ranks import run_ranks

MIB = 2**20


def test_every_second_turn_runs_the_other_way_round_and_late_ones_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "NUM_WARMUPS", 1)
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.take_turns(steps, num_turns=2)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert {name: len(turns) for name, turns in seconds.items()} == {"a": 2, "b": 2}
    late = measure.take_turns(steps, num_turns=10, is_late=lambda: True)
    assert len(late["a"]) == measure.FEWEST_TURNS


def test_waiting_costs_nothing_and_work_does() -> None:
    def work() -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    seconds = measure.take_turns({"waits": lambda: time.sleep(0.1), "works": work}, num_turns=1)
    assert seconds["waits"][0] < 0.05 < 0.1 <= seconds["works"][0]


def test_ranks_are_added_up_turn_by_turn_and_a_ratio_is_the_median_of_the_turns(monkeypatch) -> None:
    by_rank = [{"a": [1.0, 2.0]}, {"a": [10.0, 20.0]}]
    monkeypatch.setattr(measure, "on_ranks", lambda *_, **__: by_rank)
    assert measure.seconds_of_steps(Setting("nowhere"), ("a",)) == {"a": [11.0, 22.0]}
    assert measure.median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 3.0]) == 2.0


class Absent:
    """A benchmark whose engine is not installed."""

    title = "an engine that is not here"

    def figures(self, *_: Any) -> list[Figure]:
        raise ConfigurationError("there is no vLLM")


class Present(Absent):
    def figures(self, *_: Any) -> list[Figure]:
        return [Figure("took", 1.0)]


def test_all_benchmarks_go_on_where_one_cannot_be_measured_and_one_that_is_named_does_not(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"absent": Absent(), "present": Present()})
    assert bench.run(bench.BenchSettings(output=tmp_path)) == 1
    assert "absent: not measured: there is no vLLM" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["present.json"]
    with pytest.raises(ConfigurationError, match="there is no vLLM"):
        bench.run(bench.BenchSettings(names=("absent",), output=tmp_path))


def memory_taken_and_given_back(_: Any) -> tuple[int, int, int]:
    """Peak before; peak and memory after."""
    resident, before = memory_bytes()
    taken = bytearray(before - resident + 64 * MIB)
    del taken
    after, peak = memory_bytes()
    return before, peak, after


def test_peak_remembers_what_was_given_back_and_is_above_that_of_bare_torch() -> None:
    # In a process of its own: of a large one the system may take pages back at the same time.
    ((before, peak, after),) = run_ranks(1, memory_taken_and_given_back)
    assert peak >= before + 48 * MIB
    assert after < peak - 32 * MIB
    assert 50 * MIB < measure.peak_of_program("import torch") < memory_bytes()[1]


def memory_of_a_model_and_a_step(_: Any) -> int:
    def build(setting: Setting) -> Step:
        model = bytearray(40 * MIB)
        return lambda: len(model + bytearray(len(model)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "STEPS", {"big": build})
        patch.setattr(measure, "on_ranks", lambda run, setting, **more: [run(setting, **more)])
        peak, start = measure.peak_of_steps(Setting("nowhere"), "big")
        return peak - start


def test_memory_of_the_model_and_of_a_step_counts() -> None:
    (grown,) = run_ranks(1, memory_of_a_model_and_a_step)  # in a process of its own, for the same reason
    assert grown > 100 * MIB


def test_table_tells_pass_from_fail_and_a_target_is_the_largest_good_value() -> None:
    printed = io.StringIO()
    figures = [Figure("slow", 2.0, 1.5, "s", "why"), Figure("fast", 1.5, 1.5, "s"), Figure("beside", 3.0)]
    print_table("speed", figures, Console(file=printed, width=100))
    lines = printed.getvalue().splitlines()
    slow, fast, beside = (next(line for line in lines if name in line) for name in ("slow", "fast", "beside"))
    assert all(word in slow for word in ("FAIL", "2 s", "<= 1.5 s", "why")) and "pass" in fast
    assert not any(word in beside for word in ("pass", "FAIL", "<="))


def test_json_holds_numbers_and_verdict(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", [Figure("x", 1.5, 2.0, "s", "note")])
    (row,) = json.loads((tmp_path / "new" / "a.json").read_text())
    assert row == {"name": "x", "measured": 1.5, "target": 2.0, "unit": "s", "note": "note", "reached": True}


@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "NUM_TURNS", 1)
    figures = convert_figures(Setting(str(save_random(tmp_path / "hf"))))
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


PYTHON = [sys.executable, "-u", "-c"]
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

    monkeypatch.setattr(files.time, "perf_counter", clock)
    assert files.seconds_to_first_step([*PYTHON, PROGRAM.format(folder=str(tmp_path))]) == 1
    assert had_ended == [False, False]


def test_program_that_ends_before_is_an_error_with_its_words() -> None:
    with pytest.raises(files.ProgramFailed, match="no such model"):
        files.seconds_to_first_step([*PYTHON, "print('no such model')"])


def test_command_is_accepted(tmp_path: Path, tiny: Setting) -> None:
    command = files.short_run(tiny, tmp_path / "a.jsonl")
    config = read_config(command[command.index(files.PROGRAM[-1]) + 1 :])
    assert config.training.train_iters == 2 and config.logging.log_interval == 1


def test_two_ranks_read_their_halves_and_no_more(tiny: Setting) -> None:
    setting = replace(tiny, tensor_parallel=2)
    ranks, (alone,) = files.on_ranks(files.load_on_rank, setting), files.on_ranks(files.load_on_rank, tiny)
    for rank in ranks:
        assert rank.shard * 0.8 < rank.counts.bytes <= rank.shard  # less by the padding of the vocabulary
        assert 0.5 <= rank.shard / alone.shard < 0.51  # norms are whole on each
        assert rank.peak > 50 * files.MIB


def test_a_quantized_base_is_weighed_by_what_its_linear_layers_hold(even: Setting) -> None:
    nf4, nf4_peak, fp8, fp8_peak = files.quantized_loading_figures(even)
    assert (nf4.measured, fp8.measured) == (9 / 32, 17 / 32), "four or eight bits, and a float32 for 64 numbers"
    assert [figure.unit for figure in (nf4_peak, fp8_peak)] == ["MB", "MB"]
    assert all(0 <= figure.measured < 200 for figure in (nf4_peak, fp8_peak))
