"""The certificate of a run: a small run of its own shape, started here in its layout and in one process, compared.

What the ranks of a small run do is in `runs.py`, and the comparisons are in `comparison.py`. docs/certify.md lists what
the small run keeps and what is cut.
"""

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import product
from math import lcm, sqrt
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from safetensors.torch import save_file
from torch import Tensor

from megatron_peft.adapters.quantized_weight import trained_values
from megatron_peft.certify import comparison
from megatron_peft.certify.comparison import CertificateLine, reported_logits
from megatron_peft.certify.converted import compare_converted, compare_in_engine
from megatron_peft.certify.runs import START, Job, run_jobs
from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    config_to_dict,
    make_run,
    require_packages,
    writing,
)
from megatron_peft.config.untrusted import parse_json
from megatron_peft.conversion import verify
from megatron_peft.conversion.convert import is_quantized
from megatron_peft.conversion.peft_export import is_exportable
from megatron_peft.models.families import check_adapters, config_of_shape, rules_for
from megatron_peft.models.rules import expected_tensors
from megatron_peft.models.shape import ModelShape, check_quantized
from megatron_peft.parallel.layout import generator_for
from megatron_peft.rehearsal.requests import kept_stages, make_small, of_num_layers
from megatron_peft.runtime.progress import progress_bar
from megatron_peft.runtime.ranks import RanksFailed, preload, run_ranks
from megatron_peft.serving.engine import Engine

TIMEOUT_SECONDS = 600.0  # of each start of ranks
MOST_NAMED = 6  # problems of one comparison that are told
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "peft", "safetensors")
IN_WORDS = {"merged": "merged model", "exported": "adapter", "served": "in vLLM"}  # by names of comparisons
NOT_CLAIMED = (
    "anything of the run's own weights, data and memory, warmup and decay of its rates; dropout: all are 0 here, so "
    "masks that ranks draw alike or apart by mistake are not seen; what is wrong in one process too, unless Hugging "
    "Face's programs compute otherwise; NCCL, CUDA kernels, Transformer Engine, since it ran on gloo and a processor"
)


# What is started: a small run of the run's own shape.

MOST_TENSOR_PARALLEL, MOST_REPLICAS, MOST_KEY_HEADS = 4, 2, 4
NUM_STEPS = 4
SEQ_LENGTH = 48  # what 2, 3, 4, 8 and 16 ranks divide; others have a multiple
CHUNK_TOKENS = 20  # several chunks of the loss in a microbatch; in one process there are none
LEARNING_RATE, FULL_LEARNING_RATE = 5e-3, 1e-3
EPOCH = 3  # steps; of packs about so many
SAMPLES_OF_A_PACK = 7 / 3
IN_FULL = ModelConfig("none")
WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)
SERVED_HEADS = WIDTHS[3:]  # vLLM's attention has none that is narrower
KEPT = {  # of training, optimizer and data
    *("seed", "overlap_grad_reduce", "grad_reduce_in_bf16", "packing", "pad_to_seq_length"),
    *("optimizer", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"),
    *("use_distributed_optimizer", "overlap_param_gather"),
}
RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class SmallRun:
    """A small run in the layout that is certified, and the same run in one process, which saves nothing."""

    split: RunConfig
    alone: RunConfig
    shape: ModelShape
    engine: Path | None  # the Python of an engine that serves what the run is converted to


def small_run(
    config: RunConfig,
    shape: ModelShape,
    folder: Path,
    most_tensor_parallel: int = MOST_TENSOR_PARALLEL,
    engine: Path | None = None,
) -> SmallRun:
    """The small run of a run, with its model and data, which are written to the empty `folder`.

    ConfigurationError: no small model fits the method's numbers.
    """
    given, method = config.optimizer, config.peft
    few = max(4, 2 * len(kept_stages(config.parallel.pipeline_model_parallel_size)))
    shrunk, of_few_layers = make_small(config, shape, most_tensor_parallel, MOST_REPLICAS, few)
    parallel, tp = shrunk.parallel, shrunk.parallel.tensor_model_parallel_size
    lr = LEARNING_RATE if method.trains_adapters else FULL_LEARNING_RATE
    rate_scale = lr / given.lr
    changes: dict[str, Any] = {
        "lora_dropout": 0.0,  # layouts draw dropouts differently
        "lora_ga_batches": min(method.lora_ga_batches, 2),
        "hybrid_merge_interval": method.hybrid_merge_interval and min(method.hybrid_merge_interval, 2),
    }
    if method.peft_lr_rotation and method.urnn_update != "riemannian":  # whose is not a multiple of --lr
        changes["peft_lr_rotation"] = method.peft_lr_rotation * rate_scale
    peft = replace(shrunk.peft, **changes)
    heads = WIDTHS if engine is None else SERVED_HEADS
    small = small_shape(shape, replace(config, peft=peft), tp, of_few_layers.num_layers, heads)
    save_model(small, folder / "model", config.model)
    micro_batch_size = min(config.training.micro_batch_size, 2)
    size = micro_batch_size * shrunk.num_microbatches * parallel.data_parallel_size
    transformer = {name: value for name, value in shrunk.model.transformer.items() if "dropout" not in name}
    sections = (config.data, given, config.training)
    values = {
        **{name: value for section in sections for name, value in vars(section).items() if name in KEPT},
        **vars(parallel),
        **vars(config.model),
        **vars(peft),
        **_data(config, small, folder, size),
        "pretrained_checkpoint": str(folder / "model"),
        "shape_flags": {},
        "transformer": transformer | {"attention_dropout": 0.0, "hidden_dropout": 0.0},
        "transformer_impl": "local",
        "attention_backend": "auto",
        "cross_entropy_chunk_tokens": 0 if config.model.cross_entropy_chunk_tokens == 0 else CHUNK_TOKENS,
        "seq_length": lcm(SEQ_LENGTH, tp),
        "micro_batch_size": micro_batch_size,
        "global_batch_size": size,
        "train_iters": NUM_STEPS,
        "eval_iters": NUM_STEPS,
        "lr": lr,
        "lr_decay_style": "constant",
        "decoupled_lr": given.decoupled_lr and given.decoupled_lr * rate_scale,
        "save": str(folder / "split"),
        "async_save": config.checkpoint.async_save,
    }
    # In one process, with nothing that is sharded, recomputed or overlapped.
    of_one = {
        **vars(ParallelConfig()),
        "transformer": {name: value for name, value in values["transformer"].items() if name not in RECOMPUTE},
        "recompute_modules": (),
        "cross_entropy_chunk_tokens": 0,
        **dict.fromkeys(("overlap_grad_reduce", "use_distributed_optimizer", "overlap_param_gather"), False),
        **vars(CheckpointConfig()),
    }
    return SmallRun(make_run(**values), make_run(**values | of_one), small, engine)


def wide_run(config: RunConfig, shape: ModelShape, folder: Path) -> SmallRun | None:
    """The small run once more, on all tensor-parallel ranks of the run: one stage, one replica, nothing saved.

    None: the small run has as many.
    """
    parallel, ranks = config.parallel, config.parallel.tensor_model_parallel_size
    if ranks <= MOST_TENSOR_PARALLEL:
        return None
    wide = ParallelConfig(ranks, sequence_parallel=parallel.sequence_parallel, world_size=ranks)
    run = small_run(replace(config, parallel=wide), shape, folder, ranks)
    return replace(run, split=replace(run.split, checkpoint=CheckpointConfig()))


def small_shape(
    shape: ModelShape, config: RunConfig, tensor_parallel: int, num_layers: int, head_widths: Sequence[int] = WIDTHS
) -> ModelShape:
    """The narrowest model of the shape that the method's numbers fit at `tensor_parallel` ranks.

    ConfigurationError: none up to WIDTHS fits.
    """
    run_tp = config.parallel.tensor_model_parallel_size
    multiple = config.model.make_vocab_size_divisible_by
    unit = max(multiple * tensor_parallel, 256)
    is_padded = shape.padded_vocab_size(multiple, run_tp) > shape.vocab_size
    groups = min(shape.num_query_groups // run_tp or 1, MOST_KEY_HEADS) * tensor_parallel
    heads = groups * (shape.num_attention_heads // shape.num_query_groups)
    sizes = {"num_attention_heads": heads, "num_query_groups": groups, "vocab_size": unit - 3 * is_padded}
    small = replace(of_num_layers(shape, num_layers), **sizes)
    parallel = ParallelConfig(tensor_parallel, world_size=tensor_parallel)
    problems: list[str] = []
    # From narrow to wide. transformers takes hidden sizes that the heads divide; Bloom's heads have to fill it, and its
    # MLP is four times as wide.
    bound = shape.architecture == "bloom"
    for head, width in product(head_widths, (0,) if bound else (1, 2, *WIDTHS)):
        hidden = (width or head) * heads
        ffn = 4 * hidden if bound or not shape.gated_linear_unit else 2 * hidden
        candidate = replace(small, kv_channels=head, hidden_size=hidden, ffn_hidden_size=ffn)
        problems = check_adapters(config.peft, parallel, candidate)
        problems += check_quantized(config.model, tensor_parallel, candidate)
        if hidden >= 32 and not problems:
            return candidate
    raise ConfigurationError(f"no small model fits the run's method, so it cannot be certified: {problems[0]}")


def save_model(shape: ModelShape, folder: Path, model: ModelConfig = IN_FULL) -> None:
    """Random weights of a shape, biases and norms too, as a Hugging Face folder.

    model: of a run. It computes with these very numbers, also on a quantized base, as Hugging Face's programs do.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of_shape(shape), indent=2) + "\n")
    tensors: dict[str, Tensor] = {}
    for name, size in expected_tensors(rules_for(shape)).items():
        generator = generator_for(0, name)
        if len(size) > 1:
            tensors[name] = torch.randn(*size, generator=generator) * (0.8 / sqrt(size[1]))
        elif name.endswith("bias"):
            tensors[name] = 0.1 * torch.randn(*size, generator=generator)
        else:
            tensors[name] = 0.5 + torch.rand(*size, generator=generator)
    for rule in rules_for(shape).values():
        for name in (tensor.name for tensor in rule.hf_tensors if is_quantized(rule, model)):
            tensors[name] = trained_values(tensors[name], model.base_precision, torch.float32)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _data(config: RunConfig, shape: ModelShape, folder: Path, batch_size: int) -> dict[str, Any]:
    """Fields of the data: generated sequences for indexed data, else prompts and completions of random ids, of many
    lengths."""
    data = config.data
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": shape.vocab_size - 1, "num_workers": 0}
    if not data.reads_records and (data.mock_data or data.data_path or data.train_data_path):
        return {"mock_data": True, **tokenizer}
    draw = random.Random(0)

    def words(shortest: int, longest: int) -> str:
        return " ".join(str(draw.randrange(shape.vocab_size - 1)) for _ in range(draw.randint(shortest, longest)))

    number = round(batch_size * EPOCH * (SAMPLES_OF_A_PACK if data.pack_sequences else 1))
    pairs = [{"prompt": words(2, 12), "completion": " " + words(3, 24)} for _ in range(number)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    paths = {"train_data_path": (str(path),), "valid_data_path": (str(path),)}
    return {**paths, "pack_sequences": data.pack_sequences, **tokenizer}


# What is compared.


@dataclass(frozen=True)
class Certificate:
    """What was compared, of which run; the fields are those of the document."""

    run: str  # layouts of the run and of what was started, in words
    started: str
    comparisons: tuple[CertificateLine, ...]  # in the order in which a fault shows first
    not_claimed: str
    versions: Mapping[str, str]
    flags: Mapping[str, Any]
    model: Mapping[str, Any]
    small_flags: Mapping[str, Any]
    small_model: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """REFUSED where anything differs; else UNDECIDED where an error kept something from being compared."""
        if any(line.problems for line in self.comparisons):
            return "REFUSED"
        return "UNDECIDED" if any(line.error for line in self.comparisons) else "CERTIFIED"

    @property
    def content(self) -> dict[str, Any]:
        """The document, without its digest."""
        lines = [{**asdict(line), "passed": line.passed} for line in self.comparisons]
        return {"verdict": self.verdict, "passed": self.verdict == "CERTIFIED", **vars(self), "comparisons": lines}


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a certificate, the digest itself left out."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=sorted).encode()).hexdigest()


def certify(config: RunConfig, shape: ModelShape, engine: Path | None = None) -> Certificate:
    """Start the small run of a run and compare. Takes minutes.

    engine: the Python of an environment with vLLM, which then serves what the run is converted to.

    Raises:
        ConfigurationError: No small model fits the method, HF PEFT is not installed, or that Python has no vLLM.
    """
    if config.peft.trains_adapters and is_exportable(config.peft):
        require_packages("peft", "peft")
    if engine is not None:
        Engine(engine).close()
    print("training small runs and comparing them: takes minutes", file=sys.stderr, flush=True)
    preload(["megatron_peft.certify.runs"])  # and all that a rank of the small run imports
    with tempfile.TemporaryDirectory(prefix="megatron-peft-certify-") as folder, progress_bar("Comparing") as watch:
        small = small_run(config, shape, Path(folder), engine=engine)
        wide = wide_run(config, shape, Path(folder, "wide"))
        comparisons = []
        for line in compare_all(small, wide):
            comparisons.append(line)
            watch(1, 0)
    small_flags = json.dumps(config_to_dict(small.split), default=sorted).replace(folder, "SMALL")
    return Certificate(
        run=layout_of(config),
        started="; ".join(layout_of(run.split) for run in (small, wide) if run is not None),
        comparisons=tuple(comparisons),
        not_claimed=NOT_CLAIMED,
        versions={name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        flags=config_to_dict(config),
        model=asdict(shape),
        small_flags=parse_json(small_flags, "flags of the small run"),
        small_model=asdict(small.shape),
    )


def layout_of(config: RunConfig) -> str:
    """`TP8+SP x PP16 x DP2, distributed optimizer`."""
    parallel = config.parallel
    tensor = f"TP{parallel.tensor_model_parallel_size}{'+SP' if parallel.sequence_parallel else ''}"
    stages = f"PP{parallel.pipeline_model_parallel_size}{' interleaved' if parallel.is_interleaved else ''}"
    more = {
        "distributed optimizer": config.optimizer.use_distributed_optimizer,
        "overlapped": config.training.overlap_grad_reduce,
        "bf16": config.model.bf16,
        "packed": config.data.pack_sequences,
    }
    return ", ".join([f"{tensor} x {stages} x DP{parallel.data_parallel_size}", *(name for name in more if more[name])])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def compare_all(small: SmallRun, wide: SmallRun | None) -> Iterator[CertificateLine]:
    """All that can be compared of the small run, and of the one on all of the run's tensor-parallel ranks."""
    runs = {"": small} if wide is None else {"": small, f", at {layout_of(wide.split).partition(' x ')[0]}": wide}
    for at, run in runs.items():
        for line in compare_small(run):
            more = len(line.problems) - MOST_NAMED
            problems = *line.problems[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])
            yield replace(line, name=line.name + at, problems=problems)


def compare_small(small: SmallRun) -> Iterator[CertificateLine]:
    """A small run in its layout with one process; if it saves, also resumed, resharded and converted.

    After a failure of the ranks themselves there is nothing more.
    """

    def jobs(job: Job) -> list[Job]:
        return [job, job.resumed(small.split)] if small.split.checkpoint.save else [job]

    tokens = verify.random_tokens(small.shape.vocab_size, small.split.data.seq_length)
    split, alone = (Job(config, small.shape, tokens) for config in (small.split, small.alone))
    name = "the run itself"
    try:
        by_rank = run_ranks(small.split.parallel.world_size, run_jobs, jobs(split), TIMEOUT_SECONDS)
        ranks, *resumed = zip(*by_rank, strict=True)
        if comparison.begins_alike(small.alone):
            alone = replace(alone, start=comparison.whole_tensors(ranks, START))
        name = "the run in one process"
        ((reference, *resharded),) = run_ranks(1, run_jobs, jobs(alone), TIMEOUT_SECONDS)
        yield from comparison.compare_runs(ranks, reference)
        if not resumed:
            return
        yield comparison.compare_resumed(ranks, *resumed)
        yield from comparison.compare_resharded(ranks, *resharded)
        name, trained = "merge and export", (small.split, tokens, reported_logits(ranks))
        (converted,) = run_ranks(1, compare_converted, trained, TIMEOUT_SECONDS)
        yield from converted
        if small.engine is not None:
            yield from compare_in_engine(small.engine, *trained)
    except RanksFailed as error:
        yield failed(name, error)


def failed(name: str, error: RanksFailed) -> CertificateLine:
    """Nothing was compared: the error that ended the first rank that has one, else what was printed last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return CertificateLine(name, 0, None, 0.0, error=(errors or lines or ["the ranks did not end in time"])[0][:500])


# What is printed and written.


def print_certificate(certificate: Certificate) -> None:
    """A table, and below it what did not pass."""
    console, title = Console(), f"{certificate.run}\nstarted here: {certificate.started}"
    numbers = (Column(name, justify="right") for name in ("number", "largest", "tolerance"))
    table = Table("compared", *numbers, "", title=title, title_justify="left")
    for line in certificate.comparisons:
        usual = "ok" if line.num_compared else "not compared"
        outcome = "DIFFERS" if line.problems else "ERROR" if line.error else usual
        largest = "" if line.largest is None else f"{line.largest:.1e}"
        limits = (largest, f"{line.tolerance:.0e}" if line.tolerance else "equal") if line.num_compared else ("", "")
        table.add_row(line.name, f"{line.num_compared:,}", *limits, outcome)
    console.print(table)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for line in certificate.comparisons:
        for problem in line.problems:
            tell(f"{line.name}: {problem}", style="red")
        if not line.num_compared and not line.problems:
            tell(f"{line.name}: {line.error or line.note}")
    model = certificate.small_model
    tell(
        f"{certificate.verdict}: a model of {model['num_layers']} layers, {model['num_attention_heads']} heads, "
        f"{model['num_query_groups']} key-value heads, hidden size {model['hidden_size']}. "
        f"Not claimed: {NOT_CLAIMED}."
    )
    tell(", ".join(f"{name} {version}" for name, version in certificate.versions.items()))
    tell(f"digest {digest_of(certificate.content)}")
    if certificate.verdict == "CERTIFIED":
        compared = " ".join(line.name for line in certificate.comparisons if line.num_compared)
        tell(f"{', '.join(['trained', *(what for what, word in IN_WORDS.items() if word in compared)])}: equal")


def write_certificate(certificate: Certificate, output: Path) -> None:
    """All of it and a digest of that, as JSON; ConfigurationError if it cannot be written."""
    content = {**certificate.content, "digest": digest_of(certificate.content)}
    with writing(f"--output {output}"):
        write_atomically(output, json.dumps(content, indent=2, default=sorted) + "\n")
