"""Counts of the whole model and the lines that a run begins with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_peft.training.summary import count_parameters, rank_bytes, say, training_summary

NAMES = [f"decoder.layers.{layer}.mlp.linear_fc{n}" for layer in (0, 1) for n in (1, 2)]
LORA = 2 * 4 * ((96 + 200) + (120 + 96) + (96 + 320) + (160 + 96))  # layers x rank x (in + out) of each linear layer


def _chunks(state):
    return [chunk.module for chunk in state.model_chunks]


@pytest.fixture
def state(start):
    return start()[0]


def test_trainable_parameters_are_the_adapters(state):
    assert count_parameters(_chunks(state)).trainable == LORA


def test_all_are_trainable_in_full_fine_tuning(start):
    counts = count_parameters(_chunks(start(peft={"method": "full"})[0]))
    assert counts.trainable == counts.total
    assert counts.total == count_parameters(_chunks(start()[0])).total - LORA


def test_the_lines_name_what_is_adapted(state):
    counts = count_parameters(_chunks(state))
    first, second, third = training_summary(state.config, NAMES, counts, _chunks(state)).splitlines()
    assert first == "--peft-method lora: 4 layers: linear_fc1 (2), linear_fc2 (2)"
    assert second == f"trainable parameters: {LORA:,} of {counts.total:,} ({100 * LORA / counts.total:.3f}%)"
    assert third.startswith("bytes on this rank: weights ")


def test_part_of_a_fused_layer_is_said_to_be_adapted_whole(start):
    state, _ = start(peft={"lora_rank": 4, "target_modules": ("q_proj", "down_proj")})
    text = training_summary(state.config, NAMES, count_parameters(_chunks(state)), _chunks(state))
    assert "note: q_proj is part of linear_qkv, which is adapted whole" in text
    assert "down_proj is part" not in text


def test_a_discarded_weight_is_said_loudly(state):
    peft = replace(state.config.peft, method="urnn", urnn_mode="replace")
    counts = count_parameters(_chunks(state))
    lines = training_summary(replace(state.config, peft=peft), NAMES, counts, _chunks(state)).splitlines()
    assert lines[1].startswith("WARNING: --urnn-mode replace DISCARDS the pretrained weights")


def test_full_fine_tuning_says_so(start):
    state, _ = start(peft={"method": "full"})
    text = training_summary(state.config, [], count_parameters(_chunks(state)), _chunks(state))
    assert text.startswith("--peft-method full: every parameter of the model\n")


@pytest.mark.parametrize(
    "settings, moments",
    [({}, 2), ({"optimizer": {"optimizer": "sgd"}}, 1), ({"model": {"bf16": True}}, 3)],
    ids=["adam", "sgd", "bf16"],
)
def test_bytes_of_weights_gradients_and_optimizer(start, settings, moments):
    state, _ = start(**settings)
    weights, gradients, optimizer = rank_bytes(state.config, _chunks(state))
    element = 2 if "model" in settings else 4
    assert weights == element * count_parameters(_chunks(state)).total
    assert (gradients, optimizer) == (4 * LORA, 4 * LORA * moments)


def test_rank_0_speaks(alone, capsys):
    say("hello")
    assert capsys.readouterr().out == "hello\n"
