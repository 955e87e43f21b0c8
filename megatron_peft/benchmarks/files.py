"""Time and memory of loading and converting a model, beside reading the same files with plain safetensors.

Times are CPU seconds with the files in the page cache: what the code costs, whatever the disk. Every job is compared
with reading alone, also those that write as much as they read.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.memory import peak_of_bare_torch
from megatron_peft.benchmarks.measure import median_ratio, take_turns
from megatron_peft.conversion.pretrained import open_weights, owned_rules, read_model_shape
from megatron_peft.conversion.to_huggingface import megatron_to_hf
from megatron_peft.conversion.to_megatron import hf_to_megatron

MIB = 2**20
MIB_ABOVE_TORCH = 400
SLOWER = 1 / 0.7  # 70% of the throughput
NUM_TURNS = 9
READ = "read plainly"


def convert_figures(model: Path, work: Path) -> list[Figure]:
    """`model` is a Hugging Face folder of one file; `work` is emptied, and removed at the end."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    megatron = hf_to_megatron(model, work / "megatron", progress=False)
    torch.set_num_threads(1)
    seconds = take_turns(
        {
            READ: lambda: read_plainly(model),
            "load Hugging Face": lambda: load_whole(model),
            "load Megatron": lambda: load_whole(megatron),
            "hf-to-megatron": lambda: _into_new(work, lambda new: hf_to_megatron(model, new, progress=False)),
            "megatron-to-hf": lambda: _into_new(work, lambda new: megatron_to_hf(megatron, new, progress=False)),
        },
        NUM_TURNS,
    )
    shutil.rmtree(work)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / MIB
    plain = seconds.pop(READ)
    figures = [
        Figure(
            f"{name}: time / {READ}",
            median_ratio(spent, plain),
            SLOWER,
            "",
            f"{median(spent):.2f} s for {size:.0f} MiB, plain {median(plain):.2f} s",
        )
        for name, spent in seconds.items()
    ]
    return [*figures, _memory_figure(model, work)]


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


def _into_new(work: Path, convert: Callable[[Path], object]) -> None:
    convert(work / "new")
    shutil.rmtree(work / "new")


def _memory_figure(model: Path, work: Path) -> Figure:
    """Of a process that does nothing else."""
    program = (
        "from megatron_peft.conversion.to_megatron import hf_to_megatron\n"
        f"hf_to_megatron({str(model)!r}, {str(work)!r}, progress=False)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    shutil.rmtree(work)
    peak, bare = int(done.stdout) * 1024, peak_of_bare_torch()
    note = f"peak {peak / MIB:.0f}, torch alone {bare / MIB:.0f} MiB"
    return Figure(
        "hf-to-megatron: peak memory above python with torch", (peak - bare) / MIB, MIB_ABOVE_TORCH, "MiB", note
    )
