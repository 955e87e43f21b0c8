"""Writes what `megatron-peft plan` finds of the recipes into their heads.

    python -m tools.recipe_plans [NAME ...]

A plan is made from a recipe's flags, its model's configuration (examples/models) and a cluster's file. The digest
of these stands beside the figures, and a test compares it: whoever changes one of them plans anew.
"""

import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from textwrap import TextWrapper

from megatron_peft.cli.parser import read_config
from megatron_peft.config import RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.plan.cluster import SHIPPED, Cluster, read_cluster

ROOT = Path(__file__).parents[1]
RECIPES, MODELS = ROOT / "examples" / "recipes", ROOT / "examples" / "models"
CLUSTER = "8xa100"
ON_A_CPU = ("laptop-cpu",)  # of which a plan knows the memory, but not the time
# The end of a recipe's opening comment.
WRAPPED = TextWrapper(119, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False)
PLAN = re.compile(r"^# plan \(make recipe-plans\): .*\n(?:# .*\n)*?# plan of ([0-9a-f]{16})\n", re.MULTILINE)


def recipe_names() -> list[str]:
    """Of the files in examples/recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def digest(name: str) -> str:
    """Of all that a recipe's plan is made from."""
    parts = [PLAN.sub("", (RECIPES / f"{name}.yaml").read_text()), (MODELS / name / "config.json").read_text()]
    if name not in ON_A_CPU:
        parts.append(SHIPPED[CLUSTER].read_text())
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def stated(name: str) -> tuple[str, str] | None:
    """The figures in a recipe's head and the digest of what they were made from; None: there are none."""
    found = PLAN.search((RECIPES / f"{name}.yaml").read_text())
    return (_words(found[0].partition("# plan of")[0]), found[1]) if found else None


def _words(comment: str) -> str:
    lines = [line.removeprefix("# ") for line in comment.splitlines()]
    return " ".join(lines).removeprefix("plan (make recipe-plans): ")


def recipe(name: str) -> RunConfig:
    """The recipe in the world that it is for, with its model's configuration."""
    file = RECIPES / f"{name}.yaml"
    ranks = re.search(r"^(?:# ranks|nproc-per-node): (\d+)$", file.read_text(), re.MULTILINE)
    assert ranks, f"{file} does not say how many ranks it is for"
    words = [f"--config={file}", f"--pretrained-checkpoint={MODELS / name}"]
    words += ["--train-data-path=train.jsonl", "--save=runs/x"]  # which the batch script adds
    return read_config(words, {"WORLD_SIZE": ranks[1]}, read_shape)


def figures(name: str, cluster: Cluster) -> str:
    """What a plan finds of a recipe, in a line or two."""
    from megatron_peft.plan.plan import make_plan

    config = recipe(name)
    assert config.model.pretrained_checkpoint is not None
    plan = make_plan(config, read_shape(config.model.pretrained_checkpoint), cluster)
    peak = f"at most {plan.fullest.highest_peak / 2**30:.1f} GiB a rank (rank {plan.fullest.rank})"
    assert plan.problem is None, plan.problem
    if name in ON_A_CPU or plan.speed is None:
        return f"{peak}, without what Python and torch take themselves."
    assert plan.fits, f"{name}: {peak} does not fit {cluster.usable_bytes / 2**30:.1f} GiB"
    speed = plan.speed
    return (
        f"{peak} of {cluster.usable_bytes / 2**30:.1f} that an A100-80GB has to give; "
        f"{speed.time.seconds:.1f} s a step, {float(f'{speed.tokens_per_second:.3g}'):,.0f} tokens/s, "
        f"{speed.mfu:.0%} MFU (estimated)."
    )


def write(name: str, found: str) -> None:
    """Put the figures behind a recipe's opening comment, in place of older ones."""
    file = RECIPES / f"{name}.yaml"
    text = PLAN.sub("", file.read_text())
    head, blank, rest = text.partition("\n\n")
    lines = WRAPPED.fill(f"plan (make recipe-plans): {found}")
    file.write_text(f"{head}\n{lines}\n# plan of {'0' * 16}\n{blank[1:]}{rest}")
    file.write_text(file.read_text().replace("0" * 16, digest(name)))


def main(names: Sequence[str]) -> int:
    """Plan the named recipes, or all."""
    cluster = read_cluster(CLUSTER)
    for name in names or recipe_names():
        found = figures(name, cluster)
        write(name, found)
        print(f"{name}: {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
