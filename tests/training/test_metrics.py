"""Metrics of a run: whole lines in metrics.jsonl whatever happens, the same in TensorBoard and wandb."""

import json
import sys
from mmap import mmap
from types import SimpleNamespace

import pytest
import torch

from megatron_peft.config import ConfigurationError, LoggingConfig
from megatron_peft.training import metrics
from megatron_peft.training.metrics import (
    ITEMS_FILE,
    METRICS_FILE,
    MetricsWriter,
    memory_bytes,
    read_metrics,
    require_loggers,
)
from tests.recorded_calls import recorded_calls
from tests.training.recorded_saves import small_files_only

SILENT = LoggingConfig()


def _write(folder, iterations, resumed_iteration=0, **extra):
    with MetricsWriter(folder, SILENT, is_writer=True, resumed_iteration=resumed_iteration) as writer:
        for iteration in iterations:
            writer.write({"iteration": iteration, "loss": 1.0 / iteration, **extra})


def test_each_line_is_a_json_object_without_nan_and_readable_during_the_run(tmp_path):
    record, folder = {"iteration": 1, "loss": 2.5, "lambda": {"mean": 0.5}}, tmp_path / "new" / "folder"
    nan = {"grad_norm": float("nan"), "validation_loss": float("inf")}
    MetricsWriter(folder, SILENT, is_writer=True).write(record | nan)
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert lines == [record | dict.fromkeys(nan, None)]


@pytest.mark.parametrize(
    ("torn", "resumed", "expected"), [("", 2, [1, 2, 3, 4]), ('{"iteration": 5, "lo', 2, [1, 2, 3, 4]), ("", 0, [3, 4])]
)
def test_resume_removes_records_that_will_be_repeated_and_a_torn_line(tmp_path, torn, resumed, expected):
    _write(tmp_path, [1, 2, 3])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(torn)
    _write(tmp_path, [3, 4], resumed_iteration=resumed)
    assert [record["iteration"] for record in read_metrics(tmp_path / METRICS_FILE)] == expected
    kept = {"metrics.1.jsonl"} if resumed == 0 else set()
    assert {path.name for path in tmp_path.iterdir()} == {METRICS_FILE, *kept}


def test_a_log_is_cut_in_its_place_and_of_what_is_kept_only_the_last_record_is_read(tmp_path, monkeypatch):
    """So a kill meanwhile loses nothing of it, and a resumed run does not wait for months of lines."""
    _write(tmp_path, range(1, 101))
    name = tmp_path / METRICS_FILE
    kept, before = name.read_bytes().splitlines(keepends=True)[:97], name.stat().st_ino
    calls, read, plain = recorded_calls(monkeypatch), [], metrics._record_of
    monkeypatch.setattr(metrics, "_record_of", lambda line, place: read.append(line) or plain(line, place))
    _write(tmp_path, [], resumed_iteration=97)
    assert name.read_bytes() == b"".join(kept) and name.stat().st_ino == before
    assert calls == [("fsync", name)]
    assert [json.loads(line)["iteration"] for line in read] == [100, 99, 98, 97]


@pytest.mark.parametrize("left", ["", '{"iteration": 1, "loss": 2.5}', '{"iteration": 1, "loss": 2.5}\n', '{"itera'])
def test_a_short_log_is_cut_to_whole_lines(tmp_path, left):
    (tmp_path / METRICS_FILE).write_text(left)
    _write(tmp_path, [2], resumed_iteration=1)
    found = [record["iteration"] for record in read_metrics(tmp_path / METRICS_FILE)]
    assert found == ([1, 2] if "loss" in left else [2])


def test_a_line_that_is_no_record_is_not_cut_off(tmp_path):
    text = '{"iteration": 1}\n{"iteration": 2}\nnotes of mine\n{"iteration": 3}\n'
    (tmp_path / METRICS_FILE).write_text(text)
    with pytest.raises(ConfigurationError, match=r"metrics\.jsonl, byte 34: not a record"):
        _write(tmp_path, [], resumed_iteration=2)
    assert (tmp_path / METRICS_FILE).read_text() == text


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1}\nnot json\n{"iteration": 2}\n')
    with pytest.raises(ConfigurationError, match=r"metrics\.jsonl, line 2: not a record"):
        read_metrics(tmp_path / METRICS_FILE)


def test_other_ranks_write_nothing(tmp_path):
    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "tensorboard"))
    with MetricsWriter(tmp_path, logging, is_writer=False) as writer:
        writer.write({"iteration": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_lines_but_not_the_run(tmp_path, caplog):
    """A line is whole or not there, and the next ones come when there is room again."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, SILENT, is_writer=True) as writer:
        writer.write({"iteration": 1, "loss": 1.0})
        with small_files_only(path.stat().st_size + 7):
            writer.write({"iteration": 2, "loss": 2.0})
            writer.write({"iteration": 2, "loss": 2.5})
            writer.write_layers(2, "lambda", {"layer": 0.5 / 3, "another": 0.5 / 7, "third": 0.5 / 11})
        writer.write({"iteration": 3, "loss": 3.0})
    assert [record["iteration"] for record in read_metrics(path)] == [1, 3]
    assert caplog.text.count(f"{path} cannot be written (File too large): the run continues") == 1
    assert f"{path} can be written again; 2 lines are not in it" in caplog.text
    assert "lambda.jsonl cannot be written" in caplog.text and read_metrics(tmp_path / "lambda.jsonl") == []


def test_a_resumed_run_repeats_the_losses_of_validation_samples_after_its_checkpoint(tmp_path):
    for resumed_at, iterations in ((0, (2, 4, 6)), (3, (4,))):
        with MetricsWriter(tmp_path, SILENT, is_writer=True, resumed_iteration=resumed_at) as writer:
            for iteration in iterations:
                writer.write_items(iteration, "test", {0: 1.5, 1: float("nan")}, {0: resumed_at + 1, 1: 2})
    lines = read_metrics(tmp_path / ITEMS_FILE.format("test"))
    assert [(line["iteration"], line["num_tokens"]["0"]) for line in lines] == [(2, 1), (4, 4)]
    assert lines[0]["loss_sums"] == {"0": 1.5, "1": None}


def test_a_resumed_run_replaces_the_points_of_tensorboard_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, iterations in ((0, (1, 2, 3)), (2, (3, 4))):
        logging = LoggingConfig(tensorboard_dir=str(tmp_path))
        with MetricsWriter(None, logging, is_writer=True, resumed_iteration=resumed_at) as writer:
            for iteration in iterations:
                writer.write({"iteration": iteration, "loss": float(resumed_at), "lambda": {"min": 0.25}})
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(one.step, one.value) for one in events.Scalars("train/loss")]
    assert points == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]
    assert sorted(events.Tags()["scalars"]) == ["lambda/min", "train/loss"]


@pytest.mark.parametrize(
    ("flags", "module", "told"),
    [
        ({"wandb_project": "p", "wandb_exp_name": "e"}, "wandb", "--wandb-project needs the package wandb"),
        ({"log_energy": True}, "pynvml", "--log-energy needs the package nvidia-ml-py"),
    ],
)
def test_a_logger_that_is_not_installed_is_a_clear_error(monkeypatch, flags, module, told):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=told):
        require_loggers(LoggingConfig(**flags))


def test_wandb_is_started_under_megatrons_flags_and_a_run_named_by_them_or_its_folder(monkeypatch, tmp_path):
    calls, told = [], []
    run = SimpleNamespace(log=lambda scalars, step: calls.append((step, scalars)), finish=lambda: calls.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **words: told.append(words) or run))
    monkeypatch.chdir(tmp_path)
    logging = LoggingConfig(wandb_project="p", wandb_exp_name="e", wandb_save_dir=str(tmp_path / "w"))
    with MetricsWriter(None, logging, is_writer=True, run_settings={"lr": 1e-3}) as writer:
        writer.write({"iteration": 3, "loss": 1.0, "validation_loss": None})
    assert told == [{"project": "p", "name": "e", "dir": str(tmp_path / "w"), "config": {"lr": 1e-3}}]
    assert calls == [(3, {"train/loss": 1.0}), "end"]
    first, own = tmp_path / "first", str(tmp_path / "w")
    for folder, name, files in ((first, "e", own), (first, None, None), (None, None, None)):
        logging = LoggingConfig(wandb_project="p", wandb_exp_name=name, wandb_save_dir=files)
        MetricsWriter(folder, logging, is_writer=True).close()
    assert [(words["name"], words["dir"]) for words in told[1:]] == [
        ("e", own),
        ("first", str(first / "wandb")),
        (None, "wandb"),
    ]


@pytest.mark.gpu("memory")
def test_memory_follows_what_the_process_holds(figure):
    device, most = ("cuda", 0.1) if torch.cuda.is_available() else ("cpu", 0.5)
    before, _ = memory_bytes()
    # 100 MB, touched; of the system's own, as malloc may have kept as much of what other tests gave back.
    held = torch.frombuffer(mmap(-1, 100_000_000), dtype=torch.float32).fill_(1).to(device)
    now, peak = memory_bytes()
    growth = (now - before) / held.nbytes
    assert peak >= now and growth > 0.9
    figure("metrics of memory: growth over an allocation, less 1", growth - 1, most, note="100 MB")
