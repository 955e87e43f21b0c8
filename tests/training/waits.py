"""Where the host waits for the device: reads of a number or of a shape made of values, and copies from the host.

On a GPU torch warns of them. It copies from memory that is not pinned, and from a list, before it returns. On a CPU a
tensor stands for one of the device if it was made with a device, and for one of the host if it was made of values
without one.
"""

import sys
import warnings
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Their result's shape is made of values; or a check reads a flag.
_READS = frozenset(
    """_local_scalar_dense nonzero nonzero_numpy is_nonzero equal masked_select _unique _unique2 unique_dim
    unique_consecutive repeat_interleave _linalg_check_errors linalg_matrix_exp""".split()
)
# These read a CPU tensor's memory without an operation that a dispatch mode could see.
_METHODS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.__array__: "__array__"}
_OF_VALUES = frozenset("tensor as_tensor asarray new_tensor from_numpy".split())
_COPIES = ("to", "cuda")
# These read tensors of the host on any device: Adam's counts of steps, the state of the CPU's generator.
_ON_THE_HOST = ("/torch/optim/", "/megatron/core/tensor_parallel/random.py")
_MACHINERY = (
    *(__file__, "/megatron_peft/runtime/cpu.py", "/torch/_compile.py", "/torch/_ops.py", "/torch/overrides.py"),
    "/torch/_dynamo/eval_frame.py",
)


class Waits:
    """`with Waits() as waits`: `waits.found` then names each read and the line that asked for it."""

    def __init__(self) -> None:
        self.found: list[str] = []
        on_gpu = torch.cuda.is_initialized()
        self._modes = [_Warnings(self.found)] if on_gpu else [_Operations(self.found), _Methods(self.found)]

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Warnings(warnings.catch_warnings):
    """Of torch on a GPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(record=True, action="always")
        self._found = found

    def __enter__(self) -> None:
        self._told: Any = super().__enter__()
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        super().__exit__(*error)
        self._found += [f"at {one.filename}:{one.lineno}" for one in self._told if "synchroniz" in str(one.message)]


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        name = func.overloadpacket.__name__
        if name in _READS or _indexes_by_mask(name, args):
            _note(self.found, name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func in _METHODS:
            _note(self.found, _METHODS[func])
        if _copies_from_the_host(name, args, kwargs):
            _note(self.found, f"{name} from the host")
        result = func(*args, **kwargs)
        if name in _OF_VALUES and kwargs.get("device") in (None, "cpu"):
            result.is_of_the_host = True
        return result


def _copies_from_the_host(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in _OF_VALUES:
        of_the_device = name == "new_tensor" and not hasattr(args[0], "is_of_the_host")
        return of_the_device or kwargs.get("device") not in (None, "cpu")
    source = args[1] if name == "copy_" else args[0] if name in _COPIES else None
    return hasattr(source, "is_of_the_host") and not (kwargs.get("non_blocking") or any(one is True for one in args))


def _indexes_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """x[mask], or x[mask] = y unless y is one number: torch then writes it without counting the mask."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not (name != "index" and len(masks) == 1 and args[2].numel() == 1)


def _note(found: list[str], name: str) -> None:
    frames = [one for one in _files(sys._getframe(2)) if not one[0].endswith(_MACHINERY)]
    if not any(place in frames[0][0] for place in _ON_THE_HOST):
        file, line = next((one for one in frames if "/torch/" not in one[0]), frames[0])
        found.append(f"{name} at {file.rpartition('site-packages/')[2]}:{line}")


def _files(frame: FrameType | None):
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
