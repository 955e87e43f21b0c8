"""What is installed, how float32 products are rounded, and one process with groups of its own."""

import ctypes
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from megatron_peft.benchmarks.check_gpu.measure import attempt
from megatron_peft.benchmarks.check_gpu.subjects import CheckPlace
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.models.kernels import Installed
from megatron_peft.runtime import cpu

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton")
NCCL = "nvidia-nccl-cu"  # torch's wheel brings one for its CUDA: nvidia-nccl-cu13
FLAGS = {
    "float32 products on tensor cores (TF32)": lambda: torch.backends.cuda.matmul.allow_tf32,
    "TF32 in cuDNN": lambda: torch.backends.cudnn.allow_tf32,
    "bf16 sums of split products": lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
}


def check_versions(place: CheckPlace) -> Iterator[Figure]:
    """Of packages, the driver and the device; 1 for what is there, 0 for what is not."""
    yield Figure("GPUs", float(torch.cuda.is_available()), note=_device())
    yield from attempt("driver", _driver)
    yield from attempt("NCCL", _nccl)
    for name in PACKAGES:
        found = _version(name)
        yield Figure(name, float(found is not None), note=found or "")
    for name, is_set in FLAGS.items():
        yield Figure(name, float(is_set()))
    for name, one in vars(Installed.detected()).items():
        yield Figure(f"found: {name}", float(one not in (False, 0, (0, 0), "")), note=str(one))


def _driver(name: str) -> Figure:
    """Its release by NVML, where nvidia-ml-py is installed, and else the newest CUDA that it takes."""
    if not torch.cuda.is_available():
        return Figure(name, 0.0)
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        return Figure(name, 1.0, note=str(nvml.nvmlSystemGetDriverVersion()))
    except Exception:  # the package is missing, or NVML's library (the package's own NVMLError)
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        newest = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
        return Figure(name, 1.0, note=f"takes {newest}; nvidia-ml-py would tell its release")


def _nccl(name: str) -> Figure:
    """The one that torch loads, and packages that bring one."""
    packages = [f"{one.name} {one.version}" for one in distributions() if one.name.startswith(NCCL)]
    loaded = [f"torch's {'.'.join(map(str, nccl.version()))}"] if torch.cuda.is_available() else []
    return Figure(name, float(bool(loaded or packages)), note=", ".join([*loaded, *packages]))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    properties = torch.cuda.get_device_properties(0)
    capability = f"sm {properties.major}{properties.minor}"
    cudnn = torch.backends.cudnn.version()
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, {capability}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def check_world(place: CheckPlace) -> list[Figure]:
    """Sums in the world and in a new group, whose store is this process's memory."""
    backend = dist.get_backend()
    group: Any = dist.new_group([0])
    ones = torch.ones(3, device=place.device)
    dist.all_reduce(ones)
    dist.all_reduce(ones, group=group)
    dist.destroy_process_group(group)
    wrong = float((ones - 1).abs().max())
    is_expected = backend == ("nccl" if torch.cuda.is_available() else "gloo")
    # Without a GPU the redirection is there, with one it must not be.
    patched = cpu.is_installed() == torch.cuda.is_available()
    return [
        Figure("a sum over one rank changes it", wrong, 0.0, note=f"backend {backend}"),
        Figure("another backend than expected", float(not is_expected), 0.0),
        Figure("CUDA calls redirected on a GPU, or not on a CPU", float(patched), 0.0),
    ]
