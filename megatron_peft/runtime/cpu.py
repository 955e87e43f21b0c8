"""megatron-core without a GPU: its unconditional CUDA calls are redirected to the CPU, and it runs on gloo.

Beside `fake_ranks.py`, no other file replaces an attribute of torch or megatron-core. `redirect_norm` alone also acts
on a GPU.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint")
_installed = False


def install() -> None:
    """Redirect megatron-core's CUDA calls to the CPU, unless there is a GPU. Later calls do nothing."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _redirect_devices()
    _redirect_tensor_methods()
    _redirect_generator()


def redirect_norm() -> None:
    """Let megatron-core read one number for the norm of the gradients where neither Transformer Engine nor Apex is.

    Its own substitute for their kernel reads the norm of every gradient, on a GPU too: this is the one replacement
    that one may need. On a CPU the numbers are the same, bit for bit.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm  # pyright: ignore[reportAttributeAccessIssue]


def _norm(chunk_size: int, overflow: Any, tensors: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    norms = [torch.norm(tensor).float() for same_kind in tensors for tensor in same_kind]
    return torch.norm(torch.stack(norms)).view(1), None


def _redirect_devices() -> None:
    """The device of megatron-core's buffers, `device="cuda"` of its token counters, norms and loss scales; streams."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 0
    torch.cuda.set_device = lambda device: None
    # torch caches the factories that `with torch.device(...)` acts on: fill the cache with the originals.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    stream = _Stream()
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: stream  # type: ignore[assignment, return-value]
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment, misc]
    torch.cuda.empty_cache = lambda: None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same factory, with device="cuda" replaced by the CPU."""

    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return redirected


class _Stream:
    """An empty stream. A class, because transformers' annotations have `torch.cuda.Stream | None`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = record_event = wait


def _redirect_tensor_methods() -> None:
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        # megatron-core's optimizers compare it with "torch.cuda.FloatTensor".
        called_by_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core")
        if isinstance(result, str) and called_by_megatron:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    @functools.wraps(torch.Tensor.cuda)
    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    torch.Tensor.type = tensor_type  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = tensor_cuda  # type: ignore[assignment, method-assign]


def _redirect_generator() -> None:
    """Use the default CPU generator in place of the CUDA one, which dropout and activation recompute use.

    megatron-core also asks Transformer Engine whether FP8 is on when it recomputes a norm, in any precision.
    """
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.FloatTensor = torch.FloatTensor  # type: ignore[attr-defined]
    tensor_parallel_random._get_cuda_rng_state = get_state
    tensor_parallel_random._set_cuda_rng_state = set_state
    # megatron-core would warn at each forward that the CPU generator has changed.
    logging.getLogger(tensor_parallel_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    if not hasattr(tensor_parallel_random, "FP8GlobalStateManager"):
        off = SimpleNamespace(is_fp8_enabled=lambda: False)
        tensor_parallel_random.FP8GlobalStateManager = off  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("activation_recompute_forward", "fp8_autocast"):
            setattr(tensor_parallel_random, name, lambda **_: contextlib.nullcontext())
