"""Kernels for CPUs: products by oneDNN, sums in chunks, RMSNorm; and malloc's settings."""

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# What takes several operations on a CPU is often one kernel on a GPU. A rehearsal, which runs the CPU's operations to
# find out what a GPU will do, is told where; nobody else listens.

_Function = TypeVar("_Function", bound=Callable[..., Any])
listener: Callable[[Callable[..., Any], tuple[Any, ...]], Any] | None = None


def one_kernel_on_gpu(function: _Function) -> _Function:
    """Decorate a function of tensors, given by position, that a GPU computes in one launch."""

    @wraps(function)
    def run(*args: Any) -> Any:
        return function(*args) if listener is None else listener(function, args)

    return run  # pyright: ignore[reportReturnType]


# torch multiplies float32 matrices on a CPU with MKL. On an AMD EPYC with AVX-512, oneDNN takes 5 to 10% less time for
# a layer's product, and 30 to 40% less for the narrow products of a low rank and for a few tokens. It takes 15
# microseconds more a call, and a millisecond for the first of a shape: MKL is faster below a million multiplications.
#
# Only for use without autograd: inside autograd functions, and in generation.

# torch.compile's operator for a linear layer; None: torch's own product is used.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_FEWEST_FOR_ONEDNN = 2**20  # multiplications


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [..., in], [out, in] -> [..., out]
    """x W^T + bias; W may be a transposed view."""
    if _is_for_onednn(x, len(weight)):
        y = _ONEDNN(flat(x).contiguous(), weight, bias, "none", [], "")
    else:
        # Of [s, 1, h] with the strides of [1, s, h], as an embedding gives it, torch would make s products of one row.
        y = F.linear(flat(x), weight, bias)
    # Not a view: an autograd function's caller could not write to a view that it returns.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def linear_into(y: Tensor, x: Tensor, weight: Tensor) -> None:  # [n, out], [n, in], [out, in]
    """x W^T in the memory of y, which may have strides."""
    if _is_for_onednn(x, len(weight)):
        y.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.t(), out=y)


def linear_plus(x: Tensor, weight: Tensor, u: Tensor, narrow: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + u N^T + bias, one of the two products added to the other in place."""
    if _is_for_onednn(x, len(weight)):
        y = linear(x, weight, bias)
        flat(y).addmm_(flat(u), narrow.t())
        return y
    # In low precision the narrow product comes first, so that the sum is rounded once.
    return add_linear(F.linear(u, narrow, bias), x, weight)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, in the memory of y."""
    if _is_for_onednn(x, len(weight)):
        return y.add_(linear(x, weight))
    flat(y).addmm_(flat(x), weight.t())
    return y


@one_kernel_on_gpu
def outer_sum(grad: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """grad^T x over all tokens, [..., out], [..., in] -> [out, in], in `dtype` (default: that of grad).

    A quarter faster if out, rather than in, is the narrow side.
    """
    if _is_for_onednn(grad, x.shape[-1]):
        return _ONEDNN(flat(grad).t(), flat(x).t(), None, "none", [], "")
    if dtype is None or grad.dtype == dtype:
        return flat(grad).t() @ flat(x)
    if grad.device.type == "cpu":  # which has no product that keeps the precision of its sums
        return flat(grad).t().to(dtype) @ flat(x).to(dtype)
    return torch.mm(flat(grad).t(), flat(x), out_dtype=dtype)


def _is_for_onednn(x: Tensor, width: int) -> bool:
    """Whether it is worth while for a product of `x` with a matrix of so many other features."""
    return onednn_takes(x) and x.numel() * width >= _FEWEST_FOR_ONEDNN


def onednn_takes(x: Tensor) -> bool:
    """Whether oneDNN multiplies such tensors. It is faster at some rows of a large matrix after the others."""
    return _ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def flat(x: Tensor) -> Tensor:  # [..., n] -> [tokens, n]
    """A view where x is contiguous."""
    return x.reshape(-1, x.shape[-1])


CACHED_TOKENS = 128


def outer_sums(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:  # [k, g, n], [k, n, g] -> [k, g, g]
    """sum over tokens of grad x^T by block, in `dtype`."""
    return add_outer_sums(grad.new_zeros(*grad.shape[:2], x.shape[2], dtype=dtype), grad, x)


@one_kernel_on_gpu
def add_outer_sums(total: Tensor, grad: Tensor, x: Tensor) -> Tensor:  # [k, g, g], [k, g, n], [k, n, g] -> [k, g, g]
    """total += the sum over tokens of grad x^T by block, in the precision of `total`.

    On a CPU in chunks of tokens that stay in its cache: for wide layers (k g of 3,072) a single product is
    1.5 times slower, because the columns of a block are not contiguous.
    """
    if not sums_in_chunks(grad):  # a launch or two
        same = grad.dtype == total.dtype
        return total.baddbmm_(grad, x) if same else total.add_(torch.bmm(grad, x, out_dtype=total.dtype))
    for some_grad, some_x in zip(grad.split(CACHED_TOKENS, 2), x.split(CACHED_TOKENS, 1), strict=True):
        total.baddbmm_(some_grad.to(total.dtype), some_x.to(total.dtype))
    return total


def sums_in_chunks(grad: Tensor) -> bool:
    """Whether a sum over tokens is made in chunks: on a CPU whose tensors do not stand for a GPU's."""
    return grad.device.type == "cpu" and not isinstance(grad, FakeTensor)


@one_kernel_on_gpu
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return _scaled(x, weight, rstd), rstd


@one_kernel_on_gpu
def _scaled(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return (x * rstd).mul_(weight).to(x.dtype)


@one_kernel_on_gpu
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    wide, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
    grad_x = grad_weight = None
    if needs_weight:
        grad_weight = (grad * wide).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)
    if needs_x:
        u = grad * weight
        coefficient = torch.linalg.vecdot(u, wide).unsqueeze(-1).mul_(rstd**3).div_(-x.shape[-1])
        grad_x = u.mul_(rstd).addcmul_(wide, coefficient).to(x.dtype)
    return grad_x, grad_weight


class RootMeanSquareNorm(torch.autograd.Function):
    """RMSNorm in three passes; torch's seven elementwise operators take six times as long on a CPU.

    With r = 1 / sqrt(mean(x^2) + eps) and u = g * weight, dx = r u - x r^3 mean(u x), dweight = sum(g x r).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.recompute_output = lambda ctx: _scaled(*ctx.saved_tensors)  # consumers recompute y instead of saving it
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return *_rms_norm_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None


# malloc's settings (glibc only). By default glibc returns freed activations to the system, and the next step faults
# every page in again: 2% of a LoRA step's time, more of full fine-tuning. The peak is the same either way.

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_NEVER = 2**31 - 1  # bytes free at the end of the heap
_LARGEST = 2**25  # glibc's limit: larger blocks are always returned to the system
_SMALLEST = 2**16
_gives_back = False


def keep_freed_memory() -> None:
    """Freed memory stays with the process, unless `give_back_freed_memory` was called before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt and not _gives_back:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> None:
    """Freed blocks of 64 KiB and more return to the system, so that resident memory is the memory in use."""
    global _gives_back
    _gives_back = True
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_THRESHOLD, _SMALLEST)
