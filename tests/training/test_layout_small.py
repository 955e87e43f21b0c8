"""Three steps on two ranks equal three steps alone: a quick answer for each sum that a layout needs.

`test_layout.py` runs more layouts for longer, but cannot see LoRA-GA's start: A and B with the other sign are the same
model.
"""

import pytest
import torch

from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.training.layout_runs import Job, run_each, run_jobs
from tests.training.test_layout import LAYOUTS, ONE

BOFT = {"boft_block_size": 2, "boft_factors": 2}
PEFT = {
    "lora": {"method": "lora", "lora_rank": 4},
    "boft input": {"method": "boft", "rotation_side": "input", **BOFT},
    "riemannian": {"method": "urnn", "urnn_update": "riemannian", "urnn_block_size": 4, "peft_lr_rotation": 0.2},
    "lora-ga paper": {"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 1, "lora_ga_init": "paper"},
    "hybrid": {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 1, "peft_lr_rotation": 2e-3, **BOFT},
}
CASES = {
    "lora TP2": LAYOUTS["TP2"],
    "boft input TP2": LAYOUTS["TP2"],
    "hybrid TP2": LAYOUTS["TP2"],
    "hybrid DP2": LAYOUTS["DP2 overlapped"],
    "lora-ga paper DP2": LAYOUTS["DP2"],
    "riemannian DP2": LAYOUTS["DP2 distributed optimizer"],
}


@pytest.fixture(scope="module")
def found(files):
    """(of one process, of each of two ranks), by case."""

    def job(case, groups):
        return Job(case, *files, num_steps=3, peft=PEFT[case.rpartition(" ")[0]], **groups)

    with one_rank(with_groups=False):
        alone = run_each([job(case, ONE) for case in CASES])
    by_rank = run_ranks(2, run_jobs, [job(case, groups) for case, groups in CASES.items()])
    return {case: (alone[case], [rank[case] for rank in by_rank]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_losses_norms_and_lambdas_equal_one_process(found, case):
    alone, by_rank = found[case]
    assert bool(alone.lambdas) == case.startswith("hybrid") and alone.losses[2] != alone.losses[0]
    assert all(here.equals(alone) for here in by_rank)


def test_a_stop_on_one_rank_stops_all(found):
    for alone, by_rank in found.values():
        assert [here.stopped for here in (alone, *by_rank)] == [[False, True, False]] * 3


@pytest.mark.parametrize("case", [case for case in CASES if PEFT[case.rpartition(" ")[0]].get("lora_ga_batches")])
def test_lora_ga_starts_where_it_starts_alone(found, case):
    """A itself, [r, in]: its rows are singular vectors with a sign, whichever ranks hold their columns."""
    alone, by_rank = found[case]
    for name, A in alone.started.items():
        held = [here.started[name] for here in by_rank]
        whole = held[0] if held[0].shape == A.shape else torch.cat(held, 1)
        torch.testing.assert_close(whole, A, rtol=1e-3, atol=1e-3 * float(A.abs().max()))
