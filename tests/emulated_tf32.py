"""TF32 on a CPU: factors of float32 products are rounded as a GPU would, where torch's settings would let it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Products, and which of their arguments are the factors.
FACTORS = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.linear), slice(0, 2)),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.addmv, aten.baddbmm, aten.baddbmm_), slice(1, 3)),
    torch.ops.mkldnn._linear_pointwise: slice(0, 2),  # the products of runtime/cpu_kernels.py
}
DROPPED_BITS = 23 - 10


class EmulatedTF32(TorchDispatchMode):
    """Context manager; `num_rounded` counts the products with rounded factors. Complex ones are rounded as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        factors = FACTORS.get(func.overloadpacket)
        if factors and torch.backends.cuda.matmul.fp32_precision == "tf32":
            rounded = [as_tf32(arg) for arg in args[factors]]
            self.num_rounded += any(new is not old for new, old in zip(rounded, args[factors], strict=True))
            args = (*args[: factors.start], *rounded, *args[factors.stop :])
        return func(*args, **(kwargs or {}))


@contextmanager
def tf32() -> Iterator[EmulatedTF32]:
    """On a GPU with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, whose whole effect is this setting."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with nullcontext() if torch.cuda.is_available() else EmulatedTF32() as mode:  # type: ignore[assignment]
            yield mode
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def as_tf32(x: Tensor) -> Tensor:
    """x to the nearest number with 10 bits of mantissa, ties to even; other types as they are."""
    if x.dtype == torch.complex64:
        return torch.view_as_complex(as_tf32(torch.view_as_real(x.resolve_conj())))
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    half = (1 << (DROPPED_BITS - 1)) - 1 + (bits >> DROPPED_BITS & 1)
    return (bits + half >> DROPPED_BITS << DROPPED_BITS).view(torch.float32)
