"""Two ranks equal one process after a few steps: a quick answer for each sum that a layout needs, and for corners.

They agree on errors and signals too. `test_layout.py` runs more layouts for longer.
"""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.launch import start_world
from megatron_peft.training import run as training_run
from megatron_peft.training.loop import train
from megatron_peft.training.step import NonFiniteError, train_step
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama
from tests.training.layout_runs import Job, built, differences, run_each, run_jobs
from tests.training.recorded_saves import RecordedSaves, signal_at
from tests.training.test_layout import HALF_AS_MANY, LAYOUTS, ONE, PP2, SP, TP2

BOFT = {"boft_block_size": 2, "boft_factors": 2}
LORA = {"method": "lora", "lora_rank": 4}
START = {"lora_rank": 4, "lora_ga_batches": 1}
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"peft": LORA},
    "boft input": {"peft": {"method": "boft", "rotation_side": "input", **BOFT}},
    "riemannian": {
        "peft": {"method": "urnn", "urnn_update": "riemannian", "urnn_block_size": 4, "peft_lr_rotation": 0.2}
    },
    "lora-ga paper": {"peft": {"method": "lora-ga", "lora_ga_init": "paper", **START}},
    "hybrid": {"peft": {"method": "hybrid", "peft_lr_rotation": 2e-3, **START, **BOFT}},
    "bounded": {"peft": {"method": "lora-ga", "lora_ga_init": "original", "lora_max_norm_ratio": 0.01, **START}},
    # Four layers, some of them without trainable parameters; an embedding that is the last stage's output layer.
    "first layer": {"peft": {**LORA, "target_modules": ("decoder.layers.0.*",), "lora_plus_ratio": 4.0}},
    "last layer": {"peft": {**LORA, "target_modules": ("decoder.layers.3.*",)}},
    "frozen ones between": {"peft": {**LORA, "target_modules": ("o_proj", "decoder.layers.2.mlp.*")}},
    "tied lora": {"peft": LORA},
    "tied full": {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}},
}
AT_PP2, AT_SP = {"parallel": PP2, **HALF_AS_MANY}, {"parallel": SP, **HALF_AS_MANY}
SHARDED = LAYOUTS["DP2 distributed optimizer"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora TP2": ("lora", LAYOUTS["TP2"]),
    "boft input TP2": ("boft input", LAYOUTS["TP2"]),
    "hybrid TP2": ("hybrid", LAYOUTS["TP2"]),
    "hybrid DP2": ("hybrid", LAYOUTS["DP2 overlapped"]),
    "lora-ga paper DP2": ("lora-ga paper", LAYOUTS["DP2"]),
    "riemannian DP2": ("riemannian", SHARDED),
    "bounded TP2": ("bounded", LAYOUTS["TP2"]),
    "bounded DP2": ("bounded", SHARDED),
    "first layer PP2": ("first layer", AT_PP2),
    "first layer PP2 sharded": ("first layer", {**AT_PP2, **SHARDED}),
    "last layer PP2": ("last layer", AT_PP2),
    "frozen ones between TP2": ("frozen ones between", {"parallel": TP2, **HALF_AS_MANY}),
    "frozen ones between TP2+SP": ("frozen ones between", AT_SP),
    "tied lora PP2": ("tied lora", AT_PP2),
    "tied full PP2": ("tied full", AT_PP2),
    "tied full TP2+SP": ("tied full", AT_SP),
}
POISONED = {"PP2": AT_PP2, "DP2": HALF_AS_MANY}
BAD_RANK = 1


def disagree(asked: tuple[list[Job], Job]) -> dict[str, Any]:
    """What is said where BAD_RANK's last loss is NaN; what its signal does."""
    start_world()
    poisoned, signalled = asked
    errors = {job.name: _poisoned(job) for job in poisoned}
    return {"errors": errors, "stopped": [_signalled(signalled, "train"), _signalled(signalled, "valid")]}


def _poisoned(job: Job) -> str:
    def spoil(module: Any, inputs: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses * torch.nan

    with built(job) as (state, data):
        if dist.get_rank() == BAD_RANK:
            state.model_chunks[0].module.register_forward_hook(spoil)
        before = [parameter.detach().clone() for parameter in state.model_chunks[0].parameters()]
        try:
            train_step(state, next(iter(data.train)))
        except NonFiniteError as error:
            unchanged = all(map(torch.equal, before, state.model_chunks[0].parameters()))
            return str(error) if unchanged else "parameters were changed"
    return "no error"


def _signalled(job: Job, split: str) -> tuple[str, list[int], bool]:
    saver = RecordedSaves()
    with built(job) as (state, data):
        if dist.get_rank() == BAD_RANK:
            signal_at(getattr(data, split), state.config.global_batch_size, signal.SIGUSR1)
        return train(state, data, saver), saver.saved, state.best.was_interrupted


@pytest.fixture(scope="module")
def make(files, tmp_path_factory):
    """A job of a run, with changes of its groups."""
    folder = tmp_path_factory.mktemp("corners")
    four = [str(save_llama(folder / f"{n}", tie_word_embeddings=bool(n), intermediate_size=64)) for n in (0, 1)]

    def job(name, run, groups):
        is_corner = [*RUNS].index(run) >= [*RUNS].index("first layer")
        base = four[run.startswith("tied")] if is_corner else files[0]
        return Job(name, base, files[1], num_steps=4 if is_corner else 3, **{**RUNS[run], **groups})

    return job


@pytest.fixture(scope="module")
def found(make):
    """Reports of one process, by run, and of each of two ranks, by case."""
    with one_rank(with_groups=False):
        alone = run_each([make(run, run, ONE) for run in RUNS])
    return alone, run_ranks(2, run_jobs, [make(case, run, groups) for case, (run, groups) in CASES.items()])


@pytest.fixture(scope="module")
def differing(make, tmp_path_factory):
    """What each of two ranks tells that do not find the same."""
    save = {"save": str(tmp_path_factory.mktemp("save"))}
    signalled = make("", "tied lora", {"checkpoint": save, "training": {"micro_batch_size": 4, "eval_interval": 3}})
    return run_ranks(2, disagree, ([make(name, "tied lora", groups) for name, groups in POISONED.items()], signalled))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_does(found, case):
    """LoRA-GA's A too: its rows are singular vectors with a sign, whichever ranks hold their columns."""
    alone, by_rank = found[0][CASES[case][0]], [rank[case] for rank in found[1]]
    assert bool(alone.curve.lambdas) == case.startswith("hybrid") and alone.curve.losses[2] != alone.curve.losses[0]
    assert min(step.grad_norm for step in alone.curve.steps) > 0
    assert all(here.curve == by_rank[0].curve for here in by_rank)
    assert differences(by_rank, alone) == {}


def test_a_stop_on_one_rank_stops_all(found):
    for report in (found[0]["lora"], *(rank["lora TP2"] for rank in found[1])):
        assert [step.stop for step in report.curve.steps] == [False, True, False]


@pytest.mark.parametrize("layout", POISONED)
def test_nan_on_one_rank_stops_all_before_the_update(differing, layout):
    messages = [rank["errors"][layout] for rank in differing]
    assert messages[0] == messages[1]
    assert messages[0].startswith("iteration 1: the loss is NaN or infinite (")
    assert f"rank {BAD_RANK}, microbatch 0" in messages[0] and f"rank {1 - BAD_RANK}," not in messages[0]


def test_a_signal_to_one_rank_stops_all_after_the_same_step_or_in_the_same_validation(differing):
    expected = [("asked to stop at iteration 2", [2], False), ("asked to stop at iteration 3", [3], True)]
    assert [rank["stopped"] for rank in differing] == [expected] * 2


def test_a_run_file_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"run.yaml cannot be written \(.*\): .* another --save folder"):
        training_run._write_run_file(tmp_path / "gone" / "run.yaml", "lr: 1\n")
