"""Groups of parameters, their rates, and the schedule."""

from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.training.optimizer import build_schedule


def _rates(state):
    """The highest rate of each trained parameter."""
    names = {p: name for chunk in state.model_chunks for name, p in chunk.named_parameters()}
    groups = state.optimizer.param_groups
    return {names[parameter]: group["max_lr"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_lora_plus_gives_every_B_a_rate_of_its_own(start, ratio):
    state, _ = start(peft={"lora_rank": 4, "lora_plus_ratio": ratio}, optimizer={"lr": 1e-3})
    rates = _rates(state)
    assert len(rates) == 16
    for name, rate in rates.items():
        assert rate == pytest.approx(1e-3 * (ratio if name.endswith(".B") else 1.0)), name


def test_lora_plus_follows_the_schedule(start):
    state, _ = start(
        peft={"lora_rank": 4, "lora_plus_ratio": 8.0},
        optimizer={"lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "linear"},
    )
    state.schedule.step(2 * state.config.global_batch_size)
    assert sorted({group["lr"] for group in state.optimizer.param_groups}) == pytest.approx([5.5e-4, 4.4e-3])


def test_only_trainable_parameters_have_gradients_and_moments(start):
    state, _ = start(peft={"lora_rank": 4, "target_modules": ("linear_fc2",)})
    assert set(_rates(state)) == {
        f"module.decoder.layers.{layer}.mlp.linear_fc2.adapter.{factor}" for layer in (0, 1) for factor in "AB"
    }
    assert sum(buffer.numel_unpadded for buffer in state.model_chunks[0].buffers) == 2 * 4 * (160 + 96)


def test_norms_and_biases_of_the_base_do_not_decay(start):
    state, _ = start(peft={"method": "full"}, optimizer={"weight_decay": 0.1})
    names = {p: name for chunk in state.model_chunks for name, p in chunk.named_parameters()}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            is_matrix = not (names[parameter].endswith("bias") or "norm" in names[parameter])
            assert group["wd_mult"] == float(is_matrix), names[parameter]


def _curve(start, **optimizer):
    """The rate at the start and after each of 8 steps."""
    state, _ = start(num_steps=8, optimizer={"lr": 1.0, **optimizer})
    rates = []
    for _ in range(9):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.schedule.step(state.config.global_batch_size)
    return rates


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lr_decay_style": "constant"}, [1.0] * 9),
        ({"lr_decay_style": "linear"}, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
        ({"lr_decay_style": "linear", "lr_decay_iters": 4, "min_lr": 0.2}, [1.0, 0.8, 0.6, 0.4] + [0.2] * 5),
        (
            {"lr_decay_style": "linear", "lr_warmup_iters": 4, "lr_warmup_init": 0.2},
            [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0],
        ),
        ({"lr_decay_style": "linear", "lr_warmup_fraction": 0.25}, [0.0, 0.5] + [1 - n / 6 for n in range(7)]),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_wsd_decay_style": "linear"},
            [1.0] * 7 + [0.5, 0.0],
        ),
    ],
)
def test_the_schedule_counts_the_runs_iterations(start, settings, expected):
    assert _curve(start, **settings) == pytest.approx(expected)


def test_a_warmup_as_long_as_an_epoch_is_refused(start):
    """Only the data says how many iterations --train-epochs are."""
    state, _ = start(optimizer={"lr_warmup_iters": 3})
    with pytest.raises(ConfigurationError, match="--lr-warmup-iters 3 .* below the 3 iterations"):
        build_schedule(state.optimizer, state.config, train_iters=3)
