"""The paper's headlines held against the plan: its six methods for its four models, on nodes of 8 A100.

    "2.1 times faster"     Llama-3.1-405B: 55 minutes an epoch with the Hybrid, 120 with full fine-tuning
    "50% less memory"      30 GB a GPU against 80

The paper names neither the number of GPUs, nor the layout, nor the tokens of an epoch. These are chosen here: the
smallest number of GPUs that holds full fine-tuning, for all methods, and the fastest layout of each. Minutes are those
of an epoch that takes full fine-tuning 120.

python -m tools.headlines docs/results/planning writes the tables of docs/headlines.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, PeftConfig, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import Cluster, read_cluster
from megatron_peft.plan.layouts import FittedLayout, fit
from megatron_peft.plan.recorded_step import RecordedStep, estimated_time, total
from megatron_peft.plan.timing import EXPOSED, StepTime
from megatron_peft.rehearsal.program import Memory, RecordedLayers
from megatron_peft.rehearsal.rehearsal import record_layers
from megatron_peft.rehearsal.requests import LayersToRecord
from tools.published import LLAMA_70B, LLAMA_405B, made_up_run, write_tables

METHODS = ("full", "lora", "lora-ga", "boft", "urnn", "hybrid")
_first_llama = partial(ModelShape, "llama", vocab_size=32000, max_position_embeddings=2048)
MODELS: dict[str, ModelShape] = {
    "Llama-3.1-405B": LLAMA_405B,
    "Llama-3.3-70B": LLAMA_70B,
    "Wizard-Vicuna-30B": _first_llama(60, 6656, 17920, 52, 52, 128),
    "BloomZ-7B1": ModelShape(
        *("bloom", 30, 4096, 16384, 32, 32, 128, 250880, 2048),
        normalization="LayerNorm",
        activation="gelu_tanh",
        gated_linear_unit=False,
        linear_biases=frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}),
        tied_embeddings=True,
        position_embedding="alibi",
        embedding_layernorm=True,
    ),
}
LENGTH, BATCH, FULL_MINUTES = 2048, 128, 120
WORLDS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Compared:
    """A method for a model.

    Args:
        best: its fastest layout.
        same_time, same_memory: at the layout of full fine-tuning; memory by stage.
    """

    method: str
    best: FittedLayout
    same_time: StepTime
    same_memory: dict[int, Memory]

    @property
    def same_bytes(self) -> int:
        """Of the fullest GPU."""
        return max(map(total, self.same_memory.values()))


def compare(shape: ModelShape, cluster: Cluster) -> list[Compared]:
    """Every method on the smallest number of GPUs that holds full fine-tuning."""
    known: dict[str, dict[str, RecordedLayers]] = {method: {} for method in METHODS}
    full = _smallest(shape, cluster, known["full"])
    found = []
    for method in METHODS:
        world_size, run = full.run.parallel.world_size, replace(full.run, peft=PeftConfig(method=method))
        best = full if method == "full" else fit(_run(method), shape, world_size, cluster, 1, known=known[method])[0]
        [layers] = record_layers([LayersToRecord.of(run, shape)], known=known[method])
        step = RecordedStep(run, shape, layers)
        held = {stage: step.memory(stage) for stage in sorted({0, 1 % step.pp, step.pp - 1, full.stage})}
        found.append(Compared(method, best, estimated_time(step, cluster), held))
    return found


def _run(method: str) -> RunConfig:
    return made_up_run(method, LENGTH, BATCH)


def _smallest(shape: ModelShape, cluster: Cluster, known: dict[str, RecordedLayers]) -> FittedLayout:
    for world_size in WORLDS:
        try:
            return fit(_run("full"), shape, world_size, cluster, 1, known=known)[0]
        except ConfigurationError:
            continue
    raise ConfigurationError(f"full fine-tuning fits none of {WORLDS} GPUs.")


def _layout(one: FittedLayout, num_layers: int) -> str:
    parallel = one.run.parallel
    virtual = parallel.num_virtual_stages(num_layers)
    sizes = f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size}"
    sizes += f" VPP{virtual}" if virtual else ""
    sizes += f" DP{parallel.data_parallel_size}, micro-batch {one.run.training.micro_batch_size}"
    return sizes + ("" if one.recompute == "none" else f", recompute {one.recompute}")


def methods_table(compared: dict[str, list[Compared]]) -> dict[str, Any]:
    """Memory and time of every method for every model."""
    rows = []
    for model, found in compared.items():
        full = found[0].best.speed.time.seconds
        for one in found:
            best, seconds = one.best, one.best.speed.time.seconds
            rows.append(
                [
                    *(model, str(best.run.parallel.world_size), one.method, _layout(best, best.speed.num_layers)),
                    *(f"{total(best.memory) / 2**30:.0f}", f"{one.same_bytes / 2**30:.0f}"),
                    *(
                        f"{FULL_MINUTES * seconds / full:.0f}",
                        f"{full / seconds:.2f}",
                        f"{full / one.same_time.seconds:.2f}",
                    ),
                ]
            )
    columns = ["model", "GPUs", "method", "its fastest layout", "GiB a GPU", "GiB at full's layout"]
    columns += ["minutes an epoch", "times faster than full", "times faster at full's layout"]
    return {"title": "The paper's methods and models", "columns": columns, "text_columns": 4, "rows": rows}


def origins_table(found: Sequence[Compared]) -> dict[str, Any]:
    """Where the Hybrid's lead over full fine-tuning comes from: minutes of an epoch, by kind."""
    by_name = {one.method: one for one in found}
    full, hybrid = by_name["full"], by_name["hybrid"]
    steps = [full.best.speed.time, hybrid.same_time, hybrid.best.speed.time]
    scale = FULL_MINUTES / steps[0].seconds
    kinds = list(dict.fromkeys(kind for one in steps for kind in one.by_kind))
    rows = []
    for kind in kinds:
        values = [one.by_kind.get(kind, 0.0) * scale for one in steps]
        if max(values) >= 0.05:
            rows.append([kind.replace(EXPOSED, "communication, "), *(f"{value:.1f}" for value in values)])
    rows.append(["an epoch", *(f"{one.seconds * scale:.1f}" for one in steps)])
    columns = ["minutes", "full", "Hybrid at full's layout", "Hybrid at its own"]
    return {"title": "Llama-3.1-405B, where the time goes", "columns": columns, "text_columns": 1, "rows": rows}


def parts_table(found: Sequence[Compared]) -> dict[str, Any]:
    """What the fullest GPU holds at the layout of full fine-tuning."""
    full = found[0].best
    rows = []
    for one in found:
        held = one.same_memory[full.stage]
        rows.append([one.method, *(f"{value / 2**30:.1f}" for value in held.values()), f"{total(held) / 2**30:.1f}"])
    columns = ["GiB", *full.memory, "in all"]
    return {
        "title": "Llama-3.1-405B at the layout of full fine-tuning",
        "columns": columns,
        "text_columns": 1,
        "rows": rows,
    }


def main(arguments: Sequence[str]) -> int:
    """Write the tables into the folder that is named."""
    cluster = read_cluster("8xa100")
    compared = {model: compare(shape, cluster) for model, shape in MODELS.items()}
    largest = compared["Llama-3.1-405B"]
    found = {"methods": methods_table(compared), "origins": origins_table(largest), "memory": parts_table(largest)}
    write_tables(found, Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
