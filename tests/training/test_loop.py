"""When the loop logs, validates, saves and stops; and the signals that stop it."""

import itertools
import signal
import time
from dataclasses import replace
from math import inf, nan
from types import SimpleNamespace

import pytest

from megatron_peft.checkpoint.folders import RECORD, link_best
from megatron_peft.checkpoint.run_record import BestValidation
from megatron_peft.checkpoint.save import CheckpointNotSaved
from megatron_peft.config import CheckpointConfig, LoggingConfig
from megatron_peft.experiment.records import STOPPED
from megatron_peft.rehearsal import rehearsal
from megatron_peft.training import loop, watchers
from megatron_peft.training.loop import train
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.step import StepReport
from megatron_peft.training.watchers import Energy
from tests.time_limits import seconds
from tests.training.recorded_saves import RecordedSaves, signal_at

EACH = {"log_interval": 1}
LOSSES = [9.0, 7.0, 5.0, 4.0, 2.5, 2.0]


@pytest.fixture(autouse=True)
def quick_steps(monkeypatch):
    """Steps that train nothing and have LOSSES; validation losses of 1."""

    def step(state, microbatches, stops, by_layer, around_forward):
        rate = state.optimizer.param_groups[0]["lr"]
        state.schedule.step(increment=state.config.global_batch_size)
        num_positions = sum(one.tokens.numel() for one in microbatches)
        return StepReport(LOSSES[state.position.iteration], 0, num_positions, 1, 1.0, rate, stops())

    monkeypatch.setattr(loop.step, "train_step", step)
    monkeypatch.setattr(loop.step, "validation_loss", lambda *_: 1.0)


class Run:
    """A run in the test's process: why it ended, iterations at which it saved, its records by iteration."""

    planned_peak = None

    def __init__(self, start, folder, resume_at=0, save_interval=None, num_steps=6, saver=None, auto=False, **groups):
        checkpoint = {"save": str(folder), "save_interval": save_interval, "resume": "auto" if auto else "never"}
        self.state, self.data = start(**{"num_steps": num_steps, "checkpoint": checkpoint, **groups})
        self.state.position.iteration = resume_at
        self.saver = RecordedSaves(**(saver or {}))
        self.saved, self.folder = self.saver.saved, folder

    def to_the_end(self):
        self.reason = train(self.state, self.data, self.saver, self.planned_peak)
        path = self.folder / METRICS_FILE
        self.records = {record["iteration"]: record for record in read_metrics(path)} if path.exists() else {}
        return self


@pytest.fixture
def run(start, tmp_path):
    return lambda **groups: Run(start, tmp_path, **groups).to_the_end()


TWO = {"save_interval": 2}
TRAINED = "trained 6 iterations"
EXIT = "--exit-interval reached at iteration 4"
LONGER = "to train longer, raise its length and add --override-opt-param-scheduler"
CONTINUE = "\nto continue, repeat the command"
UNSAVED = "\nWARNING: without --save nothing was saved: what this run has trained is lost"


@pytest.mark.parametrize(
    "groups, reason, attempts, saved",
    [
        ({}, TRAINED, [6], [6]),
        (TWO, TRAINED, [2, 4, 6], [2, 4, 6]),
        ({**TWO, "saver": {"failing": {2}}}, TRAINED, [2, 4, 6, 6], [2, 4, 6]),
        ({**TWO, "saver": {"late": True}}, TRAINED, [2, 4, 6], [2, 4, 6]),
        ({"checkpoint": {}}, TRAINED + UNSAVED, [], []),
        ({"checkpoint": {"sync_server": "http://a", "sync_folder": "b"}}, TRAINED, [], []),
        ({"training": {"exit_interval": 6}}, TRAINED, [6], [6]),
        ({"training": {"exit_interval": 4}}, f"{EXIT}{CONTINUE} with --resume auto", [4], [4]),
        ({"training": {"exit_interval": 4}, "auto": True}, EXIT + CONTINUE, [4], [4]),
        ({"resume_at": 6}, f"nothing to do: the run was complete at iteration 6; {LONGER}", [], []),
        ({"resume_at": 4}, "trained 2 iterations (5 to 6): the run is complete", [6], [6]),
    ],
)
def test_why_a_run_ends_and_when_it_saves(run, capsys, groups, reason, attempts, saved):
    """Once, after each interval, the failed last one again, in the background, never, early, not again, and resumed."""
    found = run(**groups)
    assert (found.reason, found.saver.attempts, found.saved) == (reason, attempts, saved)
    assert sorted(found.records) == saved[-1:] and capsys.readouterr().out.count("saved iteration") == len(saved)
    assert found.state.position.iteration == (4 if "exit" in reason else 6)
    assert bool(STOPPED.search(reason)) == ("exit" in reason)
    trained = 8 * (found.state.position.iteration - groups.get("resume_at", 0))
    assert found.state.position.consumed_samples == trained  # of 40 in an epoch
    assert [record["epoch"] for record in found.records.values()] == [trained / 40] * len(saved[-1:])


@pytest.fixture
def validated(start, tmp_path, monkeypatch):
    """A run that validates after each step, with these losses."""

    def run(losses, best=None, **groups):
        measured = iter(losses)
        monkeypatch.setattr(loop.step, "validation_loss", lambda *_: next(measured))
        groups["training"] = {"eval_interval": 1, **groups.get("training", {})}
        found = Run(start, tmp_path, **groups)
        found.state.best = best or BestValidation()
        return found.to_the_end()

    return run


PATIENT = {"training": {"early_stopping_patience": 2}}


@pytest.mark.parametrize(
    ("losses", "reason", "best"),
    [
        ([3.0, 2.0, 2.5, 2.0, 9.9, 9.9], "without a lower one than 2.000000E+00 at iteration 2", (2.0, 2, 2)),
        ([3.0, nan, 2.5, 2.0, inf, nan], "without a lower one than 2.000000E+00 at iteration 4", (2.0, 4, 2)),
        ([nan, nan], "without a finite one", (None, 0, 2)),
        ([3.0, 3.5, 2.5, 2.6, 2.4, 2.5], "trained 6 iterations", (2.4, 5, 1)),
    ],
)
def test_patience_counts_validations_without_a_lower_loss(validated, losses, reason, best):
    found = validated(losses, **PATIENT)
    assert reason in found.reason and found.state.best == BestValidation(*best)
    last = found.state.position.iteration
    assert found.saved == [last] and last in found.records
    assert found.reason.startswith(f"stopped early at iteration {last}: 2 validation losses") == (
        last < 6 or best[2] == 2
    )


def test_a_run_that_stopped_early_does_not_continue_unless_it_is_told_to(validated):
    ended = {"best": BestValidation(2.0, 2, num_since=2), "resume_at": 4}
    found = validated([], **ended, **PATIENT)
    assert found.reason.startswith("nothing to do: stopped early at iteration 4: 2 validation losses without a lower")
    assert found.reason.endswith("to continue, raise --early-stopping-patience, or leave it out") and not found.saved
    assert validated([9.0, 9.0], **ended).state.position.iteration == 6
    assert validated([9.0, 9.0], **ended, training={"early_stopping_patience": 3}).state.position.iteration == 5


def test_the_test_loss_of_a_run_that_stopped_early_is_measured(start, tmp_path, capsys):
    run = Run(start, tmp_path, training={"eval_interval": 1, "early_stopping_patience": 2})
    run.data, run.state.best = replace(run.data, test=run.data.valid), BestValidation(0.5)
    assert run.to_the_end().reason.startswith("stopped early at iteration 2")
    assert "test loss at iteration 2: 1.000000E+00" in capsys.readouterr().out


def test_keep_best_saves_at_each_lowest_loss(validated, tmp_path):
    losses = [3.0, 4.0, 2.0, 2.0, 1.0, 9.0]
    checkpoint = {"save": str(tmp_path), "save_interval": 2, "keep_best": True}
    found = validated(losses, checkpoint=checkpoint)
    assert found.saved == [1, 2, 3, 4, 5, 6]
    assert validated(losses, checkpoint={**checkpoint, "save_interval": None}).saved == [1, 3, 5, 6]
    assert found.reason.endswith("lowest validation loss 1.000000E+00 at iteration 5"), "these saves write nothing"


@pytest.mark.parametrize(
    ("checkpoint", "load", "told"),
    [
        ("new/iter_0000002", "old", ": {}/new/best"),
        ("old/iter_0000002", "old", ": {}/old/best"),
        ("old/iter_0000002", "old/iter_0000004", ": {}/old/best"),
        ("old/iter_0000003", "old", ""),
        ("old/iter_0000002", None, ""),
    ],
)
def test_the_best_checkpoint_is_named_where_it_is(start, tmp_path, checkpoint, load, told):
    """The run goes on in the folder `new` from iteration 4 of that of --load."""
    folders = {"save": str(tmp_path / "new"), "keep_best": True}
    run = Run(start, tmp_path / "new", resume_at=4, checkpoint=folders, training={"eval_interval": 1})
    loads = CheckpointConfig(**folders, load=load and str(tmp_path / load))
    run.state.config, run.state.best = replace(run.state.config, checkpoint=loads), BestValidation(0.5, 2)
    for name in (checkpoint, "old/iter_0000004"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / RECORD).touch()
    link_best((tmp_path / checkpoint).parent, int(checkpoint[-1]))
    assert run.to_the_end().reason.endswith(
        "lowest validation loss 5.000000E-01 at iteration 2" + told.format(tmp_path)
    )


@pytest.mark.parametrize(
    ("resume_at", "interval", "shown"), [(0, 4, [1, 4, 6]), (0, 1, [1, 2, 3, 4, 5, 6]), (2, 9, [3, 6])]
)
def test_the_first_step_is_printed_but_no_record_of_its_own(run, capsys, resume_at, interval, shown):
    found = run(resume_at=resume_at, logging={"log_interval": interval})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert [int(line.split("/")[0].split()[1]) for line in lines] == shown
    assert sorted(found.records) == [iteration for iteration in shown if iteration % interval == 0 or iteration == 6]


def test_a_failed_save_is_reported_and_only_the_last_one_ends_the_run(run, capsys):
    assert run(**TWO, saver={"failing": {0}}).saved == [4, 6]
    assert "WARNING: No space left on device. Training continues without it." in capsys.readouterr().out
    with pytest.raises(CheckpointNotSaved, match="No space left"):
        run(**TWO, saver={"failing": {2, 3}})


def test_a_planned_peak_that_cannot_be_known_is_told_once_with_the_reason(start, tmp_path, capsys, monkeypatch):
    def fails(ranks):
        raise RuntimeError("a rehearsed rank failed:\nTraceback\nRuntimeError: no such kernel")

    monkeypatch.setattr(rehearsal, "rehearse", fails)
    run = Run(start, tmp_path)
    run.planned_peak = rehearsal.start_planned_peak(run.state.config, run.state.shape)
    end = time.monotonic() + seconds(10)
    while run.planned_peak() is None and time.monotonic() < end:
        time.sleep(0.01)
    run.to_the_end()
    told = [line for line in capsys.readouterr().out.splitlines() if "measured, not planned" in line]
    assert len(told) == 1 and "(RuntimeError: no such kernel; --no-plan leaves this out)" in told[0]


def test_records_have_their_fields_and_average_the_losses_since_the_last_one(run):
    records = run(logging={"log_interval": 4}, training={"eval_interval": 3}).records
    assert {iteration: record["loss"] for iteration, record in records.items()} == {3: 7.0, 4: 4.0, 6: 2.25}
    assert [iteration for iteration, record in records.items() if "validation_loss" in record] == [3, 6]
    progress = "iteration epoch consumed_samples consumed_tokens interval_steps"
    numbers, memory = "loss learning_rate grad_norm", "memory_bytes peak_memory_bytes"
    speed = "step_seconds tokens_per_second"
    record, tokens = records[4], records[4]["consumed_tokens"] - records[3]["consumed_tokens"]
    assert record.keys() == set(f"{progress} {numbers} {speed} {memory}".split())
    assert (record["consumed_samples"], record["epoch"]) == (32, pytest.approx(32 / 40))
    assert [record["interval_steps"] for record in records.values()] == [3, 1, 2]
    assert record["learning_rate"] < records[3]["learning_rate"] < 5e-3
    assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(tokens)


@pytest.mark.parametrize("limit, stops", [(1e6, False), (1.5, True)])
def test_exit_duration(run, monkeypatch, limit, stops):
    """A clock that runs 40 s ahead at each look."""
    clock, looks = time.monotonic, itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock() + 40 * next(looks))
    found = run(training={"exit_duration_in_mins": limit})
    assert (found.state.position.iteration < 6) == stops
    assert found.reason.startswith("asked to stop at iteration" if stops else "trained 6")
    assert found.saved == [found.state.position.iteration]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops_after_the_step(start, tmp_path, number):
    run = Run(start, tmp_path, training={"exit_interval": 3})
    signal_at(run.data.train, 16, number)
    run.to_the_end()
    assert run.reason == f"asked to stop at iteration 3{CONTINUE} with --resume auto"
    assert run.saved == [3] and STOPPED.search(run.reason)
    assert sorted(run.records) == [3] and "validation_loss" not in run.records[3]  # recorded, though nothing is due


def test_neither_timers_nor_energy_go_on_in_a_save_or_a_validation(start, tmp_path, monkeypatch):
    happened = []
    run = Run(start, tmp_path, num_steps=4, save_interval=2, training={"eval_interval": 3})
    begin = run.saver.start
    run.saver.start = lambda state: (happened.append("save"), begin(state))
    monkeypatch.setattr(loop.step, "validation_loss", lambda *_: happened.append("validation") or 1.0)
    energy = Energy(LoggingConfig())
    energy._monitor = SimpleNamespace(
        pause=lambda: happened.append("pause"), resume=lambda: happened.append("resume"), lap=lambda: 0.0
    )
    monkeypatch.setattr(watchers, "Energy", lambda settings: energy)
    run.to_the_end()
    assert run.saved == [2, 4]
    expected = [["pause", one, "resume"] for one in ("save", "validation", "validation", "save")]
    assert happened == [*itertools.chain(*expected)]


def test_the_peak_beside_the_planned_one_is_that_of_the_second_step(start, tmp_path, capsys, monkeypatch):
    """The plan is known after the fourth; later validations and saves are not what a step takes."""
    run = Run(start, tmp_path, logging=EACH)
    planned = iter([None, None, 4 << 30])
    run.planned_peak = lambda: next(planned)
    monkeypatch.setattr(loop, "memory_bytes", lambda: (0, run.state.position.iteration << 30))
    run.to_the_end()
    told = [line for line in capsys.readouterr().out.splitlines() if "GiB planned" in line]
    assert len(told) == 1 and "2.00 GiB measured, 4.00 GiB planned (-50.0%;" in told[0]


def test_the_timeout_is_shortened_once_after_the_first_step(run, monkeypatch):
    happened, step = [], loop.step.train_step
    monkeypatch.setattr(loop, "shorten_timeout", lambda seconds: happened.append(seconds))
    monkeypatch.setattr(loop.step, "train_step", lambda *words: (happened.append("step"), step(*words))[1])
    run(parallel={"distributed_timeout_seconds_after_init": 7}, logging={**EACH, "log_straggler": True})
    assert happened == ["step", 7, *["step"] * 5]


def test_the_slowest_rank_is_found_by_forward_passes_that_the_device_times(start, tmp_path, monkeypatch):
    timed, step = [], loop.step.train_step
    run = Run(start, tmp_path, num_steps=2, logging={**EACH, "log_straggler": True})
    monkeypatch.setattr(loop.step, "train_step", lambda *given: (timed.append(given[-1].__name__), step(*given))[1])
    assert "slowest_rank" in run.to_the_end().records[1] and timed == ["of_device"] * 2


def test_loop_saves_and_ends_when_nobody_reads_its_output(start, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Progress, "is_closed", True)
    run = Run(start, tmp_path)
    run.to_the_end()
    assert run.saved == [1] and run.state.position.iteration == 1
