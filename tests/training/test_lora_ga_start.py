"""LoRA-GA's start: when it runs, on which batches, and what it prints and writes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_peft.checkpoint.folders import RECORD
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.runtime.launch import seed_generators, start_world, stop
from megatron_peft.training import run as start_module
from megatron_peft.training.run import START_FILE, first_steps, start_report
from megatron_peft.training.step import train_step
from tests.ranks import run_ranks

PEFT = {"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 2}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}


@pytest.fixture
def passes(monkeypatch):
    """Of the start's forwards and backwards: (microbatches, state of the generator before them)."""
    seen = []
    run = start_module.run_schedule

    def recorded(chunks, microbatches, **settings):
        seen.append((microbatches, torch.get_rng_state()))
        return run(chunks, microbatches, **settings)

    monkeypatch.setattr(start_module, "run_schedule", recorded)
    return seen


def _adapters(state):
    return {n: x.clone() for c in state.model_chunks for n, x in c.module.state_dict().items() if ".adapter." in n}


def test_the_start_is_printed_and_written_beside_the_metrics(start, tmp_path, capsys):
    start(peft=PEFT, checkpoint={"save": str(tmp_path)})
    said = capsys.readouterr().out
    assert all(f"LoRA-GA start: pass {n} of 2 over 2 batches done" in said for n in (1, 2))
    rows = [line.split()[:2] for line in said.splitlines() if line.startswith("  linear_")]
    assert rows == [[kind, "2"] for kind in ("linear_fc1", "linear_fc2", "linear_proj", "linear_qkv")]
    assert len(json.loads((tmp_path / START_FILE).read_text())["energy"]) == 8


def test_the_start_uses_the_first_batches_and_training_repeats_them(start, passes):
    _, data = start(peft=PEFT)
    seen = [step for step, _ in passes]
    rows, trained = [], [step for _, step in zip(range(2), data.train, strict=False)]
    for steps in (seen[: len(seen) // 2], seen[len(seen) // 2 :], trained):
        pairs = [pair for step in steps for one in step for pair in zip(one.labels, one.loss_mask, strict=True)]
        rows.append(sorted(row[counts > 0].tolist() for row, counts in pairs))
    assert rows[0] == rows[1] == rows[2]


def test_small_samples_share_a_microbatch_but_where_the_stages_expect_one_size(start, passes):
    settings = {"global_batch_size": 8, "micro_batch_size": 1}
    for fixed, number in ((False, 2), (True, 16)):
        passes.clear()
        start(peft=PEFT, training=settings, data_settings={"pad_to_seq_length": fixed})
        assert sum(len(step) for step, _ in passes) == 2 * number


def test_too_few_samples_are_an_error(start):
    told = "^--lora-ga-batches 6 of --global-batch-size 8 are 48 samples, but .* has 40: use at most 5, or a smaller"
    with pytest.raises(ConfigurationError, match=told):
        start(peft={**PEFT, "lora_ga_batches": 6})
    with pytest.raises(ConfigurationError, match="has 40: use a smaller --global-batch-size"):
        start(peft=PEFT, training={"global_batch_size": 48, "micro_batch_size": 2})


@pytest.mark.parametrize("init", ["aligned", "original"])
def test_a_resumed_run_does_not_start_again(start, tmp_path, capsys, init):
    peft = {**PEFT, "lora_ga_init": init}
    state, data = start(peft=peft, checkpoint={"save": str(tmp_path)})
    train_step(state, next(iter(data.train)))
    state.position.iteration, state.position.consumed_samples = 1, state.config.global_batch_size
    draft_checkpoint(state).complete()
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


def _steps_where_another_rank_sees_an_older_folder(has_checkpoint):
    start_world("gloo")
    sees = has_checkpoint == (dist.get_rank() == 0)
    start_module.folders.newest_checkpoint = lambda folder: folder if sees else None
    of: Any = SimpleNamespace
    config = of(peft=PeftConfig(**PEFT), checkpoint=of(load="runs/a"), global_batch_size=2)
    train = of(order=of(epoch_length=lambda _: 0))  # a start fails: there are no samples
    try:
        return len(first_steps(config, train))
    except ConfigurationError:
        return "starts"
    finally:
        stop()


@pytest.mark.parametrize(("has_checkpoint", "expected"), [(True, 0), (False, "starts")])
def test_the_first_rank_decides_whether_to_start(has_checkpoint, expected):
    assert run_ranks(2, _steps_where_another_rank_sees_an_older_folder, has_checkpoint) == [expected] * 2


def test_dropout_is_that_of_a_run_without_a_start(start, passes):
    """Both passes drop the same, so they see one gradient; and the run's first step drops what LoRA's would."""
    seed_generators(1234)
    state, data = start(peft={"lora_rank": 4}, transformer=DROPOUT)
    assert passes == [] and first_steps(state.config, data.train) == ()
    expected = torch.rand(3)
    start(peft=PEFT, transformer=DROPOUT)
    assert torch.equal(torch.rand(3), expected)
    first, second = (state for _, state in passes)
    assert torch.equal(first, second)


BY_MODULE = {"mlp.linear_fc2": [0.5, 0.75, 1.0], "self_attention.linear_qkv": [0.25, 0.125, 0.5]}
ENERGY = {
    f"decoder.layers.{layer}.{module}": energy
    for module, energies in BY_MODULE.items()
    for layer, energy in zip((9, 10, 11), energies, strict=True)
}
START = PeftConfig("lora-ga", lora_rank=4, lora_ga_batches=2)


def report_of(save: str | None) -> str:
    config: Any = SimpleNamespace(peft=START, checkpoint=SimpleNamespace(save=save))
    return start_report(config, 12.34, ENERGY)


def test_a_line_for_each_kind_of_layer_and_each_layers_number_in_a_file_if_there_is_a_folder(tmp_path):
    lines = report_of(str(tmp_path)).splitlines()
    assert lines[0] == "LoRA-GA start (aligned) took 12.3 s; the gradient's squared norm in rank 4:"
    assert lines[1].split() == ["layers", "mean", "lowest", "(layer)", "highest", "(layer)"]
    assert lines[2].split() == ["linear_fc2", "3", "0.750", "0.500", "(9)", "1.000", "(11)"]
    assert lines[3].split() == ["linear_qkv", "3", "0.292", "0.125", "(10)", "0.500", "(11)"]
    assert max(map(len, lines[:4])) <= 80
    assert lines[4:] == [f"  each layer: {tmp_path / START_FILE}"]
    for nowhere in (None, str(tmp_path / "missing")):
        assert report_of(nowhere).splitlines() == lines[:4]
    record = json.loads((tmp_path / START_FILE).read_text())
    assert record["energy"] == ENERGY
    assert list(record["energy"])[:2] == [f"decoder.layers.9.{module}" for module in BY_MODULE]
    assert (record["lora_ga_init"], record["lora_rank"], record["lora_ga_batches"]) == ("aligned", 4, 2)
