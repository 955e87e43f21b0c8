"""The page of a single run: what its files say, at any stage of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_peft.checkpoint.folders import RECORD, TRACKER, iteration_folder
from megatron_peft.checkpoint.run_record import RunRecord
from megatron_peft.commands import report
from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation import model
from megatron_peft.experiment import plots, run_report
from megatron_peft.experiment.report import html, markdown, write_page
from megatron_peft.experiment.run_report import SAMPLES_FILE, build_run_report, is_run, read_run, running_mean
from tests.checkpoint.runs import make_record
from tests.experiment.small_results import LAYERS

LENGTH = 80


def line(at: int, **changes: Any) -> dict[str, Any]:
    speed = {"step_seconds": 0.5, "tokens_per_second": 1234.0, "memory_bytes": 2e9, "peak_memory_bytes": 3e9}
    numbers = {"loss": 2 + 1 / at, "learning_rate": 1e-3, "grad_norm": 1.0, **speed}
    counted = {"iteration": at, "epoch": at / 40, "consumed_samples": 8 * at, "consumed_tokens": 900 * at}
    return counted | numbers | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in progress: a line each second step, a validation each twentieth, no checkpoint."""
    losses = {20: 2.5, 40: 1.75, 60: 2.25, 80: 1.875}
    lines = [line(at, **({"validation_loss": losses[at]} if at in losses else {})) for at in range(2, LENGTH + 1, 2)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    return tmp_path


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def add_checkpoint(folder: Path, record: RunRecord | None = None) -> None:
    checkpoint = iteration_folder(folder, LENGTH)
    checkpoint.mkdir()
    (checkpoint / RECORD).write_text((record or make_record()).to_json())
    (folder / TRACKER).write_text(f"{LENGTH}\n")


def test_a_run_in_progress_has_its_curves_and_figures(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 82, "lo')  # being written
    found = build_run_report(read_run(folder))
    titles = ["Loss", "Learning rate and gradient norm", "Speed and memory"]
    assert [section.title for section in found.sections] == titles
    assert found.title == "/".join(folder.parts[-3:])
    text = markdown(found)
    assert "80 iterations, 2.00 epochs, 640 samples, 72,000 tokens." in text
    assert "**1.875** at iteration 80, 2.500 at iteration 20. The lowest is 1.750, at iteration 40." in text
    assert "Training loss: 2.013 at iteration 80, 2.500 at iteration 2." in text
    told = "Training took 0:00:40, without validation and saves; a step 0.500 s (median), with 1,230 tokens per second"
    assert f"{told}; memory of the process of rank 0 at most 3.000 GB." in text
    loss = found.sections[0].figures["loss"].axes[0]
    assert [len(one.get_xdata()) for one in loss.lines] == [40, 4]  # type: ignore[arg-type]
    assert [one.get_label() for one in loss.lines] == ["training", "validation, lowest 1.750"] and not loss.texts
    _, memory = found.sections[2].figures["speed"].axes
    assert [one.get_ydata()[0] for one in memory.lines] == [2.0, 3.0]  # type: ignore[index]


def test_a_slow_first_step_with_the_peak_is_no_typical_one(folder: Path) -> None:
    slow = {"step_seconds": 9.0, "tokens_per_second": 10.0, "peak_memory_bytes": 5e9}
    write_lines(folder / "metrics.jsonl", [line(2, **slow), line(4), line(6)])
    text = markdown(build_run_report(read_run(folder)))
    told = "Training took 0:00:20, without validation and saves; a step 0.500 s (median), with 1,230 tokens per second"
    assert f"{told}; memory of the process of rank 0 at most 5.000 GB." in text


@pytest.mark.parametrize(
    ("first", "num_lines", "told", "start"),
    [
        pytest.param({"iteration": 210, "interval_steps": 4}, 4, "0:00:17", "206", id="loaded"),
        pytest.param({"iteration": 210, "interval_steps": 4}, 1, "0:00:02", "206", id="loaded, one line"),
        pytest.param({"iteration": 8, "interval_steps": 8}, 4, "0:00:19", "", id="own"),
        pytest.param({"iteration": 100, "interval_steps": 100}, 1, "0:00:50", "", id="own, one line"),
        pytest.param({"iteration": 210}, 4, "0:00:20", "", id="loaded, older version"),
        pytest.param({"iteration": 8}, 4, "0:00:19", "", id="own, older version"),
    ],
)
def test_time_is_that_of_the_steps_in_this_folder(folder: Path, first, num_lines: int, told: str, start: str) -> None:
    """A line each 10 steps, the first one after fewer; others are of the run that --load named."""
    lines = [line(first["iteration"] + 10 * at) for at in range(num_lines)]
    write_lines(folder / "metrics.jsonl", [lines[0] | first, *lines[1:]])
    text = markdown(build_run_report(read_run(folder)))
    assert f"Training took {told}, " in text
    assert re.findall(r"loaded at iteration (\d+):", text) == ([start] if start else [])


def test_gradient_norms_by_layer_are_drawn_where_they_are_recorded(folder: Path) -> None:
    norms = [{"0": 1.0, "1": 2.0}, *[{"0": 9.0, "1": 9.0}] * 3, {"0": None, "1": 3.0}]
    lines = [line(at, grad_norm_by_layer=of_layers) for at, of_layers in enumerate(norms, start=3)]
    write_lines(folder / "metrics.jsonl", [line(2), *lines])
    (axes,) = build_run_report(read_run(folder)).sections[1].figures["depth"].axes
    drawn = {str(one.get_label()): np.asarray(one.get_xydata()).tolist() for one in axes.lines}
    assert [*drawn] == ["iteration 3", "iteration 5", "iteration 7"]
    assert drawn["iteration 3"] == [[0, 1], [1, 2]] and drawn["iteration 7"][1] == [1, 3]


def test_a_finished_run_has_its_settings_lambdas_and_answers(folder: Path) -> None:
    add_checkpoint(folder)
    values = [{LAYERS[0]: 0.5, LAYERS[1]: 0.5}, {LAYERS[0]: 0.25, LAYERS[1]: 0.75}]
    lambdas = [{"iteration": at, "lambda": one} for at, one in zip((1, 80), values, strict=True)]
    write_lines(folder / "lambda.jsonl", lambdas)
    answers = {"reference": "Bonjour", "before": "<script>alert(1)</script>", "after": "x" * 900}
    write_lines(folder / SAMPLES_FILE, [{"prompt": "Hello", **answers}])
    found = build_run_report(read_run(folder))
    titles = [section.title for section in found.sections]
    assert titles[1] == "Answers before and after" and titles[3:] == ["Lambda by layer", "Speed and memory", "Settings"]
    assert found.title == f"lora on bases/base: {'/'.join(folder.parts[-3:])}"
    assert found.sections[0].texts[0].startswith("80 of 3 iterations")  # the record's length
    assert "is 0.500 on average over 2 layers, from 0.250 to 0.750" in found.sections[3].texts[0]
    (row,) = found.sections[1].tables[0].frame.values.tolist()
    assert row[:3] == ["Hello", "Bonjour", "<script>alert(1)</script>"] and row[3] == "x" * 300 + " …"
    settings = {name: value for name, value in found.sections[-1].tables[0].frame.values}
    assert settings["--lora-rank"] == "4" and settings["--train-data-path"] == "pairs.jsonl"
    assert not {"--lora-alpha", "--eval-interval", "--peft-method"} & settings.keys(), "defaults"


def test_settings_show_switches_as_yes_and_no() -> None:
    config = make_record().config
    training, model = replace(config.training, exit_signal_handler=False), replace(config.model, bf16=True)
    record = make_record(config=replace(config, training=training, model=model))
    rows = dict(run_report.settings_table(record).frame.values)
    assert (rows["--bf16"], rows["--exit-signal-handler"]) == ("yes", "no")


def test_an_answer_that_repeats_itself_is_cut_and_packs_are_no_samples(folder: Path) -> None:
    record = make_record()
    packed = replace(record.config, data=replace(record.config.data, pack_sequences=True))
    add_checkpoint(folder, make_record(config=packed))
    write_lines(folder / SAMPLES_FILE, [{"prompt": "a", "reference": "b", "before": "1998:\n" * 60, "after": "c\nd"}])
    found = build_run_report(read_run(folder))
    (row,) = found.sections[1].tables[0].frame.values.tolist()
    assert row[2].splitlines() == ["1998:"] * 7 + ["1998: …"] and row[3] == "c\nd"
    assert "2.00 epochs, 640 packs, 72,000 tokens" in found.sections[0].texts[0]
    assert '<td class="text" data-column="in the data">b</td>' in html(replace(found, sections=found.sections[1:2]))


def test_a_single_measurement_is_seen_and_losses_that_are_not_finite_leave_gaps(folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", [line(1)])
    (axes,) = build_run_report(read_run(folder)).sections[0].figures["loss"].axes
    assert axes.lines[0].get_marker() == "o"
    text = markdown(build_run_report(read_run(folder)))
    assert "Training loss: " in text and "Validation loss" not in text and text.count("at iteration 1") == 1
    write_lines(folder / "metrics.jsonl", [line(1, loss=None, grad_norm=None), line(2, validation_loss=None)])
    assert "Validation loss" not in markdown(build_run_report(read_run(folder)))


def test_the_page_is_one_file_and_texts_are_escaped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg/>")  # takes seconds
    write_lines(folder / SAMPLES_FILE, [dict.fromkeys(("prompt", "reference", "before", "after"), "<script>alert(1)")])
    page = write_page(build_run_report(read_run(folder)), folder / "there" / "report.html").read_text()
    assert page.endswith("</html>") and "<script>alert(1)" not in page
    assert [path.name for path in (folder / "there").iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.jsonl", "", "metrics.jsonl is still empty"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1: not a record of metrics"),
        (SAMPLES_FILE, "[1]\n", "samples.jsonl, line 1: not a sample with prompt, reference, before, after"),
        (SAMPLES_FILE, '{"prompt": "a"}\n', "samples.jsonl, line 1: not a sample"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, content: str, told: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConfigurationError, match=told):
        read_run(folder)


def test_lines_without_a_speed_give_a_page_without_it(folder: Path) -> None:
    lines = [line(at) for at in range(2, LENGTH + 1, 2)]
    for one in lines:
        del one["tokens_per_second"]
    write_lines(folder / "metrics.jsonl", lines)
    section = next(one for one in build_run_report(read_run(folder)).sections if one.title == "Speed and memory")
    assert section.texts[0].startswith("Training took 0:00:40") and "a step" not in section.texts[0]


def test_running_mean_is_the_mean_of_each_points_neighbors() -> None:
    draw = np.random.default_rng(0)
    for length in (1, 2, 3, 40, 41, 79, 80, 1003):
        values = (10 ** draw.uniform(-9, 9, length)).tolist()  # spikes leave nothing behind
        half = max(length // 40, 1)
        plain = [float(np.mean(values[max(at - half, 0) : at + half + 1])) for at in range(length)]
        assert running_mean(values) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--against", "lora"], "--against is of an experiment"),
        (["--experiment", "e.yaml"], "e.yaml"),
        (["--samples", "0"], "--samples is 0"),
        (["--samples", "2", "--bf16"], "the base model bases/base, which does not exist: give its current folder"),
        (["--samples", "2", "--tensor-model-parallel-size", "two"], "--tensor-model-parallel-size"),
        (["--tensor-model-parallel-size", "2"], "unexpected --tensor-model-parallel-size 2: flags of the model"),
    ],
)
def test_what_is_wrong_with_flags_is_told_with_exit_code_2(folder: Path, capsys, flags: list[str], told: str) -> None:
    add_checkpoint(folder)
    assert report.main([str(folder), *flags]) == 2
    assert told in capsys.readouterr().err and not (folder / "report.html").exists()


def test_a_page_follows_new_answers_and_one_that_cannot_be_written_is_told(folder: Path, capsys, monkeypatch) -> None:
    add_checkpoint(folder)
    monkeypatch.setattr(model, "run_on_a_model", lambda *_: None)
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg/>")
    assert report.main([str(folder), "--samples", "2"]) == 0 and (folder / "report.html").is_file()
    assert report.main([str(folder), "--output", str(folder / "metrics.jsonl" / "x")]) == 2
    assert "metrics.jsonl/x cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_folder_of_a_run_is_told_from_that_of_an_experiment(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg/>")
    assert is_run(folder) and not is_run(folder / "nowhere")
    assert report.main([str(folder)]) == 0
    *summary, page = capsys.readouterr().out.splitlines()
    assert page == f"{folder}/report.html" and summary[0].startswith("80 iterations, 2.00 epochs, 640 samples")
    assert summary[1].startswith("Validation loss: 1.875 at") and summary[-1].startswith("Training took 0:00:40")
    (folder / "cells").mkdir()
    assert report.main([str(folder)]) == 2 and "experiment.yaml is not there" in capsys.readouterr().err
    assert report.main([str(folder), "--samples", "3"]) == 2 and "--samples needs the --save" in capsys.readouterr().err


def test_the_length_of_a_run_by_epochs_is_that_of_its_schedule() -> None:
    config = make_record().config
    by_epochs = replace(config, training=replace(config.training, train_iters=None, train_epochs=1.0))
    for given in (config, by_epochs):  # 12 samples, in batches of 4
        assert run_report.planned_iterations(make_record(config=given)) == 3
