"""Published runs, and what the plan's constants say of them: two calibrate them, the others test them.

Each is rehearsed, and its recorded schedule timed. `python -m megatron_peft.planning.published docs/results/planning`
writes the tables of docs/planning.md; it takes a quarter of an hour.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_peft.config import (
    DataConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.models.shape import ModelShape
from megatron_peft.planning.cluster import Cluster, read_cluster
from megatron_peft.planning.estimate import StepEstimate
from megatron_peft.planning.pace import Pace
from megatron_peft.planning.pipeline import estimated_time
from megatron_peft.planning.record import Entry
from megatron_peft.planning.rehearsal import rehearse_run
from megatron_peft.planning.timing import step_time

_llama = partial(ModelShape, "llama", max_position_embeddings=131072, vocab_size=128256, num_query_groups=8)
LLAMA_8B = _llama(32, 4096, 14336, 32, kv_channels=128)
LLAMA_70B = _llama(80, 8192, 28672, 64, kv_channels=128)
LLAMA_405B = _llama(126, 16384, 53248, 128, kv_channels=128)
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def gpt(num_layers: int, hidden_size: int, num_heads: int) -> ModelShape:
    """GPT-3's shape; its learned positions cost next to nothing, and neither does ALiBi."""
    return ModelShape(
        "bloom",
        num_layers,
        hidden_size,
        4 * hidden_size,
        num_heads,
        num_heads,
        hidden_size // num_heads,
        vocab_size=51200,
        max_position_embeddings=2048,
        normalization="LayerNorm",
        activation="gelu",
        gated_linear_unit=False,
        tied_embeddings=True,
        position_embedding="alibi",
    )


def made_up_run(
    method: str, length: int, batch: int, micro_batch: int = 1, recompute: dict[str, Any] | None = None, **parallel: Any
) -> RunConfig:
    """A run in bf16 on full sequences of one length; `parallel` has fields of `ParallelConfig`."""
    several = parallel.get("world_size", 1) > parallel.get("tensor_model_parallel_size", 1) * parallel.get(
        "pipeline_model_parallel_size", 1
    )
    return RunConfig(
        parallel=ParallelConfig(**parallel),
        model=ModelConfig(pretrained_checkpoint="(none)", bf16=True, transformer=recompute or {}),
        peft=PeftConfig(method=method),
        data=DataConfig(mock_data=True, seq_length=length, pad_to_seq_length=True),
        training=TrainingConfig(
            micro_batch_size=micro_batch, global_batch_size=batch, train_iters=1, overlap_grad_reduce=several
        ),
        optimizer=OptimizerSettings(use_distributed_optimizer=several, overlap_param_gather=several),
    )


class Step:
    """A step of a run that is not to be started here.

    Args:
        run: with its world size.
        shape: of the model.
        scores: whether its attention writes its scores (`scores_seconds`).
    """

    def __init__(self, run: RunConfig, shape: ModelShape, scores: bool = False) -> None:
        self.run, self.shape, self.scores = run, shape, scores

    @cached_property
    def _programs(self) -> dict[int, Sequence[Entry]]:
        return {stage.rank: stage.entries for stage in rehearse_run(self.run, self.shape, peaks=False).stages}

    def seconds(self, cluster: Cluster) -> float:
        """Of its recorded schedule. The first call rehearses it, which may take minutes."""
        return step_time(self._programs, cluster).seconds + self._scores_seconds(cluster)

    def estimate(self, cluster: Cluster) -> float:
        """By the formulas of --fit."""
        return estimated_time(StepEstimate(self.run, self.shape), cluster).seconds + self._scores_seconds(cluster)

    def _scores_seconds(self, cluster: Cluster) -> float:
        return scores_seconds(self.run, self.shape, cluster) if self.scores else 0.0


def llama_3(num_gpus: int) -> RunConfig:
    """Llama 3 405B, 16 million tokens a step in sequences of 8,192 (arXiv 2407.21783, section 3.3.2 and table 4).

    The first and the last of 16 stages have a chunk without a layer, so chunks have one layer.
    """
    return made_up_run(
        "full",
        8192,
        2048,
        world_size=num_gpus,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=16,
        num_layers_per_virtual_pipeline_stage=1,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
        sequence_parallel=True,
    )


def automodel_70b(
    batch: int = 32, recompute: dict[str, Any] | None = None, sequence_parallel: bool = False
) -> RunConfig:
    """NeMo AutoModel's LoRA of Llama 3 70B on 8 H100: TP2, PP4, ten chunks of two layers."""
    return made_up_run(
        "lora",
        4096,
        batch,
        recompute=recompute,
        world_size=8,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        num_layers_per_virtual_pipeline_stage=2,
        sequence_parallel=sequence_parallel,
    )


def gpt_run(num_gpus: int, pp: int, chunk: int | None, micro_batch: int, batch: int) -> RunConfig:
    """Korthikanti et al.'s runs: TP8, sequence parallelism, sequences of 2,048 (arXiv 2205.05198, table 3)."""
    return made_up_run(
        "full",
        2048,
        batch,
        micro_batch,
        recompute={"recompute_granularity": "selective"},
        world_size=num_gpus,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=chunk,
        sequence_parallel=True,
    )


def scores_seconds(run: RunConfig, shape: ModelShape, cluster: Cluster) -> float:
    """What writing the scores of attention adds to a step: those runs had no fused kernel.

    18 passes over the scores of a layer: product, softmax and dropout in forward and again in backward, and theirs.
    """
    parallel, rows, length = run.parallel, run.training.micro_batch_size, run.data.seq_length
    scores = rows * shape.num_attention_heads // parallel.tensor_model_parallel_size * length**2
    layers = shape.num_layers // parallel.pipeline_model_parallel_size
    return (
        run.num_microbatches
        * layers
        * 18
        * 2
        * scores
        / (cluster.memory_gb_per_second * cluster.memory_efficiency * 1e9)
    )


@dataclass(frozen=True)
class Published:
    """A published run.

    Args:
        name: what it is.
        role: "calibrates" or "tests".
        seconds: published, of a step.
        step: ours.
        cluster: of `cluster.SHIPPED`.
        source: where it is published.
    """

    name: str
    role: str
    seconds: float
    step: Step
    cluster: str
    source: str


def _llama_name(num_gpus: int) -> str:
    return f"Llama 3 405B pretraining, {num_gpus:,} H100"


def _llama_seconds(num_gpus: int, tflops: float) -> float:
    """Table 4 has TFLOP/s a GPU: a step has as many operations as --log-throughput counts."""
    cluster, run = read_cluster("8xh100"), llama_3(num_gpus)
    nothing: Any = None
    return Pace.of(run, LLAMA_405B, cluster, nothing).flops / num_gpus / tflops / 1e12


def published_runs() -> list[Published]:
    """All of them."""
    automodel, korthikanti = "NeMo AutoModel's performance summary, October 2025", "arXiv 2205.05198, table 5"
    gpts = [
        ("GPT-3 175B", "calibrates", 13.75, gpt_run(64, 8, 4, 1, 64), gpt(96, 12288, 96)),
        ("GPT-3 22B", "tests", 1.10, gpt_run(8, 1, None, 4, 4), gpt(48, 6144, 64)),
        ("GPT-3 530B", "tests", 37.83, gpt_run(280, 35, 1, 1, 280), gpt(105, 20480, 128)),
        ("GPT-3 1T", "tests", 71.49, gpt_run(512, 64, None, 1, 512), gpt(128, 25600, 160)),
    ]
    return [
        *(
            Published(
                _llama_name(num_gpus),
                role,
                _llama_seconds(num_gpus, tflops),
                Step(llama_3(num_gpus), LLAMA_405B),
                "8xh100",
                "arXiv 2407.21783, table 4",
            )
            for num_gpus, role, tflops in ((8192, "calibrates", 430), (16384, "tests", 400))
        ),
        Published(
            "LoRA of Llama 3 8B, 1 H100",
            "tests",
            10.51,
            Step(made_up_run("lora", 4096, 32, micro_batch=2), LLAMA_8B),
            "8xh100",
            automodel,
        ),
        Published(
            "LoRA of Llama 3 70B, 8 H100: our step at that layout",
            "tests",
            26.92,
            Step(automodel_70b(), LLAMA_70B),
            "8xh100",
            automodel,
        ),
        *(
            Published(
                f"{name} pretraining, {run.parallel.world_size} A100",
                role,
                seconds,
                Step(run, shape, scores=True),
                "8xa100",
                korthikanti,
            )
            for name, role, seconds, run, shape in gpts
        ),
    ]


def lost_at_16384(seconds: Mapping[str, float]) -> float:
    """The part of a GPU's throughput that Llama 3 loses from 8,192 to 16,384 GPUs, by seconds of a step."""
    few, many = (seconds[_llama_name(num_gpus)] for num_gpus in (8192, 16384))
    return 1 - few / 2 / many


def automodel_steps() -> dict[str, tuple[int, Step]]:
    """What makes AutoModel's step of 26.92 s, one after the other, from our step on: how often each step is taken.

    The recipe (llama3_3_70b_instruct_peft_benchmark.yaml): no sequence parallelism, activation checkpointing, and a
    global batch in eight passes of the pipeline with four microbatches each.
    """
    runs = {
        "our step at that layout, with sequence parallelism": (1, automodel_70b(sequence_parallel=True)),
        "no sequence parallelism": (1, automodel_70b()),
        "every layer recomputed": (1, automodel_70b(recompute=FULL_RECOMPUTE)),
        "eight passes of the pipeline": (8, automodel_70b(4, FULL_RECOMPUTE)),
    }
    return {name: (times, Step(run, LLAMA_70B)) for name, (times, run) in runs.items()}


def items(totals: Mapping[str, float]) -> list[tuple[str, float]]:
    """Totals that hold what came before them, as what each adds; and the rest of AutoModel's 26.92 s."""
    found, before = [], 0.0
    for name, seconds in {**totals, "not explained": 26.92}.items():
        found.append((name, seconds - before))
        before = seconds
    return found


def tables() -> dict[str, dict[str, Any]]:
    """Tables by the names of their files."""
    clusters = {name: read_cluster(name) for name in ("8xh100", "8xa100")}
    rows, planned = [], {}
    for one in published_runs():
        seconds = planned[one.name] = one.step.seconds(clusters[one.cluster])
        off = f"{seconds / one.seconds - 1:+.1%}"
        rows.append([one.name, one.role, one.source, f"{one.seconds:.2f}", f"{seconds:.2f}", off])
    totals = {name: times * step.seconds(clusters["8xh100"]) for name, (times, step) in automodel_steps().items()}
    parts = [[name, f"{seconds:.2f}"] for name, seconds in items(totals)]
    lost = lost_at_16384(planned)
    return {
        "published": {
            "title": "Published runs and the plan",
            "columns": ["run", "it", "source", "published (s a step)", "planned (s a step)", "off by"],
            "text_columns": 3,
            "rows": rows,
        },
        "scaling": {
            "title": "Llama 3 405B from 8,192 to 16,384 GPUs",
            "columns": ["throughput of a GPU that is lost", "part"],
            "text_columns": 1,
            "rows": [["published (430 to 400 TFLOP/s)", f"{1 - 400 / 430:.1%}"], ["planned", f"{lost:.1%}"]],
        },
        "automodel": {
            "title": "AutoModel's LoRA step of 26.92 s",
            "columns": ["what", "seconds"],
            "text_columns": 1,
            "rows": [*parts, ["published", "26.92"]],
        },
    }


def write_tables(found: dict[str, dict[str, Any]], folder: Path) -> None:
    """One JSON file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Write the tables into the folder that is named."""
    write_tables(tables(), Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
