"""--hybrid-merge-interval: the change is in the weight, and everything about it starts again."""

from __future__ import annotations

import pytest

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.config import ConfigurationError
from megatron_peft.training.evaluate import validation_loss
from megatron_peft.training.folding import fold_if_due
from megatron_peft.training.mixture import hybrid_adapters
from megatron_peft.training.step import train_step

PEFT = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 1, "boft_block_size": 2, "boft_factors": 2}


def trained(start, num_steps, interval, **settings):
    state, data = start(peft={**PEFT, "hybrid_merge_interval": interval, **settings})
    steps = iter(data.train)
    for _ in range(num_steps):
        train_step(state, next(steps))
        state.position.iteration += 1
    return state, data, steps


@pytest.mark.parametrize("settings", [{}, {"lora_ga_init": "paper"}, {"hybrid_rotation": "urnn", "urnn_block_size": 4}])
def test_folding_keeps_the_function_and_takes_the_change_back_to_zero(start, settings):
    state, data, _ = trained(start, 3, interval=4, **settings)
    before = validation_loss(state.model_chunks, data.valid)
    weights = {layer.name: layer.module.weight.clone() for layer in linear_layers(state.model_chunks[0])}
    fold_if_due(state)
    assert validation_loss(state.model_chunks, data.valid) == pytest.approx(before, rel=1e-5)
    for layer in linear_layers(state.model_chunks[0]):
        adapter = layer.module.adapter
        assert (layer.module.weight - weights[layer.name]).abs().max() > 1e-4
        assert (adapter.rotation.changes() == 0).all() and adapter.low_rank.delta_weight().abs().max() < 1e-7
        assert adapter.folded_weight.data_ptr() == layer.module.weight.data_ptr()
    moments = [moment for moments in state.optimizer.optimizer.state.values() for moment in moments.values()]
    assert moments and all((moment == 0).all() for moment in moments)


def test_it_folds_at_the_interval_only(start):
    for num_steps, folded in ((1, False), (2, True), (3, False)):
        state, _, _ = trained(start, num_steps, interval=2)
        adapters = hybrid_adapters(state).values()
        assert all((adapter.low_rank.B == 0).all() == folded for adapter in adapters)


def test_lambda_and_training_go_on(start):
    state, data, steps = trained(start, 2, interval=2)
    assert {float(adapter.mix) for adapter in hybrid_adapters(state).values()} != {0.5}
    before = validation_loss(state.model_chunks, data.valid)
    for _ in range(2):
        train_step(state, next(steps))
        state.position.iteration += 1
    assert validation_loss(state.model_chunks, data.valid) < before


def test_weights_that_cannot_be_kept_in_float32_are_refused(job):
    with pytest.raises(ConfigurationError, match="folds changes into weights .* --bf16 does not"):
        job(peft={**PEFT, "hybrid_merge_interval": 2}, model={"bf16": True}).config(1)


def test_parameters_that_are_gathered_late_are_not_folded(job):
    late = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    with pytest.raises(ConfigurationError, match="--hybrid-merge-interval folds parameters in as a step ends"):
        job(peft={**PEFT, "hybrid_merge_interval": 2}, optimizer=late, training={"overlap_grad_reduce": True}).config(1)


def test_without_the_flag_no_weight_is_in_the_checkpoint(start):
    state, _ = start(peft=PEFT)
    assert all(adapter.folded_weight is None for adapter in hybrid_adapters(state).values())
    assert not any("folded" in name for name, _ in state.model_chunks[0].named_buffers())
