"""What is installed, and how float32 products are rounded."""

import ctypes
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import Any

import torch
from torch.cuda import nccl

from megatron_peft.benchmarks.measure import Figure
from megatron_peft.models.kernels import Installed

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton")
NCCL = "nvidia-nccl-cu"  # torch's wheel brings one for its CUDA: nvidia-nccl-cu13
FLAGS = {
    "float32 products on tensor cores (TF32)": lambda: torch.backends.cuda.matmul.allow_tf32,
    "TF32 in cuDNN": lambda: torch.backends.cudnn.allow_tf32,
    "bf16 sums of split products": lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
}


def installed() -> Iterator[Figure]:
    """Packages, flags and the device; 1 for what is there, 0 for what is not."""
    yield Figure("GPUs", float(torch.cuda.is_available()), note=_device())
    for name in PACKAGES:
        found = _version(name)
        yield Figure(name, float(found is not None), note=found or "")
    for name, is_set in FLAGS.items():
        yield Figure(name, float(is_set()))
    for name, one in vars(Installed.detected()).items():
        yield Figure(f"found: {name}", float(one not in (False, 0, (0, 0), "")), note=str(one))


def driver() -> list[Figure]:
    """Its release by NVML, where nvidia-ml-py is installed, and else the newest CUDA that it takes."""
    if not torch.cuda.is_available():
        return [Figure("driver", 0.0)]
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        return [Figure("driver", 1.0, note=str(nvml.nvmlSystemGetDriverVersion()))]
    except Exception:  # the package is missing, or NVML's library (the package's own NVMLError)
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        newest = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
        return [Figure("driver", 1.0, note=f"takes {newest}; nvidia-ml-py would tell its release")]


def nccl_libraries() -> list[Figure]:
    """The one that torch loads, and packages that bring one."""
    packages = [f"{one.name} {one.version}" for one in distributions() if one.name.startswith(NCCL)]
    loaded = [f"torch's {'.'.join(map(str, nccl.version()))}"] if torch.cuda.is_available() else []
    return [Figure("NCCL", float(bool(loaded or packages)), note=", ".join([*loaded, *packages]))]


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
