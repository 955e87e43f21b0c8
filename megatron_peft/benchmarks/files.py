"""Files: loading a model, converting one, starting the program; beside reading them with plain safetensors."""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from megatron_peft.adapters.quantized_weight import stored_tensors, trained_values
from megatron_peft.benchmarks.measure import Figure, median_ratio, peak_of_program, take_turns
from megatron_peft.benchmarks.subjects import Setting, load_base, on_ranks
from megatron_peft.config.model import BLOCK
from megatron_peft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_peft.conversion.hf_files import ReadCounts, Source, is_whole_rows
from megatron_peft.conversion.pretrained import base_parameters, open_weights, owned_rules, read_model_shape
from megatron_peft.runtime.cpu_kernels import give_back_freed_memory
from megatron_peft.training.metrics import memory_bytes

# Time and memory of loading and converting a model, beside reading the same files with plain safetensors.
#
# Times are CPU seconds with the files in the page cache: what the code costs, whatever the disk. Every job is compared
# with reading alone, also those that write as much as they read.

MIB = 2**20
MIB_ABOVE_TORCH = 400
SLOWER = 1 / 0.7  # 70% of the throughput
NUM_TURNS = 9
READ = "read plainly"


def convert_figures(setting: Setting) -> list[Figure]:
    """The model is a Hugging Face folder of one file; copies lie beside it for the time being."""
    model = Path(setting.checkpoint)
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".convert.") as folder:
        work = Path(folder)
        megatron = hf_to_megatron(model, work / "megatron", progress=False)

        def into_new(convert: Callable[[Path], object]) -> None:
            convert(work / "new")
            shutil.rmtree(work / "new")

        torch.set_num_threads(1)
        seconds = take_turns(
            {
                READ: lambda: read_plainly(model),
                "load Hugging Face": lambda: load_whole(model),
                "load Megatron": lambda: load_whole(megatron),
                "hf-to-megatron": lambda: into_new(lambda new: hf_to_megatron(model, new, progress=False)),
                "megatron-to-hf": lambda: into_new(lambda new: megatron_to_hf(megatron, new, progress=False)),
            },
            NUM_TURNS,
        )
        # Memory of a process that does nothing else.
        program = f"from megatron_peft.conversion.convert import hf_to_megatron\nhf_to_megatron({str(model)!r}, "
        peak = peak_of_program(f"{program}{str(work / 'new')!r}, progress=False)")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / MIB
    plain, figures = seconds.pop(READ), []
    for name, spent in seconds.items():
        note = f"{median(spent):.2f} s for {size:.0f} MiB, plain {median(plain):.2f} s"
        figures.append(Figure(f"{name}: time / {READ}", median_ratio(spent, plain), SLOWER, "", note))
    bare = peak_of_program("import torch")
    note = f"peak {peak / MIB:.0f}, torch alone {bare / MIB:.0f} MiB"
    name = "hf-to-megatron: peak memory above python with torch"
    return [*figures, Figure(name, (peak - bare) / MIB, MIB_ABOVE_TORCH, "MiB", note)]


def read_plainly(folder: Path) -> dict[str, Tensor]:
    """Every tensor as safetensors gives it, in memory of its own rather than as a view of the mapped file."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def load_whole(folder: Path) -> list[Tensor]:
    """Every parameter of the model, as one rank loads it."""
    shape = read_model_shape(folder)
    rules, weights = open_weights(folder, shape)
    loaded = []
    for rule in owned_rules(rules, shape).values():
        local = torch.empty(rule.local_shape(1))
        weights.read(rule, local, 0, 1)
        loaded.append(local)
    return loaded


# What ranks read, and how much memory it takes, to load a model. What they read are counts: the same on any machine.

READ_OVER_SLICES = 1.05
MIB_ABOVE_THE_SHARD = 300


@dataclass(frozen=True)
class RankReads:
    """What a rank read; bytes of its parameters and of its largest resident set; the bytes and contiguous pieces of
    its slices, which it would read alone.
    """

    counts: ReadCounts
    shard: int
    peak: int
    bytes_alone: int
    pieces_alone: int


def load_on_rank(setting: Setting) -> RankReads:
    """Started on ranks."""
    chunks, report = load_base(setting)
    peak = memory_bytes()[1]
    shard = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    rules, source = open_weights(setting.checkpoint, read_model_shape(setting.checkpoint))
    assert isinstance(source, Source)
    rank = parallel_state.get_tensor_model_parallel_rank()
    bytes_alone = pieces_alone = 0
    for name, parameter in (pair for chunk in chunks for pair in base_parameters(chunk)):
        for hf_slice in rules[name].hf_slices(parameter.detach(), rank, setting.tensor_parallel):
            bytes_alone += hf_slice.view.nbytes
            # Every row of some columns lies by itself in the file.
            is_whole = is_whole_rows(hf_slice.index, source.headers[hf_slice.name].shape)
            pieces_alone += 1 if is_whole else hf_slice.view.shape[0]
    return RankReads(report.counts, shard, peak, bytes_alone, pieces_alone)


def loading_figures(setting: Setting) -> list[Figure]:
    """The rank that read the most against its slices, and the rank that grew the most against its part of the model."""
    ranks = on_ranks(load_on_rank, setting)
    bare = peak_of_program("import torch")
    most_read = max(ranks, key=lambda rank: rank.counts.bytes / rank.shard)
    largest = max(ranks, key=lambda rank: rank.peak - rank.shard)
    read, above = most_read.counts.bytes, (largest.peak - largest.shard - bare) / MIB
    read_note = f"{read / MIB:.1f} MiB read, {most_read.shard / MIB:.1f} MiB held"
    peak_note = f"peak {largest.peak / MIB:.0f}, model {largest.shard / MIB:.0f}, torch alone {bare / MIB:.0f} MiB"
    name, memory = f"{setting.layout}: bytes read / bytes of the rank's slices", "model and python with torch"
    return [
        Figure(name, read / most_read.shard, READ_OVER_SLICES, "", read_note),
        Figure(f"{setting.layout}: peak memory above {memory}", above, MIB_ABOVE_THE_SHARD, "MiB", peak_note),
    ]


# A base that is quantized while it is loaded, beside bf16.

OVER_BF16 = {"nf4": 0.285, "fp8": 0.535}
MB_BEYOND_THE_SHARD = 400


def quantized_loading_figures(setting: Setting) -> list[Figure]:
    """Bytes of the linear layers' weights, and what loading takes beyond the model that it makes."""
    figures = []
    for precision, limit in OVER_BF16.items():
        quantized_setting = replace(setting, bf16=True, base_precision=precision)
        [(held, in_bf16, beyond)] = on_ranks(load_quantized, quantized_setting)
        note = f"{held / MIB:,.1f} and {in_bf16 / MIB:,.1f} MiB"
        name = f"{precision}: peak of loading beyond the model"
        figures.append(Figure(f"{precision}: bytes of linear layers / bf16's", held / in_bf16, limit, "", note))
        figures.append(Figure(name, beyond / 1e6, MB_BEYOND_THE_SHARD, "MB"))
    return figures


def load_quantized(setting: Setting) -> tuple[int, int, int]:
    """Bytes of linear layers as held and in bf16, and the most memory beyond the model's. Started on a rank."""
    give_back_freed_memory()
    trained_values(torch.ones(1, BLOCK), setting.base_precision, torch.bfloat16)  # what the first use of it imports
    before, _ = memory_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident
    chunks, _ = load_base(setting)
    peak = memory_bytes()[1]
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    quantized = [weight for weight in weights if hasattr(weight, "quantized")]
    held, model = (sum(tensor.nbytes for w in some for tensor in stored_tensors(w)) for some in (quantized, weights))
    return held, sum(2 * weight.numel() for weight in quantized), peak - before - model


def reading_figures(setting: Setting) -> list[Figure]:
    """Bytes a replica reads, headers that the ranks of a node read, and the mean size of a read."""
    num_files = len(list(Path(setting.checkpoint).glob("*.safetensors")))
    ranks = on_ranks(load_on_rank, setting)
    read, alone = sum(rank.counts.bytes for rank in ranks), sum(rank.bytes_alone for rank in ranks)
    reads, pieces = sum(rank.counts.reads for rank in ranks), sum(rank.pieces_alone for rank in ranks)
    headers, opens = sum(rank.counts.headers for rank in ranks), sum(rank.counts.opens for rank in ranks)
    replica, replica_alone = (num_bytes / setting.data_parallel / MIB for num_bytes in (read, alone))
    size, size_alone = read / reads / 1024, alone / pieces / 1024
    headers_note = f"alone {len(ranks) * num_files}; files opened for their weights: {opens}"
    bytes_note = f"together {replica:.1f}, alone {replica_alone:.1f} MiB"
    sizes_note = f"alone {pieces:,} pieces of {size_alone:.1f} KiB, together {reads:,} reads of {size:.1f} KiB"
    name, share, nodes = setting.layout, 1 / setting.data_parallel, f"a node of {len(ranks)} ranks"
    return [
        Figure(f"{name}: bytes a replica reads / bytes of its slices", read / alone, share, "", bytes_note),
        Figure(f"{name}: headers that {nodes} reads", headers, num_files, "headers", headers_note),
        Figure(f"{name}: mean piece of a slice in the file / mean read", size_alone / size, 1.0, "", sizes_note),
    ]


# Wall seconds from starting `megatron-peft train` to the end of its first step.

PROGRAM = ("-m", "megatron_peft", "train")
SECONDS_ALLOWED = 20.0
NUM_SAMPLES = 16
FIRST_LINE = "iteration "


class ProgramFailed(RuntimeError):
    """The program ended before its first step; the text is what it printed."""


def startup_figures(setting: Setting) -> list[Figure]:
    """LoRA on the model of `setting`, one process, two iterations of two short samples."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        seconds = seconds_to_first_step(short_run(setting, Path(folder, "train.jsonl")))
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime
    note = f"to the line of the first iteration; both iterations took {cpu_seconds:.1f} CPU s in all"
    return [Figure("startup to the end of the first step", seconds, SECONDS_ALLOWED, "s", note)]


def short_run(setting: Setting, data: Path) -> list[str]:
    """A short run on `data`, which is written."""
    lines = [json.dumps({"prompt": f"What follows {n}?", "completion": f" {n + 1}"}) for n in range(NUM_SAMPLES)]
    data.write_text("\n".join(lines) + "\n")
    flags = {
        "--pretrained-checkpoint": setting.checkpoint,
        "--peft-method": "lora",
        "--train-data-path": data,
        "--seq-length": setting.positions,
        "--micro-batch-size": 2,
        "--train-iters": 2,
        "--log-interval": 1,
        "--lr": 1e-4,
    }
    return [sys.executable, "-W", "ignore", *PROGRAM, *(str(word) for pair in flags.items() for word in pair)]


def seconds_to_first_step(command: list[str]) -> float:
    """Wall seconds from starting `command` to its first iteration's line. Raises ProgramFailed: it ended before."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed: list[str] = []
    with process, process.stdout:
        for line in process.stdout:
            printed.append(line)
            if line.startswith(FIRST_LINE):
                break
        seconds = time.perf_counter() - start
        process.stdout.read()
    if not printed or not printed[-1].startswith(FIRST_LINE):
        raise ProgramFailed("".join(printed))
    return seconds
