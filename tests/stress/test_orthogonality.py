"""Rotations that are trained in bfloat16 for long stay orthogonal: no entry of |R^T R - I| is above the limit."""

import itertools

import pytest

from megatron_peft.training.step import ORTHOGONALITY_LIMIT, largest_orthogonality_error, train_step
from tests.one_rank import one_rank
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, build

ROTATIONS = {
    "boft": {"method": "boft", "peft_lr_rotation": 1e-3},
    "projection": {"method": "boft", "boft_parametrization": "projection", "peft_lr_rotation": 1e-3},
    "urnn": {"method": "urnn", "peft_lr_rotation": 3e-3},
    "riemannian": {"method": "urnn", "urnn_update": "riemannian", "peft_lr_rotation": 0.1},
}
SIZES = {"boft_block_size": 2, "boft_factors": 2, "urnn_block_size": 4}
NUM_STEPS = 250


@pytest.mark.slow
@pytest.mark.parametrize("peft", ROTATIONS.values(), ids=ROTATIONS.keys())
def test_rotations_are_orthogonal_after_many_steps(tmp_path, peft):
    base, data = save_llama(tmp_path / "base", num_hidden_layers=2), save_pairs(tmp_path / "pairs.jsonl")
    settings = {"model": {"bf16": True}, "training": {"global_batch_size": 2}, "num_steps": NUM_STEPS}
    with one_rank():
        state, batches = build(Job("", str(base), str(data), peft={**peft, **SIZES}, **settings).config(1))
        losses = [train_step(state, step).loss for step in itertools.islice(iter(batches.train), NUM_STEPS)]
        assert sum(losses[-20:]) < sum(losses[:20])
        assert 0 < largest_orthogonality_error(state) < ORTHOGONALITY_LIMIT
