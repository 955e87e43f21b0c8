"""Published runs (published.toml), and what the plan says of them: half of them calibrate its constants.

`python -m tools.published docs/results/planning` plans them from recorded layers as --fit does, in a
minute, and writes the tables of docs/published-runs.md; and beside `timing.py` the errors that `timing.Accuracy` reads.
"""

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from megatron_peft.config import RunConfig, make_run
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import Cluster, Link, read_cluster
from megatron_peft.plan.recorded_step import RecordedStep, estimated_time, total
from megatron_peft.plan.timing import ERRORS, Accuracy, PlannedSpeed
from megatron_peft.rehearsal.rehearsal import record_layers
from megatron_peft.rehearsal.requests import LayersToRecord, Lengths

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE: Mapping[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": FULL_RECOMPUTE,
}
KINDS: Mapping[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    # Its squared ReLU costs what GELU does.
    "nemotron": {
        **{"architecture": "llama", "normalization": "LayerNorm", "activation": "gelu", "gated_linear_unit": False},
        "vocab_size": 256000,
    },
    # Learned positions cost next to nothing, and neither does ALiBi.
    "gpt": {
        **{"architecture": "bloom", "normalization": "LayerNorm", "activation": "gelu", "gated_linear_unit": False},
        **{"vocab_size": 51200, "tied_embeddings": True, "position_embedding": "alibi"},
    },
}


@cache
def published() -> dict[str, Any]:
    """What published.toml says."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))


def published_shape(model: str) -> ModelShape:
    """Of a model of published.toml."""
    of = published()["models"][model]
    hidden, heads = of["hidden"], of["heads"]
    fields = {"vocab_size": 128256, **KINDS[of.get("kind", "llama")]}
    if "vocabulary" in of:
        fields["vocab_size"] = of["vocabulary"]
    return ModelShape(
        num_layers=of["layers"],
        hidden_size=hidden,
        ffn_hidden_size=of.get("ffn", 4 * hidden),
        num_attention_heads=heads,
        num_query_groups=of.get("groups", heads),
        kv_channels=hidden // heads,
        max_position_embeddings=131072,
        **fields,
    )


LLAMA_8B, LLAMA_70B, LLAMA_405B = map(published_shape, ("llama-8b", "llama-70b", "llama-405b"))


def made_up_run(
    method: str, length: int, batch: int, micro_batch: int = 1, recompute: dict[str, Any] | None = None, **parallel: Any
) -> RunConfig:
    """A run in bf16 on full sequences of one length; `parallel` has fields of `ParallelConfig`."""
    several = parallel.get("world_size", 1) > parallel.get("tensor_model_parallel_size", 1) * parallel.get(
        "pipeline_model_parallel_size", 1
    )
    overlaps = ("overlap_grad_reduce", "use_distributed_optimizer", "overlap_param_gather")
    model = {"pretrained_checkpoint": "(none)", "bf16": True, "transformer": recompute or {}, "method": method}
    data = {"mock_data": True, "seq_length": length, "pad_to_seq_length": True, "train_iters": 1}
    sizes = {"micro_batch_size": micro_batch, "global_batch_size": batch, **parallel}
    return make_run(**model, **data, **sizes, **dict.fromkeys(overlaps, several))


@dataclass(frozen=True)
class Step:
    """A published step.

    Args:
        layout: its entry in published.toml.
        run: ours that comes nearest.
        seconds: published; 0: it ran out of memory.
    """

    layout: Mapping[str, Any]
    run: RunConfig
    seconds: float

    @property
    def name(self) -> str:
        """Of the layout, with the number of GPUs."""
        return f"{self.layout['name']}, {self.run.parallel.world_size:,} {self.layout['gpu'].upper()}"

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return published_shape(self.layout["model"])

    def layers(self) -> LayersToRecord:
        """Megatron fuses SwiGLU whatever is trained; AutoModel's kernels are taken to be ours."""
        of = LayersToRecord.of(self.run, self.shape)
        lengths, samples = of.lengths, self.layout.get("samples", 1)
        if samples > 1:
            packed = (lengths.positions // samples,) * (samples * lengths.rows)
            lengths = Lengths(1, lengths.rows * lengths.positions, packed)
        fuses = {} if self.layout["source"] == "automodel" else {"bias_activation_fusion": True}
        return replace(of, lengths=lengths, fuses=fuses)

    def seconds_of(self, recorded: RecordedStep, cluster: Cluster) -> float:
        """As planned. Those on A100 had no fused attention."""
        seconds = estimated_time(recorded, cluster).seconds
        return seconds + (scores_seconds(self.run, self.shape, cluster) if self.layout["gpu"] == "a100" else 0.0)


def record(steps: Sequence[Step]) -> list[RecordedStep]:
    """All in one call: worlds of several sizes have the same layers."""
    found = record_layers([step.layers() for step in steps])
    return [RecordedStep(step.run, step.shape, one) for step, one in zip(steps, found, strict=True)]


def steps() -> Iterator[Step]:
    """Those of all layouts whose seconds are held against the plan's."""
    for layout in published()["layouts"]:
        for num_gpus, batch, seconds in layout["steps"]:
            run = run_of(layout, num_gpus, batch)
            if layout.get("tflops"):  # as many operations as --log-throughput counts
                nothing: Any = None
                speed = PlannedSpeed.of(run, published_shape(layout["model"]), cluster_for(layout), nothing)
                seconds = speed.flops / num_gpus / seconds / 1e12  # noqa: PLW2901
            yield Step(layout, run, seconds)


def cluster_for(layout: Mapping[str, Any]) -> Cluster:
    """The shipped one with its GPUs."""
    return read_cluster(f"8x{layout['gpu']}")


def run_of(layout: Mapping[str, Any], num_gpus: int, batch: int) -> RunConfig:
    """Ours that comes nearest. All held their logits whole; those on A100 overlap no sums of gradients; NeMo's on H100
    are in bf16.
    """
    tp, pp, ends = layout.get("tp", 1), layout.get("pp", 1), layout.get("ends_count", False)
    chunks = layout["vp"] * pp if "vp" in layout else None
    num_layers = published()["models"][layout["model"]]["layers"] + 2 * ends
    transformer = {**RECOMPUTE[layout.get("recompute", "none")]}
    if layout.get("tp_comm_overlap"):
        transformer["tp_comm_overlap"] = True
    made_up = made_up_run(
        *("lora" if "lora" in layout else "full", layout["length"], batch, layout.get("micro_batch", 1), transformer),
        world_size=num_gpus,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=num_layers // chunks if chunks else None,
        account_for_embedding_in_pipeline_split=ends,
        account_for_loss_in_pipeline_split=ends,
        sequence_parallel=tp > 1 and layout.get("sequence_parallel", True),
    )
    run = replace(made_up, model=replace(made_up.model, cross_entropy_chunk_tokens=0))
    if layout.get("lora"):
        run = replace(run, peft=replace(run.peft, target_modules=tuple(layout["lora"])))
    if layout["gpu"] == "a100":
        training = replace(run.training, overlap_grad_reduce=False, grad_reduce_in_bf16="in_half" in layout)
        optimizer = replace(run.optimizer, overlap_param_gather=False)
        return replace(run, training=training, optimizer=optimizer)
    in_bf16 = layout["source"].startswith("dgxc")
    return replace(run, training=replace(run.training, grad_reduce_in_bf16=in_bf16))


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


def bigscience_steps() -> Iterator[Step]:
    """Layouts of one model. DeepSpeed's pipeline sends a tensor-parallel rank's part, as sequence parallelism does, and
    they are planned with it. Gradients are in fp16."""
    common = {key: value for key, value in published()["bigscience"].items() if key not in ("layouts", "network")}
    for dp, tp, pp, rows, batch, seconds in published()["bigscience"]["layouts"]:
        layout = {**common, "name": f"TP{tp} PP{pp} DP{dp}, micro-batch {rows}", "tp": tp, "pp": pp}
        layout |= {"micro_batch": rows, "recompute": "full", "gpu": "a100", "in_half": True}
        yield Step(layout, run_of(layout, dp * tp * pp, batch), seconds)


def bigscience_cluster() -> Cluster:
    """Nodes of 8 A100 with the network that BigScience measured."""
    a100 = read_cluster("8xa100")
    return replace(a100, network_link=Link(published()["bigscience"]["network"], a100.network_link.latency_us))


def as_it_ran(step: Step) -> Step:
    """BigScience's, without sequence parallelism: for its memory."""
    return replace(step, run=replace(step.run, parallel=replace(step.run.parallel, sequence_parallel=False)))


def fits(of: RecordedStep, cluster: Cluster) -> bool:
    """Whether the fullest rank does."""
    return max(total(of.memory(stage)) for stage in {0, 1 % of.pp, of.pp - 1}) <= cluster.usable_bytes


def kendalls_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """1: both order alike; 0: no relation; -1: the other way round."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


def automodel_steps() -> dict[str, float]:
    """What makes AutoModel's step of 26.92 s of a 70B LoRA, one after the other, from our step on; seconds.

    The recipe (llama3_3_70b_instruct_peft_benchmark.yaml, October 2025): no sequence parallelism, activation
    checkpointing, and a global batch in eight passes of the pipeline with four microbatches each.
    """
    layout = {"source": "automodel", "gpu": "h100", "model": "llama-70b", "lora": [], "length": 4096}
    layout |= {"tp": 2, "pp": 4, "vp": 10}
    apart, recomputed = {"sequence_parallel": False}, {"sequence_parallel": False, "recompute": "full"}
    ways = {
        "our step at that layout, with sequence parallelism": (1, {}, 32),
        "no sequence parallelism": (1, apart, 32),
        "every layer recomputed": (1, recomputed, 32),
        "eight passes of the pipeline": (8, recomputed, 4),
    }
    steps = [Step(layout, run_of({**layout, **other}, 8, batch), 0) for _, other, batch in ways.values()]
    planned = [step.seconds_of(one, cluster_for(layout)) for step, one in zip(steps, record(steps), strict=True)]
    return {name: ways[name][0] * seconds for name, seconds in zip(ways, planned, strict=True)}


def items(totals: Mapping[str, float]) -> list[tuple[str, float]]:
    """Totals that hold what came before them, as what each adds; and the rest of AutoModel's 26.92 s."""
    found, before = [], 0.0
    for name, seconds in {**totals, "not explained": 26.92}.items():
        found.append((name, seconds - before))
        before = seconds
    return found


def tables() -> dict[str, dict[str, Any]]:
    """Tables by the names of their files."""
    rows, errors, every, timed_layouts = [], {True: [], False: []}, [*steps()], [*bigscience_steps()]
    recorded = iter(record([*every, *timed_layouts, *map(as_it_ran, timed_layouts)]))
    for step in every:
        calibrates, planned = step.layout["calibrates"], step.seconds_of(next(recorded), cluster_for(step.layout))
        errors[calibrates].append(planned / step.seconds - 1)
        source = published()["sources"][step.layout["source"]]
        seconds = [f"{value:.3g}" if value < 10 else f"{value:.2f}" for value in (step.seconds, planned)]
        role = "calibrates" if calibrates else "reported"
        rows.append([step.name, role, source, *seconds, f"{errors[calibrates][-1]:+.1%}"])
    halves = [["calibrates", Accuracy(tuple(errors[True]))], ["reported", Accuracy(tuple(errors[False]))]]
    ranked, cluster = [], bigscience_cluster()
    of_time, of_memory = [*islice(recorded, len(timed_layouts))], [*recorded]
    for step, timed, held in zip(timed_layouts, of_time, of_memory, strict=True):
        planned, ran = step.seconds_of(timed, cluster), step.seconds > 0
        told = [f"{step.seconds:.1f}" if ran else "out of memory", f"{planned:.1f}"]
        told += [f"{planned / step.seconds - 1:+.1%}" if ran else "", "yes" if fits(held, cluster) else "no"]
        ranked.append([step.layout["name"], *told])
    timed = [(float(row[1]), float(row[2])) for row in ranked if row[1] != "out of memory"]
    return {
        "published": {
            "title": "Published runs and the plan",
            "columns": ["run", "it", "source", "published (s a step)", "planned (s a step)", "off by"],
            "text_columns": 3,
            "rows": rows,
        },
        "halves": {
            "title": "How far off the plan is",
            "columns": ["half", "runs", "median", "worst", "lowest", "highest"],
            "text_columns": 1,
            "rows": [
                [name, str(len(of.errors)), *(f"{part:.1%}" for part in (of.median, of.worst))]
                + [f"{part:+.1%}" for part in (min(of.errors), max(of.errors))]
                for name, of in halves
            ],
        },
        "bigscience": {
            "title": "Layouts of a model of 181B on 384 A100",
            "columns": ["layout", "published (s a step)", "planned (s a step)", "off by", "planned to fit"],
            "text_columns": 1,
            "rows": [*ranked, ["Kendall's tau of those that ran", "", f"{kendalls_tau(timed):.2f}", "", ""]],
        },
        "automodel": {
            "title": "AutoModel's LoRA step of 26.92 s",
            "columns": ["what", "seconds"],
            "text_columns": 1,
            "rows": [*([name, f"{seconds:.2f}"] for name, seconds in items(automodel_steps())), ["published", "26.92"]],
        },
    }


def write_tables(found: dict[str, dict[str, Any]], folder: Path) -> None:
    """One JSON file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Write the tables into the folder that is named, and the errors beside this file."""
    found = tables()
    write_tables(found, Path(arguments[0]))
    rows = found["published"]["rows"]
    of_runs = {name: off for name, role, *_, off in rows if role == "reported"}
    of_layouts = {name: off for name, *_, off, _ in found["bigscience"]["rows"] if off}
    named = {"reported": of_runs, "on another network": of_layouts}
    errors = {kind: {name: round(float(off[:-1]) / 100, 3) for name, off in of.items()} for kind, of in named.items()}
    ERRORS.write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")
    for row in found["halves"]["rows"]:
        print(*row)
    print(*found["bigscience"]["rows"][-1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
