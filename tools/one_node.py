"""Models on a base in NF4, on few GPUs: what a rank holds, a step's time, the longest sequence that fits, by plan.

python -m tools.one_node docs/results/planning writes the tables of docs/models.md: Llama-3.1-405B by method, with the
flags of its recipe for one node; and smaller models with LoRA.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_peft.config import METHODS, ParallelConfig, RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.plan.cluster import Cluster, read_cluster
from megatron_peft.plan.layouts import longest_sequence
from megatron_peft.plan.recorded_step import RecordedStep, estimated_time, total
from megatron_peft.rehearsal.program import Memory
from megatron_peft.rehearsal.rehearsal import record_layers
from megatron_peft.rehearsal.requests import LayersToRecord
from tools.published import write_tables
from tools.recipe_plans import CLUSTER, recipe

RECIPE = "llama-3.1-405b-one-node"
RESERVED_GIB = 1.5  # of a card that runs nothing else: CUDA's context, and fragmented memory
# Recipe -> GPUs, and GB of each.
SMALLER = {"llama-3.3-70b": (2, 80), "llama-3.1-8b": (1, 12)}


def planned(run: RunConfig, cluster: Cluster) -> tuple[Memory, float, int]:
    """Of the first stage: bytes by part, seconds of a step, and the longest sequence."""
    shape = read_shape(str(run.model.pretrained_checkpoint))
    [layers] = record_layers([LayersToRecord.of(run, shape)])
    step = RecordedStep(run, shape, layers)
    return step.memory(0), estimated_time(step, cluster).seconds, longest_sequence(run, shape, cluster)[0]


def by_method(cluster: Cluster) -> dict[str, Any]:
    """The table of 405B."""
    run, parts, rows = recipe(RECIPE), list[str](), list[list[str]]()
    for method in [name for name in METHODS if name != "full"]:  # which needs its weights in full
        memory, seconds, longest = planned(replace(run, peft=replace(run.peft, method=method)), cluster)
        parts = [*memory]
        held = [f"{num_bytes / 2**30:.1f}" for num_bytes in (*memory.values(), total(memory))]
        rows.append([method, *held, f"{seconds:.0f}", f"{longest:,}"])
        print(*rows[-1], flush=True)
    columns = ["GiB of a rank", *parts, "in all", f"s a step of {run.global_batch_size}", "longest sequence"]
    title = f"Llama-3.1-405B on 8 A100-80GB, TP8, samples of {run.data.seq_length:,} tokens"
    return {"title": title, "columns": columns, "text_columns": 1, "rows": rows}


def smaller_models(cluster: Cluster) -> dict[str, Any]:
    """The table of the others, with 405B's flags."""
    of_node, rows = recipe(RECIPE), []
    for name, (num_gpus, memory_gb) in SMALLER.items():
        card = replace(cluster, memory_gib=memory_gb * 1e9 / 2**30, reserved_gib=RESERVED_GIB)
        folder = recipe(name).model.pretrained_checkpoint
        parallel = ParallelConfig(num_gpus, world_size=num_gpus, sequence_parallel=num_gpus > 1)
        run = replace(of_node, parallel=parallel, model=replace(of_node.model, pretrained_checkpoint=folder))
        run = replace(run, data=replace(run.data, seq_length=4096))
        memory, _, longest = planned(run, card)
        rows.append([name, f"{num_gpus} of {memory_gb} GB", f"{total(memory) / 2**30:.1f}", f"{longest:,}"])
        print(*rows[-1], flush=True)
    columns = ["model", "GPUs", "GiB a GPU, 4,096 tokens", "longest sequence"]
    return {"title": "LoRA, layers recomputed", "columns": columns, "text_columns": 2, "rows": rows}


def main(arguments: Sequence[str]) -> int:
    """Write the tables into the folder that is named."""
    cluster = read_cluster(CLUSTER)
    found = {"one_node_smaller": smaller_models(cluster), "one_node": by_method(cluster)}
    write_tables(found, Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
