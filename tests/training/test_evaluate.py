"""Validation: a mean over tokens, without dropout and without a recorded graph."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.training.evaluate import validation_loss


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
def test_it_is_the_mean_over_the_tokens_of_all_samples(start, micro_batch_size):
    """40 samples in steps of 9: the last step is filled up with padding."""
    state, data = start(training={"micro_batch_size": micro_batch_size, "global_batch_size": 9})
    assert validation_loss(state.model_chunks, data.valid) == pytest.approx(_by_hand(state, data), rel=1e-6)


def test_it_begins_anew_each_time(start):
    state, data = start()
    assert validation_loss(state.model_chunks, data.valid) == validation_loss(state.model_chunks, data.valid)


def test_dropout_is_off_and_on_again_afterwards(start):
    plain, _ = start()
    state, data = start(peft={"lora_rank": 4, "lora_dropout": 0.5}, transformer={"hidden_dropout": 0.5})
    loss = validation_loss(state.model_chunks, data.valid)
    assert loss == validation_loss(plain.model_chunks, data.valid)
    assert all(chunk.training for chunk in state.model_chunks)


def test_nothing_is_kept_for_a_backward(start):
    state, data = start()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        validation_loss(state.model_chunks, data.valid)
    assert kept == []


def test_without_samples_it_is_zero(start):
    state, _ = start()
    assert validation_loss(state.model_chunks, []) == 0.0
