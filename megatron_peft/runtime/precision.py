"""The precision of products on a GPU, set for the time of a computation and given back afterwards.

Torch may round the factors of a float32 product to TF32 (container images ask for it in the environment), and sum a
bfloat16 product that is split along its inner side in that type. A model can bear both. Matrices that must stay
orthogonal cannot, and neither can gradients of narrow factors, whose products are split because they are narrow.

    with full_precision:                    @full_precision
        R = cayley(Q)                       def forward(ctx, ...):

The settings are the process's own, so they also hold on the threads that run backward, and count when a product is
launched. Outside these lines they are what a program that trains our adapters made them.
"""

import threading
from contextlib import ContextDecorator
from typing import Any

import torch

PRECISE = (torch.float32, torch.float64)  # gradients and blocks are not rounded to these types

_CUDA: Any = torch.backends.cuda.matmul
_MKLDNN: Any = getattr(torch.backends.mkldnn, "matmul", None)
_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
# torch 2.9 and later have a setting for each backend beside the older one for all of them; "none" is torch's default.
_BACKENDS = [backend for backend in (_CUDA, _MKLDNN) if hasattr(backend, "fp32_precision")]
_ROUNDED = ("tf32", "bf16")


class _FullPrecision(ContextDecorator):
    """It may be nested, also over threads: the first to come in keeps the settings, the last to leave gives them back.

    A call costs a few microseconds, a nested one less than one.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._settings = None

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._settings = _set_full_precision()

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                _give_back(*self._settings)  # type: ignore[misc]


full_precision = _FullPrecision()


def _set_full_precision() -> tuple[str | None, list[str], list[str]]:
    """(the setting for all backends, those of each, the reductions that were allowed), for `_give_back`."""
    reductions = [name for name in _REDUCTIONS if getattr(_CUDA, name)]
    for name in reductions:
        setattr(_CUDA, name, False)
    try:
        for_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has set single backends: torch refuses to name one setting for all
        for_all = None
    if for_all == "highest":  # torch has seen to it that no backend says otherwise
        return for_all, [], reductions
    for_each = [backend.fp32_precision for backend in _BACKENDS]
    if for_all is not None:
        torch.set_float32_matmul_precision("highest")  # sets those of each backend too
    for backend in _BACKENDS:
        if backend.fp32_precision in _ROUNDED:
            backend.fp32_precision = "ieee"
    return for_all, for_each, reductions


def _give_back(for_all: str | None, for_each: list[str], reductions: list[str]) -> None:
    for name in reductions:
        setattr(_CUDA, name, True)
    if for_all not in ("highest", None):
        torch.set_float32_matmul_precision(for_all)
    for backend, precision in zip(_BACKENDS, for_each, strict=False):
        backend.fp32_precision = precision
