"""Files that say nothing, too much, or two things at once, and what their author is told; the cells and their flags."""

import math
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

from megatron_peft.cli.flags import flags_of
from megatron_peft.cli.parser import RunFlags, read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import HarnessSettings
from megatron_peft.experiment import process
from megatron_peft.experiment.cells import check_flags, command_line, groups
from megatron_peft.experiment.spec import Contrast, read_experiment
from tests.experiment.small_experiment import experiment, write

ROOT = Path(__file__).parents[2]
GRID = {"grid": {"lr": [0.1]}}
UNVALIDATED = {"talk": {"flags": {"train-data-path": "train.jsonl"}}}


def scored_by(metric: dict[str, Any]) -> dict[str, Any]:
    return {"tasks": {"talk": {"score": {"command": "x {output}", "metrics": {"a": metric}}}}}


FILES = ["valid.jsonl", "./valid.jsonl", "train.jsonl", "other.jsonl", "test.jsonl", "more.jsonl"]
FILES += [["tuning.jsonl", "train.jsonl"], str(Path("valid.jsonl").absolute())]
OTHER_SEEDS = {"lora": GRID, "boft": {**GRID, "seeds": [3, 4]}}


def asked(tuning: str | list[str] | None = None, tuning_seed: int = 9, **changes: Any) -> dict[str, Any]:
    """The small experiment with a contrast."""
    flags = changes.pop("flags", {"train-iters": 2, "log-validation-items": True})
    score = {"command": "x {output} test.jsonl --data=more.jsonl", "metrics": {"a": {"path": "a"}}}
    files = {"train-data-path": ["train.jsonl"], "valid-data-path": "valid.jsonl", "test-data-path": "other.jsonl"}
    task = {"flags": files, "score": score}
    task |= {"tuning_valid_data_path": tuning} if tuning else {}
    contrast = {"of": "boft", "against": "lora", "margin": 0.01, **changes}
    return {"flags": flags, "tasks": {"talk": task}, "contrasts": {"better": contrast}, "tuning_seed": tuning_seed}


def test_a_contrast_keeps_tuning_apart_from_what_it_measures(tmp_path: Path) -> None:
    found, (group, other) = experiment(tmp_path, **asked(tuning="tuning.jsonl"))
    assert found.contrasts == (Contrast("better", "boft", "lora", "validation loss", 0.01),)
    paths = {cell.seed: cell.flags[cell.flags.index("--valid-data-path") + 1] for cell in group.cells.values()}
    assert paths == {9: "tuning.jsonl", 1: "valid.jsonl", 2: "valid.jsonl", 3: "valid.jsonl"}
    assert not {cell.key for cell in group.tuning} & {cell.key for cells in group.finals for cell in cells}
    _, (group, other) = experiment(tmp_path, **asked(tuning_seed=1), methods={"lora": GRID, "boft": GRID})
    assert len(group.cells) == len(other.cells) == 3  # nothing is tuned
    own_seeds = {"lora": GRID, "boft": {**GRID, "seeds": [1, 2, 3, 4]}}
    _, (group, other) = experiment(tmp_path, **asked(), methods=own_seeds)
    assert [[cell.seed for cell in one.finals[0]] for one in (group, other)] == [[1, 2, 3], [1, 2, 3, 4]]
    with pytest.raises(ConfigurationError, match="tuning_seed 1 is among the seeds, but with tasks.talk.tuning_valid"):
        experiment(tmp_path, **{**asked("tuning.jsonl", 1), "contrasts": {}})
    with pytest.raises(ConfigurationError, match="tuning_seed 1 is among the seeds, but with contrasts final runs"):
        experiment(tmp_path, **asked("tuning.jsonl", 1))


def test_file_is_read_as_written_and_a_method_of_all_cells_is_not_overruled_by_a_name(tmp_path: Path) -> None:
    found, _ = experiment(tmp_path)
    assert (found.name, found.title, found.seeds, found.tuning_seed) == ("small", "Small", (1, 2, 3), 1)
    assert found.methods[0].flags == {"peft-method": "lora"}
    assert found.tasks[0].score is not None and list(found.tasks[0].score.metrics) == ["accuracy"]
    raw, fixed = {"raw": {"flags": {"hybrid-lambda": "raw"}}}, {"fixed": {"flags": {"peft-method": "hybrid"}}}
    found, _ = experiment(tmp_path, flags={"peft-method": "hybrid"}, methods=raw)
    assert found.methods[0].flags == {"hybrid-lambda": "raw"}
    found, _ = experiment(tmp_path, methods=fixed)
    assert found.methods[0].flags == {"peft-method": "hybrid"}


def test_the_file_that_the_documents_show_is_accepted_with_the_contrast_that_they_show(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "experiments.md").read_text()
    shown = [dedent(part) for part in re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)]
    file, contrasts = (next(part for part in shown if part.startswith(word)) for word in ("title:", "contrasts:"))
    values = {**yaml.safe_load(file), "contrasts": {}}
    assert [model.name for model in read_experiment(write(tmp_path, values)).models] == ["SmolLM2-135M"]
    values |= yaml.safe_load(contrasts)
    values["flags"]["log-validation-items"] = True
    lora = values["methods"]["lora"]
    values["methods"] = {"hybrid": lora, "hybrid-without-rotation": {**lora, "flags": {"peft-method": "lora-ga"}}}
    assert [contrast.name for contrast in read_experiment(write(tmp_path, values)).contrasts] == ["rotation"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_read(path: Path) -> None:
    assert len(read_experiment(path).seeds) >= 3


def test_the_claims_file_can_be_run_and_asks_four_questions_of_six_seeds() -> None:
    found = read_experiment(ROOT / "examples" / "experiments" / "claim.yaml")
    check_flags(groups(found))
    seeds = {method.name: len(found.seeds_of(method)) for method in found.methods}
    assert len(found.methods) == 10 and len(found.contrasts) == 4
    assert {seeds[name] for contrast in found.contrasts for name in (contrast.of, contrast.against)} == {6}
    score, cell = found.tasks[0].score_of(1), groups(found)[1].finals[0][0]
    assert score is not None and found.tasks[0].score_of(4) is None
    words = process.score_command(Path("out"), cell, score)
    config = read_config(words[words.index("megatron_peft.demo.scoring") + 2 :], {"WORLD_SIZE": "1"})
    assert config.data.valid_data_path == ("runs/demo/data/valid.jsonl",)


def test_the_papers_scores_can_be_run_by_each_models_processes(tmp_path: Path) -> None:
    for group in groups(read_experiment(ROOT / "examples" / "experiments" / "paper.yaml")):
        cell, score = group.finals[0][0], group.task.score
        assert score is not None
        words = process.score_command(Path("out"), cell, score)
        start = [*process.launcher(cell.processes), "-m", "megatron_peft", "evaluate"]
        assert words[: len(start)] == start and len(start) > 4
        words += ["--log-validation-items", "--pretrained-checkpoint", str(tmp_path)]
        flags = RunFlags(words[len(start) :], [*flags_of(HarnessSettings)])
        assert flags.config({"WORLD_SIZE": str(cell.processes)}, saved=dict).checkpoint.save_interval == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "the grid is empty: methods names nothing"),
        ({"seeds": []}, "the grid is empty: seeds names nothing"),
        ({"methods": {"lora": {"grid": {"lr": []}}}}, r"methods.lora.grid.lr is empty: list the values"),
        ({"methods": {"lora": {"grid": {"lr": [0.1, 0.1]}}}}, "methods.lora.grid.lr holds 0.1 twice"),
        ({"methods": {"lora": {"flags": {"lr": 1}, **GRID}}}, "--lr is in methods.lora.flags and in methods.lora.grid"),
        ({"flags": {"lr": 1, "train-iters": 2}}, "--lr is in flags and in methods.lora.grid"),
        ({"flags": {"train-data-path": "a"}}, "--train-data-path is in flags and in tasks.talk.flags: leave it in"),
        ({"flags": {"train-iters": 2, "seed": 4}}, "flags: --seed is the runner's own: list the seeds under seeds:"),
        ({"flags": {"train-iters": 2, "save": "x"}}, "--save is the runner's own: each cell has a folder"),
        ({"seeds": [1, 1]}, "seeds: 1, 1 names one twice"),
        ({"seeds": [1, "two"]}, "seeds holds 'two', which is not a whole number"),
        ({"methods": {"lora": GRID, "boft": {"grid": {"lr": [1, 2]}}}}, "but their grids hold: lora 1, boft 2"),
        ({"tasks": UNVALIDATED}, "tasks.talk: .* with models.tiny nothing is validated: give"),
        ({"method": {}}, "the unknown key 'method': did you mean methods?"),
        ({"models": {"tiny": {"flag": {}}}}, "models.tiny has the unknown key 'flag': did you mean flags"),
        ({"models": {"tiny": {"processes": 0}}}, "models.tiny.processes is 0; a cell needs one at least"),
        ({"models": {"a/b": {}}}, "the name 'a/b' becomes a folder's"),
        ({"models": ["tiny"]}, r"models is \['tiny'\]; it is a mapping"),
        ({"tasks": {"talk": {"score": {"command": "python x"}}}}, "score.command does not name its JSON file"),
        ({"tasks": {"talk": {"score": {"command": "x {output}"}}}}, "score.metrics is empty"),
        (
            {"tasks": {"talk": {"score": {"command": "x {output} {checkpoint}"}}}},
            "score.command has {checkpoint}, which nothing fills in: did you mean {checkpoints}",
        ),
        (scored_by({}), "metrics.a needs path"),
        ({"methods": {"lora": {"seeds": [4, 4]}}}, "seeds: 4, 4 names one twice"),
        (asked(), r"contrasts need data that no setting was chosen by: give the task tuning_valid_data_path"),
        *((asked(tuning=path), "with no file that trains, validates, tests or scores its final") for path in FILES),
        (asked(tuning="tuning.jsonl", tuning_seed=2), "tuning_seed 2 is among the seeds, but with contrasts final"),
        (asked(against="full"), "contrasts.better: full is not a method; there are lora, boft"),
        (asked(of="lora"), "contrasts.better: lora and lora must be two methods that share two seeds"),
        *((asked(margin=wrong), f"contrasts.better.margin is {wrong}; it is a number") for wrong in (0, math.inf)),
        ({**asked("tuning.jsonl"), "methods": OTHER_SEEDS}, "boft and lora must be two methods that share two seeds"),
        (asked(margin=None), "contrasts.better needs margin"),
        (asked(metric="BLEU"), "BLEU is no metric of talk, which has validation loss, area, a, test loss"),
        ({**asked(metric="test loss"), "tasks": UNVALIDATED}, "test loss is no metric of talk, which has validation l"),
        (
            asked(flags={"log-validation-items": False}),
            "better compares the validation loss sample by sample: put log-",
        ),
        (scored_by({"path": "b", "scale": "%"}), "metrics.a.scale is '%', not a number"),
    ],
)
def test_a_contradictory_file_is_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        experiment(tmp_path, **changes)
    assert all("small.yaml" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1, 2, 77], "scored_seeds: 77 is no seed of a final run"),
        ([1], "scored_seeds must hold two seeds of both methods"),
    ],
)
def test_a_contrast_on_a_score_needs_two_scored_seeds(tmp_path: Path, seeds: list[int], message: str) -> None:
    values = asked("tuning.jsonl", metric="a")
    values["tasks"]["talk"]["scored_seeds"] = [1, 2]
    experiment(tmp_path, **values)
    values["tasks"]["talk"]["scored_seeds"] = seeds
    with pytest.raises(ConfigurationError, match=message):
        experiment(tmp_path, **values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("seeds: [1]\nseeds: [2]\n", "line 2, column 1: seeds stands here and in line 1"),
        ("- a\n", "it is a mapping"),
    ],
)
def test_broken_or_missing_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_experiment(write(tmp_path, text))
    with pytest.raises(ConfigurationError, match="none.yaml cannot be read: No such file"):
        read_experiment(tmp_path / "none.yaml")


def test_all_problems_are_reported_at_once_and_a_single_point_needs_no_validation(tmp_path: Path) -> None:
    experiment(tmp_path, tasks=UNVALIDATED, methods={"lora": GRID})
    experiment(tmp_path, tasks=UNVALIDATED, models={"tiny": {"flags": {"data-path": "prefix"}}})
    with pytest.raises(ConfigurationError) as caught:
        experiment(tmp_path, seeds=[1, 1], flags={"seed": 3, "train-iters": 2})
    assert len(caught.value.problems) == 3  # the flag once for each method that it would go to


def test_prepare_is_a_command_or_several(tmp_path: Path) -> None:
    assert experiment(tmp_path, prepare="python -m x")[0].prepare == (("python", "-m", "x"),)
    several, _ = experiment(tmp_path, prepare=["python -m x", ["python", "a b.py"]])
    assert several.prepare == (("python", "-m", "x"), ("python", "a b.py"))
    quoted, _ = experiment(tmp_path, prepare="bash -c 'sort a > b'")
    assert quoted.prepare == (("bash", "-c", "sort a > b"),)
    with pytest.raises(ConfigurationError, match='prepare is "bash -c \'sort": No closing quotation.'):
        experiment(tmp_path, prepare="bash -c 'sort")
    with pytest.raises(ConfigurationError, match="prepare is 3; it is a command"):
        experiment(tmp_path, prepare=3)


def test_budget_is_what_all_methods_share(tmp_path: Path) -> None:
    models = {"tiny": {"flags": {"clip-grad": 0.5, "num-layers": 2}}}
    found, _ = experiment(tmp_path, flags={"train-iters": 2, "log-interval": 1}, models=models)
    data = {"train-data-path": "train.jsonl", "valid-data-path": "valid.jsonl"}
    assert found.budget(found.models[0], found.tasks[0]) == {"train-iters": 2, "clip-grad": 0.5, **data}


@pytest.mark.parametrize(
    "flag",
    "train-iters eval-iters lr-decay-iters lr-wsd-decay-iters min-lr clip-grad split early-stopping-patience".split(),
)
def test_schedule_and_budget_are_the_same_for_all_methods(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigurationError, match=f"methods.lora: --{flag} must be the same for all methods"):
        experiment(tmp_path, flags={}, methods={"lora": {"flags": {flag: 5}}})


def test_flags_of_yaml_become_words_and_a_cell_has_those_of_all_places(tmp_path: Path) -> None:
    flags = {"lr": "3e-4", "bf16": True, "pack-sequences": False, "split": None, "peft-target-modules": ["a", "b"]}
    assert command_line(flags) == ("--lr", "3e-4", "--bf16", "--peft-target-modules", "a", "b")
    _, (group, _) = experiment(tmp_path)
    assert group.tuning[0].flags == (
        *("--train-iters", "2", "--pretrained-checkpoint", "nowhere", "--train-data-path", "train.jsonl"),
        *("--valid-data-path", "valid.jsonl"),
        *("--peft-method", "lora", "--lr", "0.1", "--seed", "1"),
    )


def test_grid_is_every_combination_or_one_cell(tmp_path: Path) -> None:
    grid = {"lr": [0.1, 0.2], "lora-rank": [4, 8]}
    _, (tuned, plain) = experiment(tmp_path, methods={"lora": {"grid": grid}, "boft": {"grid": {"lr": [1, 2, 3, 4]}}})
    assert [dict(cell.settings) for cell in tuned.tuning] == [
        {"lr": lr, "lora-rank": rank} for lr in ("0.1", "0.2") for rank in ("4", "8")
    ]
    assert [finals[0] for finals in plain.finals] == list(plain.tuning), "the tuning cell is a final one of its seed"
    _, (single,) = experiment(tmp_path, methods={"lora": {}})
    assert [cell.key for cell in single.tuning] == ["tiny,talk,lora,seed=1"]


def test_flags_that_pretrain_peft_takes_pass_in_the_folder_that_the_runner_gives(tmp_path: Path) -> None:
    check_flags(experiment(tmp_path, flags={"train-iters": 2, "save-interval": 1})[1])


UNREAD_GRID = r"methods.lora.grid: --boft-factors has no effect with --peft-method lora, so the grid would run equal"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"lorra": {}}}, "tiny,talk,lorra,seed=1: --peft-method lorra is not one"),
        ({"flags": {"train-iters": 2, "leraning-rate": 1}}, "--leraning-rate is not a known flag"),
        ({"methods": {"boft": {"grid": {"boft-block-size": [5]}}}}, "--boft-block-size is 5; its halves are paired"),
        ({"methods": {"lora": {"grid": {"lora-rank": [4], "boft-factors": [2, 3]}}}}, UNREAD_GRID),
        ({"methods": {"lora": {"grid": {"lr": ["fast"]}}}}, "--lr: .*fast"),
        ({"models": {"big": {"processes": 3, "flags": {"tensor-model-parallel-size": 2}}}}, "3 processes cannot hold"),
    ],
)
def test_wrong_flags_are_reported_once_before_anything_runs(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_flags(experiment(tmp_path, **changes)[1])
    assert sum("leraning-rate" in problem for problem in caught.value.problems) <= 1, "though many cells have it"
