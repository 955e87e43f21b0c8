"""The runner, with a training program that takes no time: what is run, shown, and left by a failure or a kill."""

import hashlib
import io
import json
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from megatron_peft.checkpoint.folders import TRACKER, FolderLock
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import process, results, runner
from megatron_peft.experiment.cells import Group
from megatron_peft.experiment.records import ByLayer, of_cell, read_records, write_record
from megatron_peft.experiment.results import Result, Work
from megatron_peft.experiment.runner import Job, Runner, read_scores, run_experiment, table
from megatron_peft.experiment.spec import Metric, ScoreSpec
from tests.experiment.small_experiment import FAKE_TRAINING, content, experiment
from tests.time_limits import wait_until


@pytest.fixture(scope="module", autouse=True)
def looking_often() -> Iterator[None]:
    """The stand-ins for training end at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "POLL_S", 0.02)
        yield


VARYING = ("started_at", "seconds", "cpu_seconds", "score_seconds", "versions")
METHODS = {"lora": {"grid": {"lr": [0.1, 0.4]}}, "hybrid": {"grid": {"lr": [0.2, 0.5]}}}
SHORT: dict[str, Any] = {"methods": {"lora": {"grid": {"lr": [0.4]}}}, "seeds": [1]}  # a training, and its score


def run(folder: Path, jobs: int = 2, **changes: Any) -> tuple[bool, list[str]]:
    """Whether all cells are through, and what was told."""
    told: list[str] = []
    found, groups = experiment(folder, **{"methods": METHODS, **changes})
    whole = run_experiment(found, folder / "out", groups, jobs=jobs, report=told.append, program=FAKE_TRAINING)
    return whole, told


def progress(folder: Path, group: Group) -> Result:
    return results.progress(read_records(folder), group)


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of the file -> what it says, without what differs between two runs of it."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((folder / "out" / "cells").glob("*.json"))}
    return {name: {k: v for k, v in one.items() if k not in VARYING} for name, one in found.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder)[0]
    return folder


def test_best_rate_of_each_method_runs_all_seeds_and_they_alone_are_scored(finished: Path) -> None:
    names = {f"tiny,talk,{m},lr={r},seed={s}.json" for m, r in (("lora", 0.4), ("hybrid", 0.2)) for s in (1, 2, 3)}
    tried = {f"tiny,talk,{m},lr={r},seed=1.json" for m, r in (("lora", 0.1), ("lora", 1.6), ("hybrid", 0.5))}
    assert cells(finished).keys() == names | tried | {"tiny,talk,hybrid,lr=0.08,seed=1.json"}
    assert {name for name, one in cells(finished).items() if one["scores"]} == names
    out = finished / "out"
    assert list(out.rglob("iter_*")) == [] and len(list(out.rglob("metrics.jsonl"))) == 10
    assert (out / "experiment.yaml").read_text() == (finished / "small.yaml").read_text()
    assert run(finished) == (True, []), "a second call runs nothing"


def test_record_has_the_results(finished: Path) -> None:
    hybrid = cells(finished)["tiny,talk,hybrid,lr=0.2,seed=1.json"]
    assert hybrid["lambdas"] == {"iterations": [1, 2], "by_layer": {"decoder.layers.0.mlp.linear_fc1": [0.1, 0.2]}}
    one = cells(finished)["tiny,talk,lora,lr=0.4,seed=2.json"]
    assert one["validation_loss"] == pytest.approx(0.1 + 0.02 + 0.4)
    assert one["scores"]["accuracy"] == pytest.approx(100 - 5.2)
    assert (one["trainable_parameters"], one["epoch_seconds"], one["peak_memory_bytes"]) == (1024, 1.0, 100)
    assert one["curves"]["loss"] == [[1, 0.5, 1.52], [2, 1.0, 1.02]]


def test_record_has_the_data_of_its_run_and_its_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were when it began: the data change while it runs."""
    data, indexed, tests = tmp_path / "train.jsonl", tmp_path / "indexed.bin", tmp_path / "tests"
    tests.mkdir()
    for path in (data, indexed, tests / "a.yaml"):
        path.write_text("{}\n")
    monkeypatch.setenv("FAKE_APPENDS", str(data))
    tasks = content()["tasks"]
    tasks["talk"]["flags"] |= {"train-data-path": str(data), "valid-data-path": str(indexed.with_suffix(""))}
    tasks["talk"]["score"]["command"] += f" --include-path {tests}"
    run(tmp_path, **SHORT, tasks=tasks)
    (found,) = cells(tmp_path).values()
    plain = hashlib.sha256(b"{}\n").hexdigest()
    assert found["data"] == {str(path): plain for path in (data, indexed, tests / "a.yaml")}


def test_a_changed_score_is_made_again(tmp_path: Path) -> None:
    run(tmp_path, **SHORT)
    tasks = content()["tasks"]
    tasks["talk"]["score"]["metrics"]["accuracy"]["scale"] = 10
    whole, told = run(tmp_path, **SHORT, tasks=tasks)
    assert whole and [line.split()[0] for line in told] == ["train", "trained", "score", "scored"]
    (found,) = cells(tmp_path).values()
    assert found["scores"]["accuracy"] == pytest.approx(1000 - 52 + 1)


def test_records_of_a_contrast_have_it_and_the_items(tmp_path: Path) -> None:
    tasks = content()["tasks"]
    tasks["talk"] |= {"tuning_valid_data_path": "tuning.jsonl", "scored_seeds": [2]}
    tasks["talk"]["score"]["metrics"] = {"by item": {"path": "items", "scale": 2}}
    asked = {"rotation": {"of": "hybrid", "against": "lora", "margin": 0.01}}
    flags = {"train-iters": 2, "log-validation-items": True, "log-grad-norm-by-layer": True}
    settings: dict[str, Any] = {"tasks": tasks, "flags": flags, "seeds": [1, 2], "tuning_seed": 9, "contrasts": asked}
    assert run(tmp_path, **settings)[0]
    found, groups = experiment(tmp_path, methods=METHODS, **settings)
    finals = [record for group in groups for record in progress(tmp_path / "out", group).finals.values()]
    assert len(finals) == 4
    for record in finals:
        assert record.contrasts == found.asked
        loss = record.validation_loss or 0.0
        assert record.items["validation loss"] == [pytest.approx([loss, 1]), pytest.approx([3 * loss, 3])]
        by_item = [pytest.approx([2 * (100 - 10 * loss), 1]), pytest.approx([2 * (99 - 10 * loss), 1])]
        assert record.test_loss == 0.5 and 0 < (record.cpu_seconds or 0) < 60
        assert record.grad_norms == ByLayer([1, 2], {"0": [0.123, 0.123], "1": [None, None]})
        if record.seed == 1:  # not scored
            assert not record.scores and record.items.keys() == {"validation loss", "test loss"}
        else:
            assert record.items["by item"] == by_item and record.scores["by item"] == pytest.approx(199 - 20 * loss)
    assert all(progress(tmp_path / "out", group).is_done for group in groups)


def test_a_rate_that_diverges_ends_the_growth_and_is_not_run_again(tmp_path: Path) -> None:
    """Losses fall to 6; beyond is a loss that is not finite, which the last words of torchrun hide."""
    methods = {"lora": {"grid": {"lr": [1.5, 6]}}, "hybrid": {"grid": {"lr": [0.2, 0.5]}}}
    _, groups = experiment(tmp_path, methods=methods)
    write_record(tmp_path / "out", of_cell(groups[0].tuning[0], "trained", validation_loss=99.0))
    whole, told = run(tmp_path, methods=methods)
    assert whole and [line for line in told if line.startswith("diverged: train tiny,talk,lora,lr=24,seed=1: exit")]
    record = cells(tmp_path)["tiny,talk,lora,lr=24,seed=1.json"]
    assert record["status"] == "diverged" and record["validation_loss"] is None
    assert progress(tmp_path / "out", groups[0]).chosen_point == "lr=6"
    assert run(tmp_path, methods=methods) == (True, [])


def test_a_rate_that_is_not_tuned_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_peft.experiment.cells.MOST_ADDED", 1)
    whole, told = run(tmp_path, methods={"lora": {"grid": {"lr": [0.03, 0.06]}}}, seeds=[1])
    expected = "NOT TUNED: tiny,talk,lora: lr=0.12, since the best rate is the lowest or highest that was tried"
    assert whole and told[-1] == expected


def test_changed_flag_runs_its_cells_again(tmp_path: Path) -> None:
    run(tmp_path, **SHORT)
    _, told = run(tmp_path, methods={"lora": {"flags": {"lora-rank": 4}, "grid": {"lr": [0.4]}}}, seeds=[1])
    assert sum(line.startswith("trained") for line in told) == 1


def test_failed_cell_is_reported_and_the_others_continue(tmp_path: Path) -> None:
    whole, told = run(tmp_path, methods={"lora": {"grid": {"lr": [9, 0.4]}}}, seeds=[1])
    (failure,) = [line for line in told if line.startswith("FAILED")]
    assert not whole
    assert "lr=9" in failure and "exit code 1: " in failure and "the loss is not a number" in failure
    assert told[-1] == "NOT TUNED: tiny,talk,lora: lr=0.4, since points of the grid failed or are missing"
    assert cells(tmp_path)["tiny,talk,lora,lr=9,seed=1.json"]["status"] == "failed"
    assert sum(bool(one["scores"]) for one in cells(tmp_path).values()) == 1


def test_killed_worker_is_retried_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    trap.touch()
    monkeypatch.setenv("FAKE_KILL", str(trap))
    whole, told = run(tmp_path, jobs=1, **SHORT)
    assert not whole and "ended by SIGKILL" in next(line for line in told if line.startswith("FAILED"))
    whole, told = run(tmp_path, jobs=1, **SHORT)
    assert whole and all(one["status"] == "trained" for one in cells(tmp_path).values())


def test_a_run_that_stopped_early_is_not_trained_and_goes_on_without_a_time_of_its_own(tmp_path: Path) -> None:
    settings = {**SHORT, "flags": {"train-iters": 2, "exit-interval": 1}}
    whole, told = run(tmp_path, **settings)
    failure = (
        "FAILED: train tiny,talk,lora,lr=0.4,seed=1: --exit-interval reached at iteration 1: the next call goes on"
    )
    assert not whole and any(line.startswith(failure) for line in told)
    whole, _ = run(tmp_path, **settings)
    (path,) = (tmp_path / "out" / "cells").glob("*.json")
    record = json.loads(path.read_text())
    assert whole and (record["status"], record["iterations"]) == ("trained", 2)
    assert record["seconds"] is None and record["cpu_seconds"] is None, "of the last process alone"


def test_a_trained_record_outlives_a_training_that_was_repeated_and_failed(tmp_path: Path, monkeypatch) -> None:
    run(tmp_path, **SHORT)
    before, tasks = cells(tmp_path), content()["tasks"]
    tasks["talk"]["score"]["metrics"]["new"] = {"path": "items"}
    monkeypatch.setenv("FAKE_KILL", str(tmp_path / "trap"))
    (tmp_path / "trap").touch()
    whole, told = run(tmp_path, **SHORT, tasks=tasks)
    assert not whole and [line for line in told if line.startswith("FAILED: train ")] and cells(tmp_path) == before
    assert run(tmp_path, **SHORT, tasks=tasks)[0]


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A process that does `work`, writes the result to the pipe that is yielded, and waits to be killed at the end."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            result = work()  # held, if it is a lock
            os.write(writes, f"{result}".encode())
            time.sleep(600)
        os._exit(1)
    os.close(writes)
    try:
        yield reads
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reads)


def test_second_runner_is_refused(tmp_path: Path) -> None:
    with forked(lambda: FolderLock(tmp_path / "out")) as told:
        assert os.read(told, 1)
        with pytest.raises(ConfigurationError, match="another runner works in .*out: wait until it ends, or give"):
            run(tmp_path)
    FolderLock(tmp_path / "out").release()
    # Nor does a whole run begin beside one of a group, or that one beside it.
    with forked(lambda: FolderLock(tmp_path / "out" / "locks" / "tiny,talk,lora")) as told:
        assert os.read(told, 1)
        with pytest.raises(ConfigurationError, match="another runner works in .*locks/tiny,talk,lora"):
            run(tmp_path)


@pytest.mark.slow
def test_runner_killed_ten_times_at_work_ends_with_the_cells_of_an_unkilled_run(finished, tmp_path, monkeypatch):
    """Each kill comes up to 0.4 s after something new was seen: the start of a cell, or the file of one, in turns."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    there: list[int] = []
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    for pattern in ("runs/*/log.txt", "cells/*.json") * 5:
        before = newest(tmp_path, pattern)
        with forked(lambda: run(tmp_path, jobs=1)) as told:
            wait_until(lambda: newest(tmp_path, pattern) > before, pattern)  # noqa: B023
            time.sleep(draw.uniform(0, 0.4))
            assert not select.select([told], [], [], 0)[0], "it ended by itself"
        there.append(len(list((tmp_path / "out" / "cells").glob("*.json"))))
    print(f"cells of 10 that were there after each kill: {there}")
    assert run(tmp_path)[0]
    assert cells(tmp_path) == cells(finished)


def newest(folder: Path, pattern: str) -> int:
    return max((path.stat().st_mtime_ns for path in (folder / "out").glob(pattern)), default=0)


def start_sleep(folder: Path) -> int:
    return process.start(["sleep", "60"], folder / "log", ThreadPoolExecutor(1)).process.pid


def test_cells_end_with_a_killed_runner(tmp_path: Path) -> None:
    with forked(lambda: start_sleep(tmp_path)) as told:
        child = int(os.read(told, 20))
        assert _is_running(child)
    wait_until(lambda: not _is_running(child), "the end of the cell")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_group_alone_is_not_prepared(tmp_path: Path) -> None:
    plain = {"flags": {"lr": 1}}
    methods = {"lora": plain, "boft": plain}
    found, (lora, _) = experiment(tmp_path, prepare=["python -c 1/0"], methods=methods, seeds=[1])
    assert run_experiment(found, tmp_path / "out", [lora], is_whole=False, report=str, program=FAKE_TRAINING)
    assert [*cells(tmp_path)] == ["tiny,talk,lora,seed=1.json"]


def test_failed_preparation_stops_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="(?s)prepare: python -c 1/0 failed: Traceback.*ZeroDivisionError"):
        run(tmp_path, prepare=["python -c 1/0"])
    assert not (tmp_path / "out" / "cells").exists()


def test_score_is_the_scaled_mean_of_its_paths_or_an_error_that_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "score.json").write_text('{"a": {"acc,none": 0.5}, "b": {"acc,none": 0.25}}')
    metric = Metric(("a/acc,none", "b/acc,none"), scale=100)
    assert read_scores(tmp_path / "score.json", ScoreSpec(("x",), {"accuracy": metric})) == ({"accuracy": 37.5}, {})
    with pytest.raises(ConfigurationError, match="no c/acc: instead of c there is a, b"):
        read_scores(tmp_path / "score.json", ScoreSpec(("x",), {"accuracy": Metric(("c/acc",))}))
    (tmp_path / "score.json").write_text('{"a": {"acc,none": [1, 0, 0, 1]}, "b": {"acc,none": "0.25"}}')
    items = [(100, 1), (0, 1), (0, 1), (100, 1)]
    found = read_scores(tmp_path / "score.json", ScoreSpec(("x",), {"accuracy": Metric(("a/acc,none",), scale=100)}))
    assert found == ({"accuracy": 50}, {"accuracy": items})
    with pytest.raises(ConfigurationError, match="b/acc,none is '0.25', not a number"):
        read_scores(tmp_path / "score.json", ScoreSpec(("x",), {"accuracy": metric}))


def test_scores_whose_checkpoints_are_gone_are_trained_for_again(tmp_path: Path) -> None:
    run(tmp_path, **SHORT)
    for path in (tmp_path / "out" / "cells").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "scores": {}}))
    whole, told = run(tmp_path, **SHORT)
    assert whole and sum(line.startswith("scored") for line in told) == 1
    _, groups = experiment(tmp_path, **SHORT)
    assert progress(tmp_path / "out", groups[0]).is_done
    assert not process.has_checkpoint(tmp_path / "out", groups[0].tuning[0])


def test_what_other_flags_have_left_is_not_gone_on_with(tmp_path: Path) -> None:
    _, (group,) = experiment(tmp_path, **SHORT)
    saved = process.checkpoints_folder(tmp_path / "out", group.tuning[0])
    saved.mkdir(parents=True)
    (saved / TRACKER).write_text("5")  # as of a run that was stopped
    flags = saved.parent / process.FLAGS
    assert saved.parent == process.run_folder(tmp_path / "out", group.tuning[0])
    flags.write_text('["--lr", "9"]')
    run(tmp_path, **SHORT)
    log = (process.run_folder(tmp_path / "out", group.tuning[0]) / process.LOG).read_text()
    assert "--load" not in log.splitlines()[0] and flags.read_text() == json.dumps(group.tuning[0].flags)


def test_a_score_whose_program_is_not_there_fails_alone(tmp_path: Path) -> None:
    tasks = content()["tasks"]
    tasks["talk"]["score"]["command"] = "no-such-program {output}"
    whole, told = run(tmp_path, **SHORT, tasks=tasks)
    assert not whole and any(line.startswith("FAILED: score ") and "cannot be started" in line for line in told), told


def test_training_whose_program_is_not_there_is_recorded_as_failed(tmp_path: Path) -> None:
    found, (group,) = experiment(tmp_path, **SHORT)
    (tmp_path / "out").mkdir()
    runner = Runner(found, tmp_path / "out", [group], report=lambda text: None, program=FAKE_TRAINING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "launcher", lambda processes: ["no-such-program"])
        assert not runner.run()
    (record,) = cells(tmp_path).values()
    assert record["status"] == "failed" and "no-such-program cannot be started" in record["reason"]


def test_grid_without_a_finite_loss_is_reported(tmp_path: Path) -> None:
    methods = {"lora": METHODS["lora"]}
    _, (group,) = experiment(tmp_path, methods=methods)
    for cell in group.tuning:
        write_record(tmp_path / "out", of_cell(cell, "trained", validation_loss=float("nan")))
    told = ["FAILED: tiny,talk,lora: no point of its grid ended with a finite validation loss"]
    assert run(tmp_path, methods=methods) == (False, told)


def half_done(folder: Path):
    """LoRA's grid (0.4 is best) and two of its seeds, one of them with the file's score; of BOFT a failure."""
    _, groups = experiment(folder)
    lora, boft = groups
    for cell, loss in [(lora.tuning[0], 3.0), (lora.finals[1][0], 2.0), (lora.finals[1][1], 1.0)]:
        scores = {"accuracy": 40.0} if loss == 2.0 else {"of an older file": 9.0}
        write_record(folder, of_cell(cell, "trained", validation_loss=loss, scores=scores))
    write_record(folder, of_cell(boft.tuning[0], "failed"))
    return groups


def show(folder: Path, groups: list[Group]) -> Table:
    return table(read_records(folder), groups)


def test_table_shows_how_far_each_method_is(tmp_path: Path) -> None:
    Console(file=(drawn := io.StringIO()), width=150).print(show(tmp_path, half_done(tmp_path)))
    lines = [[word.strip() for word in line.strip("│").split("│")] for line in drawn.getvalue().splitlines()]
    assert [line[2:] for line in lines if "talk" in line] == [
        ["lora", "2/2", "lr=0.4, not tuned", "2/3, 1 scored", "1.5", "accuracy 40"],
        ["boft", "0/2 (1 failed)", "", "0/3, 0 scored", "", ""],
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_the_table_with_what_runs(tmp_path: Path, is_terminal: bool) -> None:
    groups, drawn = half_done(tmp_path), io.StringIO()
    cell, console = groups[1].tuning[1], Console(file=drawn, width=150, force_terminal=is_terminal)
    metrics = process.checkpoints_folder(tmp_path, cell) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"iteration": 7}\n')
    running = SimpleNamespace(seconds=12.0)
    job = Job(Work("train", cell), running, of_cell(cell, "failed"))  # type: ignore[arg-type]
    found, _ = experiment(tmp_path)
    console.print(Runner(found, tmp_path, groups, recorded=read_records(tmp_path), running={cell.key: job}).show())
    assert "0/2 (1 failed)" in drawn.getvalue() and f"train {cell.key}: iteration 7, 12 s" in drawn.getvalue()
    drawn.truncate(0)
    Runner(found, tmp_path, [], console=console).run()
    assert ("chosen" in drawn.getvalue()) == is_terminal
