"""What a method's numbers may be, and what follows from them."""

from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError, PeftConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "prefix"}, "--peft-method prefix is not one of full, lora, lora-ga, boft, urnn, hybrid"),
        ({"lora_rank": 0}, "--lora-rank is 0; it must be above 0"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0; it is a fraction"),
        ({"method": "boft", "boft_block_size": 5}, "--boft-block-size is 5; a butterfly mixes halves of a block"),
        ({"method": "urnn", "urnn_block_size": 9}, "--urnn-block-size is 9; two real features make a complex one"),
        ({"method": "hybrid", "hybrid_lambda": "fixed:2"}, "or fixed:X with X between 0 and 1"),
        ({"method": "hybrid", "hybrid_lambda_init": 0.99}, "--hybrid-lambda-init 0.99 and --hybrid-lambda-max 0.98"),
        ({"method": "hybrid", "hybrid_lambda_min": 0.0}, "--hybrid-lambda-min 0.0"),
        ({"method": "hybrid", "hybrid_merge_interval": 0}, "--hybrid-merge-interval is 0; it must be above 0"),
        ({"method": "hybrid", "rotation_side": "input"}, "turns the output side"),
        ({"target_modules": ()}, "--peft-target-modules needs at least one name"),
    ],
)
def test_numbers_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigurationError) as error:
        PeftConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "whole_matrices"),
    [
        ({"method": "boft"}, False),
        ({"method": "boft", "boft_parametrization": "projection"}, True),
        ({"method": "urnn", "urnn_update": "riemannian"}, True),
        ({"method": "urnn"}, False),
        ({"method": "hybrid", "boft_parametrization": "projection"}, True),
        ({"method": "hybrid", "hybrid_rotation": "urnn", "boft_parametrization": "projection"}, False),
        ({"method": "hybrid", "hybrid_rotation": "urnn", "urnn_update": "riemannian"}, True),
        ({"method": "lora", "boft_parametrization": "projection"}, False),
    ],
)
def test_which_steps_end_on_whole_matrices(settings, whole_matrices):
    assert PeftConfig(**settings).leaves_the_optimizer is whole_matrices


def test_scales_and_rates():
    assert PeftConfig(lora_rank=16, lora_alpha=32).lora_scale == 2
    assert PeftConfig(lora_rank=16, lora_alpha=32, lora_rs=True).lora_scale == 8
    assert PeftConfig("boft").rotation_lr(8e-3) == 8e-3
    assert PeftConfig("hybrid").rotation_lr(8e-3) == 1e-3
    assert PeftConfig("hybrid", peft_lr_rotation=5e-4).rotation_lr(8e-3) == 5e-4
