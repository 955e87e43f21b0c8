"""A run, a prepared task and an experiment that b03219c wrote are still read.

Expected numbers are of b03219c on another machine, so they are compared with a tolerance. How the files were made
stands in `written_by_b03219c/README.md`.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_peft.commands import convert
from tests.golden.cases import TP2, run
from tests.golden.tree import Tree

FOLDER = Path(__file__).parent / "written_by_b03219c"
WRITTEN_AT = "/written"  # a prepared task names its files by absolute paths
TASK = "task/sst2"
TRAINING = (
    f"--pretrained-checkpoint base --train-data-path {TASK}/train.jsonl --valid-data-path {TASK}/valid.jsonl "
    "--seq-length 128 --num-workers 0 --global-batch-size 4 --train-iters 5 --log-interval 1 --eval-interval 5 "
    f"--lr 5e-3 --lora-rank 2 {TP2}"
)
TOLERANCE = 1e-5  # relative
Found = dict[str, Any]


def resumed(tree: Tree, folder: Path) -> Found:
    run(tree, "train", f"{TRAINING} --load run --save run", folder, num_ranks=2)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "learning_rate", "consumed_tokens", "validation_loss")
    return {f"step {r['iteration']} {name}": r[name] for r in records for name in names if name in r}


def evaluated(tree: Tree, folder: Path) -> Found:
    flags = f"--load run --tasks glue_sst2 --include-path {TASK} --output scores.json --log-samples"
    run(tree, "evaluate", flags, folder)
    samples = [json.loads(line) for line in (folder / "scores.samples.jsonl").read_text().splitlines()]
    accuracy = json.loads((folder / "scores.json").read_text())["results"]["glue_sst2"]["acc,none"]
    likelihoods = {f"question {one['doc_id']}": [value for value, _ in one["filtered_resps"]] for one in samples}
    return {"accuracy": accuracy, **likelihoods}


def listed(tree: Tree, folder: Path) -> Found:
    """Both cells of the experiment count as done: nothing runs, and the report shows their scores."""
    printed = run(tree, "experiment", "experiment.yaml --output experiment", folder)
    assert "5.453" in printed and "5.261" in printed and "train " not in printed, f"not done any more:\n{printed}"
    run(tree, "report", "experiment --output report", folder)
    assert "66.67" in (folder / "report" / "report.md").read_text(), "the report does not show the accuracy"
    return {}


CHECKS: dict[str, Callable[[Tree, Path], Found]] = {
    "the run goes on": resumed,
    "the prepared task is evaluated": evaluated,
    "the experiment is done": listed,
}


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with Tree(Path(__file__).parents[2]) as tree:
        yield tree


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_what_b03219c_wrote_is_read(tree: Tree, tmp_path: Path, name: str) -> None:
    compare(name, CHECKS[name](tree, copied(tmp_path / "files")))


@pytest.mark.parametrize(
    ("command", "name"), [("merge", "the run is merged"), ("export-adapter", "the run is exported")]
)
def test_a_run_of_b03219c_is_converted(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied(tmp_path / "files"))
    assert convert.main([command, "--input", "run", "--output", "out"]) == 0
    compare(name, _weights(Path("out")))


def compare(name: str, found: Found) -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())[name]
    assert found.keys() == expected.keys()
    for quantity, value in expected.items():
        if isinstance(value, str):
            assert found[quantity] == value, quantity
        else:
            np.testing.assert_allclose(found[quantity], value, TOLERANCE, TOLERANCE, err_msg=quantity)


def copied(folder: Path) -> Path:
    """The files as b03219c left them, in `folder`, which must not exist; a moved task is told where it lies."""
    shutil.copytree(FOLDER, folder)
    for path in (folder / TASK).glob("*.yaml"):
        path.write_text(path.read_text().replace(WRITTEN_AT, str(folder)))
    return folder


def _weights(folder: Path) -> Found:
    """Of each tensor three numbers that a change of any value or of their order moves."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            values = tensor.astype(np.float64).ravel()
            found[name] = [float(np.linalg.norm(values)), float(values @ np.cos(np.arange(values.size))), values[-1]]
    return found
