"""The certificate of a run: a small run of its own shape, started here in its layout and in one process, compared.

The small run is `small_run.py`'s, what its ranks do `runs.py`'s, and the comparisons are `comparison.py`'s.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from megatron_peft.certify import comparison
from megatron_peft.certify.comparison import CertificateLine, compare_logits, reported_logits
from megatron_peft.certify.runs import START, Job, run_jobs
from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.config import ConfigurationError, RunConfig, config_to_dict
from megatron_peft.config.untrusted import parse_json
from megatron_peft.conversion import verify
from megatron_peft.conversion.convert import megatron_to_hf, merge
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.rehearsal import work_bar
from megatron_peft.rehearsal.small_run import SmallRun, small_run, wide_run
from megatron_peft.runtime.ranks import RanksFailed, preload, run_ranks

TIMEOUT_SECONDS = 600.0  # of each start of ranks
MOST_NAMED = 6  # problems of one comparison that are told
PACKAGES = ("megatron-peft", "megatron-core", "torch", "transformers", "peft", "safetensors")
NOT_CLAIMED = (
    "anything of the run's own weights, data and memory, warmup and decay of its rates; dropout: all are 0 here, so "
    "masks that ranks draw alike or apart by mistake are not seen; what is wrong in one process too, unless Hugging "
    "Face's programs compute otherwise; NCCL, CUDA kernels, Transformer Engine, since it ran on gloo and a processor"
)


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
    """Start the small run of a run and compare. Takes minutes. ConfigurationError: no small model fits the method."""
    preload(["megatron_peft.certify.runs"])  # and all that a rank of the small run imports
    with tempfile.TemporaryDirectory(prefix="megatron-peft-certify-") as folder, work_bar("Comparing") as watch:
        small, wide = small_run(config, shape, Path(folder)), wide_run(config, shape, Path(folder, "wide"))
        comparisons = []
        for one in compare_all(small, wide):
            comparisons.append(one)
            watch(1, 0)
    small_flags = json.dumps(config_to_dict(small.split), default=sorted).replace(folder, "SMALL")
    return Certificate(
        run=layout_of(config),
        started="; ".join(layout_of(one.split) for one in (small, wide) if one is not None),
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
            told = *line.problems[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])
            yield replace(line, name=line.name + at, problems=told)


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
    except RanksFailed as error:
        yield failed(name, error)


def failed(name: str, error: RanksFailed) -> CertificateLine:
    """Nothing was compared: the error that ended the first rank that has one, else what was printed last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return CertificateLine(name, 0, None, 0.0, error=(errors or lines or ["the ranks did not end in time"])[0][:500])


def compare_converted(trained: tuple[RunConfig, Tensor, tuple[Tensor, Tensor]]) -> list[CertificateLine]:
    """The trained small run outside Megatron: merged in transformers, exported in Hugging Face PEFT. On one rank."""
    config, tokens, logits = trained  # logits on these tokens, before and after training
    run, has_adapters = Path(str(config.checkpoint.save)), config.peft.trains_adapters

    def compared(name: str, write: Callable[[], Path], instead: str = "") -> CertificateLine:
        try:
            folder = write()
        except ConfigurationError as error:
            reason = str(error).rstrip(".").split(". ")[0].split(": ", 1)[-1]
            return CertificateLine(name, 0, None, 0.0, note=f"not compared ({reason}){instead}")
        return compare_logits(name, verify.logits_of(folder, tokens), logits, 1, config.model.bf16)

    to_hf = merge if has_adapters else megatron_to_hf
    merged = compared("merged model in transformers", lambda: to_hf(run, run.with_name("merged"), progress=False))
    if not has_adapters:
        return [merged]
    name, instead = "exported adapter in Hugging Face PEFT", ": the merged model stands for it"
    exported = compared(
        name, lambda: export_adapter(run, run.with_name("exported")), instead if merged.num_compared else ""
    )
    return [merged, exported]


# What is printed and written.


def print_certificate(certificate: Certificate) -> None:
    """A table, and below it what did not pass."""
    console, title = Console(), f"{certificate.run}\nstarted here: {certificate.started}"
    numbers = (Column(name, justify="right") for name in ("number", "largest", "tolerance"))
    table = Table("compared", *numbers, "", title=title, title_justify="left")
    for one in certificate.comparisons:
        verdict = "DIFFERS" if one.problems else "ERROR" if one.error else "ok" if one.num_compared else "not compared"
        largest = "" if one.largest is None else f"{one.largest:.1e}"
        limits = (largest, f"{one.tolerance:.0e}" if one.tolerance else "equal") if one.num_compared else ("", "")
        table.add_row(one.name, f"{one.num_compared:,}", *limits, verdict)
    console.print(table)
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for one in certificate.comparisons:
        for problem in one.problems:
            tell(f"{one.name}: {problem}", style="red")
        if not one.num_compared and not one.problems:
            tell(f"{one.name}: {one.error or one.note}")
    model = certificate.small_model
    tell(
        f"{certificate.verdict}: a model of {model['num_layers']} layers, {model['num_attention_heads']} heads, "
        f"{model['num_query_groups']} key-value heads, hidden size {model['hidden_size']}. "
        f"Not claimed: {NOT_CLAIMED}."
    )
    tell(", ".join(f"{name} {version}" for name, version in certificate.versions.items()))
    tell(f"digest {digest_of(certificate.content)}")


def write_certificate(certificate: Certificate, output: Path) -> None:
    """All of it and a digest of that, as JSON; ConfigurationError if it cannot be written."""
    content = {**certificate.content, "digest": digest_of(certificate.content)}
    try:
        write_atomically(output, json.dumps(content, indent=2, default=sorted) + "\n")
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written ({error.strerror}).") from error
