"""Three steps on two ranks equal three steps alone: a quick answer for each sum that a layout needs.

`test_layout.py` runs more layouts for longer.
"""

import pytest

from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.training.layout_runs import Job, differences, run_each, run_jobs
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
def test_two_ranks_train_what_one_process_does(found, case):
    """LoRA-GA's A too: its rows are singular vectors with a sign, whichever ranks hold their columns."""
    alone, by_rank = found[case]
    assert bool(alone.curve.lambdas) == case.startswith("hybrid") and alone.curve.losses[2] != alone.curve.losses[0]
    assert all(here.curve == by_rank[0].curve for here in by_rank)
    assert differences(by_rank, alone) == {}


def test_a_stop_on_one_rank_stops_all(found):
    for alone, by_rank in found.values():
        assert [[step.stop for step in here.curve.steps] for here in (alone, *by_rank)] == [[False, True, False]] * 3
