"""With this folder in PYTHONPATH, torch finds eight GPUs in every process whose CUDA_VISIBLE_DEVICES is not empty.

The number is kept once it was asked for, and forks share it, as with CUDA's own runtime. There is no device behind it:
whatever would use one raises what torch raises then. The first process finds neither Transformer Engine nor Apex; in
all others looking for them is an error.
"""

import os
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NUM_GPUS = 8
FIRST = os.environ.setdefault("PROCESS_WITH_SIMULATED_GPUS", str(os.getpid()))
_asked: dict[str, int] = {}


def _count() -> int:
    if not _asked:
        _asked.update(count=0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else NUM_GPUS, process=os.getpid())
    return _asked["count"]


def _init() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system: its GPUs are simulated.")


def _simulate(torch: Any) -> None:
    torch._C._cuda_getDeviceCount = _count
    torch._C._cuda_init = torch._C._cuda_getCurrentRawStream = _init
    torch.cuda._cudart = ModuleType("cudart")
    torch.cuda._is_in_bad_fork = lambda: _asked.get("process", os.getpid()) != os.getpid()


class _Finder:
    """Finds torch where it is, and simulates as soon as it has been imported."""

    def __init__(self) -> None:
        self.has_torch = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in ("transformer_engine", "apex", "amp_C") and FIRST != str(os.getpid()):
            raise RuntimeError(f"{name} is for GPUs, and this process computes on the CPU")
        if name != "torch" or self.has_torch:
            return None
        self.has_torch = True
        spec: Any = find_spec("torch")
        execute = spec.loader.exec_module

        def execute_and_simulate(module: ModuleType) -> None:
            execute(module)
            _simulate(module)

        spec.loader.exec_module = execute_and_simulate
        return spec


sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
