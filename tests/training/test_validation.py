"""Validation loss is a mean over tokens; adapters without gradient and drifting rotations are detected."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.training import loop
from megatron_peft.training.loop import train
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.step import (
    ORTHOGONALITY_LIMIT,
    inference_mode,
    largest_orthogonality_error,
    layers_without_gradient,
    train_step,
    validation_loss,
)
from tests.kept import kept_for_backward
from tests.training.recorded_saves import RecordedSaves

GROUPS_OF_FOUR = {"boft_block_size": 2, "boft_factors": 2, "urnn_block_size": 4}
METHODS = {
    "lora": {},
    "lora-ga": {"lora_ga_init": "paper"},
    "boft": {"boft_parametrization": "projection"},
    "urnn": {"urnn_update": "riemannian"},
    "hybrid": {"hybrid_lambda": "fixed:0"},
}


def peft(method, **settings):
    return {"peft": {"method": method, "lora_rank": 4, "lora_ga_batches": 1, **GROUPS_OF_FOUR, **settings}}


@pytest.mark.parametrize("method", METHODS)
def test_every_adapted_layer_has_a_gradient_after_the_first_backward(start, method):
    state, data = start(**peft(method, **METHODS[method]))
    train_step(state, next(iter(data.train)))
    assert layers_without_gradient(state) == []


def test_a_layer_that_is_cut_off_is_named_in_a_run(start, tmp_path, capsys):
    state, data = start(**peft("lora"), checkpoint={"save": str(tmp_path)})
    assert largest_orthogonality_error(state) is None
    layer = next(layer for layer in linear_layers(state.model_chunks[0]) if layer.name.endswith("1.mlp.linear_fc2"))
    layer.module.adapter.forward = lambda x, call: call.reduce(torch.nn.functional.linear(x, call.weight))
    train(state, data, RecordedSaves())
    said = capsys.readouterr().out
    assert said.count("WARNING: 1 adapted layers have no gradient after the first step") == 1 and layer.name in said


@pytest.mark.parametrize("method", ["boft", "urnn", "hybrid"])
def test_orthogonality_is_recorded_with_validation(start, tmp_path, method, capsys):
    groups = {"training": {"eval_interval": 2}, "checkpoint": {"save": str(tmp_path)}}
    state, data = start(**peft(method, peft_lr_rotation=1e-2), **groups)
    train(state, data, RecordedSaves())
    records = read_metrics(tmp_path / METRICS_FILE)
    errors = [record.get("orthogonality_error") for record in records if "validation_loss" in record]
    assert len(errors) == 2 and all(0 < error < ORTHOGONALITY_LIMIT for error in errors)
    assert "WARNING" not in capsys.readouterr().out


def test_a_rotation_that_drifts_gives_a_warning(start, tmp_path, capsys):
    state, data = start(**peft("boft", boft_parametrization="projection"), checkpoint={"save": str(tmp_path)})
    assert largest_orthogonality_error(state) == 0
    for layer in linear_layers(state.model_chunks[0]):
        layer.module.adapter.project = lambda: None
    train(state, data, RecordedSaves())
    assert largest_orthogonality_error(state) > ORTHOGONALITY_LIMIT
    assert "away from orthogonal, above 1e-05: lower --peft-lr-rotation" in capsys.readouterr().out


def test_a_rotation_of_which_one_number_is_nan_gives_a_warning(start, tmp_path, capsys, monkeypatch):
    state, data = start(**peft("boft"), num_steps=1, checkpoint={"save": str(tmp_path)})
    monkeypatch.setattr(loop.step, "largest_orthogonality_error", lambda state: math.nan)
    train(state, data, RecordedSaves())
    assert "a rotation is nan away from orthogonal" in capsys.readouterr().out


def _by_hand(state, data):
    model, total, count = state.model_chunks[0], 0.0, 0.0
    with torch.no_grad():
        for sample in range(len(data.valid.dataset)):
            (microbatch,) = data.valid.step_at(sample)[:1]
            losses = model(microbatch.tokens[:1], microbatch.position_ids[:1], None, labels=microbatch.labels[:1])
            total += (losses * microbatch.loss_mask[:1]).sum().item()
            count += microbatch.loss_mask[:1].sum().item()
    return total / count


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_validation_loss_is_the_mean_over_the_tokens_of_all_samples(start, micro_batch_size):
    """40 samples in steps of 9: the last step is filled up with padding."""
    training = {"micro_batch_size": micro_batch_size, "global_batch_size": 9, "eval_iters": None}
    state, data = start(training=training)
    assert validation_loss(state.model_chunks, data.valid) == pytest.approx(_by_hand(state, data), rel=1e-6)


def test_dropout_is_off_in_validation_and_its_samples_are_the_same_each_time(start):
    plain, _ = start()
    state, data = start(peft={"lora_rank": 4, "lora_dropout": 0.5}, transformer={"hidden_dropout": 0.5})
    loss = validation_loss(state.model_chunks, data.valid)
    assert loss == validation_loss(plain.model_chunks, data.valid) == validation_loss(state.model_chunks, data.valid)
    assert all(chunk.training for chunk in state.model_chunks)


def test_all_chunks_train_on_after_a_validation():
    chunks: list = [torch.nn.Dropout(), torch.nn.Dropout()]
    for chunk in chunks:
        chunk.ddp_config = SimpleNamespace(overlap_param_gather=False)
    with inference_mode(chunks):
        assert not any(chunk.training for chunk in chunks)
    assert all(chunk.training for chunk in chunks)


def test_nothing_is_kept_for_a_backward_and_without_samples_it_is_zero(start):
    state, data = start()
    with kept_for_backward() as kept:
        validation_loss(state.model_chunks, data.valid)
    assert kept == [] and validation_loss(state.model_chunks, []) == 0.0
