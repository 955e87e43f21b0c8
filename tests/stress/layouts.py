"""How far losses and gradient norms at every layout are from one process's: all methods, 20 steps, by hand.

    python tests/stress/layouts.py                  every method of the layout test at every layout
    python tests/stress/layouts.py hybrid lora      these two
    python tests/stress/layouts.py --base bloom     on a Bloom

`tests/training/test_layout.py` holds the same runs, shorter and not all of them, to its bounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.ranks import run_ranks
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import NUM_STEPS, Curve, run_jobs
from tests.training.test_layout import METHODS, ON_FOUR_RANKS, ON_TWO_RANKS, REFUSED, layout_job

BASES = {"llama": save_llama, "bloom": save_bloom}
TIMEOUT_SECONDS = 3600.0
WORLDS = ((1, {"alone": {}}), (2, ON_TWO_RANKS), (4, ON_FOUR_RANKS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--base", choices=BASES, default="llama")
    arguments = parser.parse_args()
    methods = arguments.methods or list(METHODS)
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        curves = _all_curves(methods, BASES[arguments.base], Path(folder))
    print(f"{NUM_STEPS} steps; largest relative difference from one process")
    print(f"{'':42}{'loss':>12}{'grad norm':>12}{'validation':>12}{'lambda':>12}")
    for name in (name for name in curves if not name.endswith(" alone")):
        apart = _apart(curves[name], curves[f"{name.split()[0]} alone"])
        print(f"{name:42}" + "".join(f"{value:12.1e}" for value in apart.values()), flush=True)
        worst |= {key: max(value, worst.get(key, 0.0)) for key, value in apart.items()}
    print(f"{'largest':42}" + "".join(f"{value:12.1e}" for value in worst.values()))


def _all_curves(methods: list[str], save: Callable[[Path], Path], folder: Path) -> dict[str, Curve]:
    base, data = str(save(folder / "base")), str(save_pairs(folder / "pairs.jsonl"))
    curves: dict[str, Curve] = {}
    for num_ranks, layouts in WORLDS:
        jobs = [
            _long(layout_job(method, name, layouts[name], base, data))
            for method in methods
            for name in layouts
            if (method, name) not in REFUSED
        ]
        curves |= run_ranks(num_ranks, run_jobs, jobs, limit=TIMEOUT_SECONDS)[0]
    return curves


def _long(job):
    return dataclasses.replace(job, training={**job.training, "train_iters": NUM_STEPS})


def _apart(here: Curve, alone: Curve) -> Mapping[str, float]:
    pairs = {name: (getattr(here, name), getattr(alone, name)) for name in ("losses", "grad_norms", "validation_loss")}
    if alone.lambdas:
        pairs["lambdas"] = [here.lambdas[layer] for layer in alone.lambdas], list(alone.lambdas.values())
    return {name: float(np.max(np.abs(np.divide(*pair) - 1))) for name, pair in pairs.items()}


if __name__ == "__main__":
    main()
