"""Flags of --load in a world of one; `test_load.py` loads at many layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import save_checkpoint
from megatron_peft.training.step import train_step
from tests.one_rank import one_rank
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, build


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What a run is after loading a checkpoint of iteration 1 of another, of --lr 5e-3 and LoRA+ 4."""
    folder: Path = tmp_path_factory.mktemp("load_alone")
    files = str(save_llama(folder / "base", num_hidden_layers=2)), str(save_pairs(folder / "pairs.jsonl"))

    def job(lr, checkpoint, **optimizer):
        peft = {"lora_rank": 4, "lora_plus_ratio": 4.0}
        settings = {"lr": lr, "lr_decay_style": "constant", **optimizer}
        return build(Job("", *files, peft=peft, optimizer=settings, checkpoint=checkpoint).config(1))

    def load(lr=5e-3, optimizer=None, **flags):
        state, _ = job(lr, {"load": str(folder / "runs"), **flags}, **(optimizer or {}))
        assert load_checkpoint(state)
        return state

    with one_rank():
        state, data = job(5e-3, {"save": str(folder / "runs")})
        train_step(state, next(iter(data.train)))
        state.position.iteration, state.position.consumed_samples = 1, 8
        save_checkpoint(state)
        yield load


@pytest.mark.parametrize("finetune, position", [(False, (1, 8)), (True, (0, 0))])
def test_finetune_begins_at_the_beginning(loaded, finetune, position):
    state = loaded(finetune=finetune)
    assert (state.position.iteration, state.position.consumed_samples) == position


@pytest.mark.parametrize(
    "flag, rates",
    [("use_checkpoint_opt_param_scheduler", [5e-3, 20e-3]), ("override_opt_param_scheduler", [1e-3, 4e-3])],
)
def test_whichever_rate_is_taken_that_of_B_is_four_times_as_high(loaded, flag, rates):
    state = loaded(lr=1e-3, optimizer={flag: True})
    assert sorted(group["lr"] for group in state.optimizer.param_groups) == pytest.approx(rates)
