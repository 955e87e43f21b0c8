"""How far rotations are from orthogonal after many steps of training in bfloat16: every kind of rotation, by hand.

    python tests/stress/orthogonality.py                 1,000 steps each
    python tests/stress/orthogonality.py --steps 5000

A small Llama, the float32 blocks, the largest entry of |R^T R - I|. The bound is 1e-5.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_peft.training.health import ORTHOGONALITY_LIMIT, largest_orthogonality_error
from megatron_peft.training.step import train_step
from tests.one_rank import one_rank
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, build

KINDS = {
    "boft": {"method": "boft", "peft_lr_rotation": 1e-3},
    "boft, projection": {"method": "boft", "boft_parametrization": "projection", "peft_lr_rotation": 1e-3},
    "urnn": {"method": "urnn", "peft_lr_rotation": 3e-3},
    "urnn, riemannian": {"method": "urnn", "urnn_update": "riemannian", "peft_lr_rotation": 0.1},
}
SIZES = {"boft_block_size": 2, "boft_factors": 2, "urnn_block_size": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    num_steps = parser.parse_args().steps
    errors = {}
    with tempfile.TemporaryDirectory() as folder, one_rank():
        base, data = save_llama(Path(folder, "base"), num_hidden_layers=2), save_pairs(Path(folder, "pairs.jsonl"))
        for name, peft in KINDS.items():
            settings = {"model": {"bf16": True}, "training": {"global_batch_size": 2}, "num_steps": num_steps}
            losses, errors[name] = _trained(Job(name, str(base), str(data), peft={**peft, **SIZES}, **settings))
            loss = f"loss {sum(losses[:20]) / 20:.3f} -> {sum(losses[-20:]) / 20:.3f}"
            print(f"{name:20} after {num_steps} steps: {loss}, error {errors[name]:.1e}", flush=True)
    sys.exit(any(error > ORTHOGONALITY_LIMIT for error in errors.values()))


def _trained(job: Job) -> tuple[list[float], float]:
    """(losses, error at the end)"""
    state, data = build(job.config(1))
    losses = [train_step(state, step).loss for step in itertools.islice(iter(data.train), job.num_steps)]
    error = largest_orthogonality_error(state)
    assert error is not None
    return losses, error


if __name__ == "__main__":
    main()
