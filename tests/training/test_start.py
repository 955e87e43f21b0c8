"""When LoRA-GA's start runs, on what, and what it leaves."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_peft.checkpoint.folders import RECORD
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import save_checkpoint
from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.launch import seed_generators
from megatron_peft.training import start as start_module
from megatron_peft.training.start import first_steps
from megatron_peft.training.start_report import START_FILE
from megatron_peft.training.step import train_step

PEFT = {"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 2}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}


def _adapters(state):
    return {n: x.clone() for c in state.model_chunks for n, x in c.module.state_dict().items() if ".adapter." in n}


def test_it_says_what_it_found_and_writes_it_beside_the_metrics(start, tmp_path, capsys):
    start(peft=PEFT, checkpoint={"save": str(tmp_path)})
    said = capsys.readouterr().out
    assert "LoRA-GA start: pass 1 of 2 over 2 batches done" in said
    assert "LoRA-GA start: pass 2 of 2 over 2 batches done" in said
    assert said.count("2 layers   mean ") == 4, "four kinds of layers, two of each"
    assert len(json.loads((tmp_path / START_FILE).read_text())["energy"]) == 8


def test_it_sees_the_first_batches_and_the_run_begins_with_them_again(start, monkeypatch):
    seen = []
    run = start_module.run_schedule
    monkeypatch.setattr(start_module, "run_schedule", lambda *a, **k: (seen.append(a[1]), run(*a, **k))[1])
    _, data = start(peft=PEFT)
    first, second, *_ = (step for _, step in zip(range(2), data.train, strict=False))
    tokens = [
        torch.cat([microbatch.tokens.flatten() for microbatch in step]).tolist() for step in [*seen, first, second]
    ]
    assert len(seen) == 4
    assert tokens[0] == tokens[2] == tokens[4] and tokens[1] == tokens[3] == tokens[5]


def test_too_few_samples_are_told(start):
    with pytest.raises(ConfigurationError) as error:
        start(peft={**PEFT, "lora_ga_batches": 6})
    assert str(error.value) == (
        "--lora-ga-batches 6 of --global-batch-size 8 are 48 samples, but the training data has 40: "
        "use at most 5, or a smaller --global-batch-size."
    )
    with pytest.raises(ConfigurationError, match="has 40: use a smaller --global-batch-size"):
        start(peft=PEFT, training={"global_batch_size": 48, "micro_batch_size": 2})


@pytest.mark.parametrize("method", ["lora", "boft"])
def test_other_methods_have_no_start(start, job, method, capsys):
    peft = {"method": method, "lora_rank": 4, "boft_block_size": 2, "boft_factors": 2}
    _, data = start(peft=peft)
    assert first_steps(job(peft=peft).config(1), data.train) == ()
    assert "LoRA-GA start" not in capsys.readouterr().out


@pytest.mark.parametrize("init", ["aligned", "original"])
def test_a_resumed_run_does_not_start_again(start, tmp_path, capsys, init):
    peft = {**PEFT, "lora_ga_init": init}
    state, data = start(peft=peft, checkpoint={"save": str(tmp_path)})
    train_step(state, next(iter(data.train)))
    state.position.iteration = 1
    save_checkpoint(state)
    capsys.readouterr()
    second, _ = start(peft=peft, checkpoint={"load": str(tmp_path)})
    assert "LoRA-GA start" not in capsys.readouterr().out
    assert load_checkpoint(second)
    before, after = _adapters(state), _adapters(second)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    frozen = [name for name in before if name.endswith((".A0", ".B0"))]
    assert len(frozen) == (16 if init == "original" else 0)
    assert all(before[name].any() for name in frozen)
    assert (tmp_path / "iter_0000001" / RECORD).exists()


def test_dropout_is_that_of_a_run_without_a_start(start, monkeypatch):
    """Both passes drop the same, so they see one gradient; and the run's first step drops what LoRA's would."""
    seed_generators(1234)
    start(peft={"lora_rank": 4}, transformer=DROPOUT)
    expected, states = torch.rand(3), []
    run = start_module.run_schedule
    monkeypatch.setattr(
        start_module, "run_schedule", lambda *a, **k: (states.append(torch.get_rng_state()), run(*a, **k))[1]
    )
    start(peft=PEFT, transformer=DROPOUT)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])
    assert not torch.equal(states[0], states[1])
