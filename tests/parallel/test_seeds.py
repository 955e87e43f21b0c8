from __future__ import annotations

import torch

from megatron_peft.parallel.seeds import generator_for

NAME = "decoder.layers.0.mlp.linear_fc1.adapter.A"
SEED_OF_1234 = 1419924274430239179


def _draw(seed, name):
    return torch.randn(8, generator=generator_for(seed, name)).tolist()


def test_the_same_seed_and_name_give_the_same_numbers():
    assert _draw(1, NAME) == _draw(1, NAME)


def test_another_seed_or_name_gives_others():
    assert len({tuple(_draw(seed, name)) for seed in (1, 2) for name in (NAME, NAME.replace("0", "1"))}) == 4


def test_seed_and_name_do_not_run_into_each_other():
    assert _draw(1, "2x") != _draw(12, "x")


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(0)
    before, drawn = torch.get_rng_state(), _draw(1, NAME)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert _draw(1, NAME) == drawn


def test_a_run_can_be_repeated_by_a_later_version():
    assert generator_for(1234, NAME).initial_seed() % 2**64 == SEED_OF_1234
