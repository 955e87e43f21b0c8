"""What contradicts a checkpoint is refused with both values; what may change may change."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_peft.checkpoint.compatible import Here, contradictions, optimizer_contradictions
from tests.checkpoint.records import SCHEDULE, SHAPE, make_config, make_record


def here(schedule=None, **changes) -> Here:
    groups = {name: changes.pop(name) for name in ("model", "peft", "optimizer") if name in changes}
    record = make_record()
    same = Here(make_config(**groups), SHAPE, record.adapted_layers, record.base_fingerprint, SCHEDULE)
    return dataclasses.replace(same, schedule={**SCHEDULE, **(schedule or {})}, **changes)


def test_the_same_run_goes_on():
    assert contradictions(make_record(), here()) == []
    assert optimizer_contradictions(make_record(), here()) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft": {"method": "full"}}, ["--peft-method lora", "--peft-method full"]),
        ({"peft": {"lora_rank": 8}}, ["--lora-rank 4", "--lora-rank 8"]),
        ({"peft": {"lora_rs": True}}, ["--lora-rs False", "--lora-rs True"]),
        (
            {"peft": {"target_modules": ("linear_fc2",)}, "adapted_layers": ("decoder.layers.0.mlp.linear_fc2",)},
            ["linear_qkv linear_proj linear_fc1 linear_fc2", "decoder.layers.0.mlp.linear_fc1"],
        ),
        ({"shape": dataclasses.replace(SHAPE, hidden_size=64)}, ["hidden_size 96 there, 64 here", "bases/base"]),
        (
            {
                "base_fingerprint": {"config.json": "12", "model.safetensors": "35"},
                "model": {"pretrained_checkpoint": "b"},
            },
            ["bases/base", "--pretrained-checkpoint b", "(model.safetensors)"],
        ),
    ],
)
def test_a_contradiction_names_both_values(changes, words):
    (message,) = contradictions(make_record(), here(**changes))
    assert "--load runs" in message
    for word in words:
        assert word in message


def test_several_contradictions_come_at_once():
    assert len(contradictions(make_record(), here(peft={"lora_rank": 8, "lora_alpha": 8}))) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"peft": {"lora_dropout": 0.5, "lora_plus_ratio": 4.0}},
        {"peft": {"target_modules": ("linear_f*1",)}},  # another pattern for the same layers
        {"base_fingerprint": None},  # the base cannot be read any more
        {"model": {"pretrained_checkpoint": "moved/elsewhere"}},
    ],
)
def test_what_may_change(changes):
    assert contradictions(make_record(), here(**changes)) == []


def test_full_fine_tuning_does_not_look_at_adapters():
    full = make_record(config=make_config(peft={"method": "full"}), adapted_layers=())
    now = here(peft={"method": "full", "lora_rank": 8}, adapted_layers=())
    assert contradictions(full, now) == []


def test_another_optimizer_is_refused():
    (message,) = optimizer_contradictions(make_record(), here(optimizer={"optimizer": "sgd"}))
    assert "--optimizer adam" in message and "--optimizer sgd" in message and "--no-load-optim" in message


def test_a_checkpoint_without_optimizer_is_refused():
    (message,) = optimizer_contradictions(make_record(schedule=None, optimizer_steps=None), here())
    assert "--no-save-optim" in message and "--no-load-optim" in message


def test_another_schedule_is_refused_unless_chosen():
    (message,) = optimizer_contradictions(make_record(), here(schedule={"max_lr": 1e-3, "lr_decay_steps": 20}))
    assert "--lr: 0.005 there, 0.001 here" in message and "--lr-decay-iters" in message
    for choice in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        chosen = here(schedule={"max_lr": 1e-3}, optimizer={choice: True})
        assert optimizer_contradictions(make_record(), chosen) == []


def test_a_longer_run_at_a_constant_rate_is_the_same_schedule():
    constant = {**SCHEDULE, "lr_decay_style": "constant"}
    longer = here(schedule={"lr_decay_style": "constant", "lr_decay_steps": 100, "wd_incr_steps": 100})
    assert optimizer_contradictions(make_record(schedule=constant), longer) == []
