"""Llama-3.1-405B on one node of 8 A100, by method: what a rank holds, a step's time, the longest sequence that fits.

python -m tools.one_node docs/results/planning writes the table of docs/models.md, from the recipe's own flags.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_peft.config import METHODS
from megatron_peft.models.families import read_shape
from megatron_peft.plan.cluster import read_cluster
from megatron_peft.plan.layouts import longest_sequence
from megatron_peft.plan.recorded_step import RecordedStep, estimated_time, total
from megatron_peft.rehearsal.rehearsal import record_layers
from megatron_peft.rehearsal.requests import LayersToRecord
from tools.published import write_tables
from tools.recipe_plans import CLUSTER, recipe

RECIPE = "llama-3.1-405b-one-node"


def main(arguments: Sequence[str]) -> int:
    """Write the table into the folder that is named."""
    run, cluster = recipe(RECIPE), read_cluster(CLUSTER)
    shape = read_shape(str(run.model.pretrained_checkpoint))
    parts, rows = list[str](), []
    for method in [name for name in METHODS if name != "full"]:  # which needs its weights in full
        of_method = replace(run, peft=replace(run.peft, method=method))
        [layers] = record_layers([LayersToRecord.of(of_method, shape)])
        step = RecordedStep(of_method, shape, layers)
        memory = step.memory(0)
        parts = [*memory]
        longest, _ = longest_sequence(of_method, shape, cluster)
        held = [f"{num_bytes / 2**30:.1f}" for num_bytes in (*memory.values(), total(memory))]
        rows.append([method, *held, f"{estimated_time(step, cluster).seconds:.0f}", f"{longest:,}"])
        print(*rows[-1], flush=True)
    length = run.data.seq_length
    table = {
        "title": f"Llama-3.1-405B on a base in NF4, 8 A100-80GB, TP8, samples of {length:,} tokens: GiB of a rank",
        "columns": ["method", *parts, "in all", f"s a step of {run.global_batch_size}", "longest sequence (tokens)"],
        "text_columns": 1,
        "rows": rows,
    }
    write_tables({"one_node": table}, Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
