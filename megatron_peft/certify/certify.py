"""The certificate of a run: a small run of its own shape, started here in its layout and in one process, compared.

The small run is `small_run.py`'s, what its ranks do `runs.py`'s, and the comparisons are `comparison.py`'s;
`many_ranks.py` has the adapted layers at the run's own number of tensor-parallel ranks.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_peft.certify import many_ranks
from megatron_peft.certify.comparison import (
    CertificateLine,
    begins_alike,
    compare_logits,
    compare_resharded,
    compare_resumed,
    compare_runs,
    reported_logits,
    shortened,
    whole_tensors,
)
from megatron_peft.certify.runs import START, Job, run_jobs
from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, RunConfig, config_to_dict, is_targeted
from megatron_peft.conversion import verify
from megatron_peft.conversion.peft import export_adapter
from megatron_peft.conversion.to_huggingface import megatron_to_hf, merge
from megatron_peft.models.families import family_of
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.rehearsal import work_bar
from megatron_peft.rehearsal.small_run import SEQ_LENGTH, SmallRun, small_run, small_shape
from megatron_peft.runtime.ranks import RanksFailed, preload, run_ranks

TIMEOUT_SECONDS = 600.0
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "peft", "safetensors")
NOT_CLAIMED = (
    "anything of the run's own weights, data and memory, warmup and decay of its rates; dropout: all are 0 here, so "
    "masks that ranks draw alike or apart by mistake are not seen; what is wrong in one process too, unless Hugging "
    "Face's programs compute otherwise; NCCL, CUDA kernels, Transformer Engine, since it ran on gloo and a processor"
)


@dataclass(frozen=True)
class Certificate:
    """What was compared, of which run; the fields are those of the document.

    Args:
        run, started: layouts of the run and of what was started, in words.
        comparisons: in the order in which a fault shows first.
        versions: of the packages.
        flags, model: of the run.
        small_flags, small_model: of what was started.
    """

    run: str
    started: str
    comparisons: tuple[CertificateLine, ...]
    not_claimed: str
    versions: Mapping[str, str]
    flags: Mapping[str, Any]
    model: Mapping[str, Any]
    small_flags: Mapping[str, Any]
    small_model: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """REFUSED where anything differs; else UNDECIDED where an error kept something from being compared."""
        if any(one.problems for one in self.comparisons):
            return "REFUSED"
        return "UNDECIDED" if any(one.error for one in self.comparisons) else "CERTIFIED"

    @property
    def content(self) -> dict[str, Any]:
        """The document, without its digest."""
        lines = [{**asdict(one), "passed": one.passed} for one in self.comparisons]
        return {"verdict": self.verdict, "passed": self.verdict == "CERTIFIED", **vars(self), "comparisons": lines}


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a certificate, the digest itself left out."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=sorted).encode()).hexdigest()


def certify(config: RunConfig, shape: ModelShape) -> Certificate:
    """Start the small run and compare. Takes minutes.

    Args:
        config: of the run.
        shape: of its base model.

    Raises:
        ConfigurationError: no small model fits the method.
    """
    preload(["megatron_peft.certify.runs"])  # and all that a rank of the small run imports
    with tempfile.TemporaryDirectory(prefix="megatron-peft-certify-") as folder:
        small = small_run(config, shape, Path(folder))
        comparisons = []
        with work_bar("Comparing") as watch:
            for one in compare_all(config, shape, small):
                comparisons.append(one)
                watch(1, 0)
    return Certificate(
        run=layout_of(config),
        started=layout_of(small.split),
        comparisons=tuple(comparisons),
        not_claimed=NOT_CLAIMED,
        versions={name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        flags=config_to_dict(config),
        model=asdict(shape),
        small_flags=_without(folder, config_to_dict(small.split)),
        small_model=asdict(small.shape),
    )


def _without(folder: str, value: Any) -> Any:
    """The small run's flags without the temporary folder."""
    if isinstance(value, str):
        return value.replace(folder, "SMALL")
    if isinstance(value, dict):
        return {name: _without(folder, one) for name, one in value.items()}
    return [_without(folder, one) for one in value] if isinstance(value, list) else value


def layout_of(config: RunConfig) -> str:
    """`TP8+SP x PP16 x DP2, distributed optimizer`."""
    parallel, optimizer = config.parallel, config.optimizer
    tensor = f"TP{parallel.tensor_model_parallel_size}{'+SP' if parallel.sequence_parallel else ''}"
    stages = f"PP{parallel.pipeline_model_parallel_size}{' interleaved' if parallel.is_interleaved else ''}"
    more = {
        "distributed optimizer": optimizer.use_distributed_optimizer,
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


def compare_all(config: RunConfig, shape: ModelShape, small: SmallRun) -> Iterator[CertificateLine]:
    """All that can be compared: after a failure of the ranks themselves there is nothing more."""
    end = time.monotonic() + TIMEOUT_SECONDS

    def started(num_ranks: int, function: Callable[[Any], Any], argument: Any) -> list[Any]:
        return run_ranks(num_ranks, function, argument, max(end - time.monotonic(), 1.0))

    if config.peft.trains_adapters and config.parallel.tensor_model_parallel_size > 1:
        yield _compare_layers(config, shape)
    tokens = verify.random_tokens(small.shape.vocab_size, SEQ_LENGTH)
    split, alone = (Job(config, small.shape, tokens) for config in (small.split, small.alone))
    name = "the run itself"
    try:
        by_rank = started(small.split.parallel.world_size, run_jobs, [split, split.resumed(small.split)])
        ranks, resumed = zip(*by_rank, strict=True)
        if begins_alike(small.alone):
            alone = replace(alone, start=whole_tensors(ranks, START))
        name = "the run in one process"
        ((reference, resharded),) = started(1, run_jobs, [alone, alone.resumed(small.split)])
    except RanksFailed as error:
        yield failed(name, error)
        return
    yield from compare_runs(ranks, reference)
    yield compare_resumed(ranks, resumed)
    yield from compare_resharded(ranks, resharded)
    try:
        (converted,) = started(1, _compare_converted, (small.split, tokens, reported_logits(ranks)))
    except RanksFailed as error:
        converted = [failed("merge and export", error)]
    yield from converted


def failed(name: str, error: RanksFailed) -> CertificateLine:
    """Nothing was compared: the error that ended the first rank that has one, else what was printed last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return CertificateLine(name, 0, None, 0.0, error=(errors or lines or ["the ranks did not end in time"])[0][:500])


def _compare_layers(config: RunConfig, shape: ModelShape) -> CertificateLine:
    """The adapted layers at the run's own number of tensor-parallel ranks."""
    tp, peft = config.parallel.tensor_model_parallel_size, config.peft
    name = f"adapted layers at TP{tp}{'+SP' if config.parallel.sequence_parallel else ''}, in one process"
    small = small_shape(shape, config, tp, shape.num_layers)
    modules = family_of(shape.architecture).modules

    def has_adapter(kind: str) -> bool:
        names = (f"decoder.layers.{layer}.{kind}" for layer in range(shape.num_layers))
        return any(is_targeted(name, peft.target_modules, modules) for name in names)

    sizes = {kind.rpartition(".")[2]: size for kind, size in small.linear_layers(tp).items() if has_adapter(kind)}
    layers = sizes, replace(peft, lora_dropout=0.0), config.parallel.sequence_parallel
    try:
        (found,) = run_ranks(1, many_ranks.compare_many_ranks, layers, TIMEOUT_SECONDS)
    except RanksFailed as error:
        line = failed(name, error)
        kind, _, what = line.error.partition(": ")
        if kind == "AssertionError":  # of a start, or of copies, that differ between the ranks
            return replace(line, error="", problems=(what,))
        if kind in ("ImportError", "ModuleNotFoundError"):
            return replace(line, error="", note="not compared: this torch has no LocalTensorMode")
        return line
    wrong = [f"{tensor}: {error:.1e}" for tensor, error in found.items() if not error <= many_ranks.TOLERANCE]
    note = "float64, of a tensor's largest number"
    return CertificateLine(name, len(found), max(found.values()), many_ranks.TOLERANCE, shortened(wrong), note)


def _compare_converted(trained: tuple[RunConfig, Tensor, tuple[Tensor, Tensor]]) -> list[CertificateLine]:
    """The trained small run outside Megatron: merged in transformers, exported in Hugging Face PEFT.

    Called on one rank, without a world.

    Args:
        trained: the run in its layout, and its logits on these tokens, before and after training.
    """
    config, tokens, logits = trained
    run, has_adapters = Path(str(config.checkpoint.save)), config.peft.trains_adapters

    def compared(name: str, folder: Path) -> CertificateLine:
        return compare_logits(name, verify.logits_of(folder, tokens), logits, 1, config)

    to_hf = merge if has_adapters else megatron_to_hf
    lines = [compared("merged model in transformers", to_hf(run, run.with_name("merged"), progress=False))]
    if has_adapters:
        name = "exported adapter in Hugging Face PEFT"
        try:
            lines.append(compared(name, export_adapter(run, run.with_name("exported"))))
        except ConfigurationError as error:
            reason = str(error).split(". ")[0].split(": ", 1)[-1]
            note = f"not compared ({reason}): the merged model stands for it"
            lines.append(CertificateLine(name, 0, None, 0.0, note=note))
    return lines


# What is printed and written.


def print_certificate(certificate: Certificate, console: Console | None = None) -> None:
    """A table, and below it what did not pass."""
    console = console or Console()
    table = Table(title=f"{certificate.run}\nstarted here: {certificate.started}", title_justify="left")
    table.add_column("compared")
    for column in ("number", "largest", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in certificate.comparisons:
        verdict = "DIFFERS" if one.problems else "ERROR" if one.error else "ok" if one.num_compared else "not compared"
        largest = "" if one.largest is None else f"{one.largest:.1e}"
        limits = (largest, f"{one.tolerance:.0e}" if one.tolerance else "equal") if one.num_compared else ("", "")
        table.add_row(one.name, f"{one.num_compared:,}", *limits, verdict)
    console.print(table)
    for one in certificate.comparisons:
        for problem in one.problems:
            console.print(f"{one.name}: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
        if not one.num_compared and not one.problems:
            console.print(f"{one.name}: {one.error or one.note}", highlight=False, markup=False, soft_wrap=True)
    model = certificate.small_model
    console.print(
        f"{certificate.verdict}: a model of {model['num_layers']} layers, "
        f"{model['num_attention_heads']} heads, {model['num_query_groups']} key-value heads, hidden size "
        f"{model['hidden_size']}. Not claimed: {NOT_CLAIMED}.",
        highlight=False,
        soft_wrap=True,
    )
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    console.print(f"{versions}\ndigest {digest_of(certificate.content)}", highlight=False, soft_wrap=True)


def write_certificate(certificate: Certificate, output: Path) -> None:
    """All of it and a digest of that, as JSON; ConfigurationError if it cannot be written."""
    content = {**certificate.content, "digest": digest_of(certificate.content)}
    try:
        write_atomically(output, json.dumps(content, indent=2, default=sorted) + "\n")
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written ({error.strerror}).") from error
