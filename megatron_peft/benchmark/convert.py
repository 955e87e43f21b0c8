"""Time and memory of loading and converting a model, beside plain safetensors on the same files.

Times are CPU seconds, the least of several turns that alternate, with the files in the page cache: what the code costs,
whatever the disk.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.memory import peak_of_bare_torch
from megatron_peft.conversion.pretrained import open_weights, owned_rules, read_model_shape
from megatron_peft.conversion.to_huggingface import megatron_to_hf
from megatron_peft.conversion.to_megatron import hf_to_megatron

MIB = 2**20
BLOCK_BYTES = 16 * MIB
MIB_ABOVE_TORCH = 400
SLOWER = 1 / 0.7  # 70% of the throughput
NUM_TURNS = 5
Job = Callable[[], object]


def convert_figures(model: Path, work: Path) -> list[Figure]:
    """`model` is a Hugging Face folder of one file; `work` is emptied, and removed at the end."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    megatron = hf_to_megatron(model, work / "megatron", progress=False)
    seconds = _least_seconds(
        {
            "read": lambda: read_plainly(model),
            "write": lambda: _write_bytes(model, work),
            "read and write": lambda: _rewrite_plainly(model, work),
            "load Hugging Face": lambda: load_whole(model),
            "load Megatron": lambda: load_whole(megatron),
            "hf-to-megatron": lambda: _into_new(work, lambda new: hf_to_megatron(model, new, progress=False)),
            "megatron-to-hf": lambda: _into_new(work, lambda new: megatron_to_hf(megatron, new, progress=False)),
        }
    )
    shutil.rmtree(work)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / MIB
    pairs = [(name, plain) for plain, names in PEERS.items() for name in names]
    notes = {name: f"{seconds[name]:.2f} s for {size:.0f} MiB, plain {seconds[plain]:.2f} s" for name, plain in pairs}
    alone = f"; reading alone {seconds['read']:.2f} s, writing bytes alone {seconds['write']:.2f} s"
    notes |= {name: notes[name] + alone for name in PEERS["read and write"]}
    return [
        *(Figure(f"{n}: time / {p} plainly", seconds[n] / seconds[p], SLOWER, "", notes[n]) for n, p in pairs),
        _memory_figure(model, work),
    ]


# What a job is compared with: the same work by safetensors alone.
PEERS = {
    "read": ("load Hugging Face", "load Megatron"),
    "read and write": ("hf-to-megatron", "megatron-to-hf"),
}


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


def _rewrite_plainly(folder: Path, work: Path) -> None:
    save_file(read_plainly(folder), work / "plain.safetensors")
    (work / "plain.safetensors").unlink()


def _write_bytes(folder: Path, work: Path) -> None:
    """As many bytes as the model has, out of memory that is there: what the system takes for its page cache."""
    block = memoryview(bytes(BLOCK_BYTES))
    with open(work / "bytes", "wb", buffering=0) as file:
        for _ in range((folder / "model.safetensors").stat().st_size // BLOCK_BYTES):
            file.write(block)
    (work / "bytes").unlink()


def _into_new(work: Path, convert: Callable[[Path], object]) -> None:
    convert(work / "new")
    shutil.rmtree(work / "new")


def _least_seconds(jobs: dict[str, Job]) -> dict[str, float]:
    """CPU seconds of each job on one thread; they take turns, so that a busy machine slows all alike."""
    torch.set_num_threads(1)
    least = dict.fromkeys(jobs, float("inf"))
    for _ in range(NUM_TURNS):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            least[name] = min(least[name], time.process_time() - start)
    return least


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
