"""A method costs one file and one line: the one that docs/new-method.md shows trains alike at every layout."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_peft.config import PEFT_METHODS
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Curve, Job, run_jobs

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"
(SOURCE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
(LINE,) = re.findall(r'^    "(\w+)": "([\w.:]+)",$', PAGE.read_text(), re.MULTILINE)
LAYOUTS = {
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "TP2+SP": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "DP2 distributed optimizer": {"optimizer": {"use_distributed_optimizer": True, "lr": 1e-1}},
}


def train_with_the_new_method(jobs: list[Job]) -> dict[str, Curve]:
    """On a rank, to whose process the method is added as the page says."""
    module = sys.modules["megatron_peft.adapters.gains"] = ModuleType("gains")
    exec(compile(SOURCE, str(PAGE), "exec"), module.__dict__)
    PEFT_METHODS.update([LINE])
    return run_jobs(jobs)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_method")
    base, data = str(save_llama(folder / "base", num_hidden_layers=2)), str(save_pairs(folder / "pairs.jsonl"))
    common = {"peft": {"method": "gains"}, "optimizer": {"lr": 1e-1}}
    found = {}
    for num_ranks, layouts in ((1, {"alone": {}}), (2, LAYOUTS)):
        jobs = [Job(name, base, data, **{**common, **changes}, num_steps=12) for name, changes in layouts.items()]
        found.update(run_ranks(num_ranks, train_with_the_new_method, jobs)[0])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_alike_at_every_layout(curves, layout):
    alone, here = curves["alone"], curves[layout]
    assert alone.losses[-1] < alone.losses[0] - 0.02
    np.testing.assert_allclose(here.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(here.grad_norms, alone.grad_norms, rtol=1e-4)


def test_it_takes_about_forty_lines():
    assert len([line for line in SOURCE.splitlines() if line.strip()]) <= 40
