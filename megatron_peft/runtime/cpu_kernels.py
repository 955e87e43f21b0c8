"""What CPUs do otherwise: products by oneDNN, sums in pieces, RMSNorm, memory that stays with the process."""

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Products of matrices in float32 on a CPU by oneDNN, which torch has but does not use for them by itself.
#
# torch multiplies float32 by MKL there (bfloat16 by oneDNN). On an AMD EPYC with AVX-512 oneDNN takes 5 to 10% less
# time for a layer's product, 30 to 40% less for the narrow ones of a low rank and for a few tokens. The operator is
# the one that torch's compiler writes for a linear layer; where it is missing, and for every other type and device,
# torch's own is used.
#
# Only where no gradient is recorded: inside autograd functions and in generation.


def _operator() -> Any:
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise
    return None


_ONEDNN = _operator()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [..., in], [out, in] -> [..., out]
    """x W^T + bias; W may be a transposed view."""
    if _is_for_onednn(x):
        # Not a view of the product: out of an autograd function, its caller could not write to one.
        y = _ONEDNN(flat(x).contiguous(), weight, bias, "none", [], "")
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return F.linear(x, weight, bias)


def linear_plus(x: Tensor, weight: Tensor, u: Tensor, narrow: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + u N^T + bias, one of the two products added to the other in place.

    In a low precision the narrow one comes first: the sum is rounded once, as it is accumulated.
    """
    if _is_for_onednn(x):
        y = linear(x, weight, bias)
        flat(y).addmm_(flat(u), narrow.t())
        return y
    return add_linear(F.linear(u, narrow, bias), x, weight)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, in the memory of y."""
    if _is_for_onednn(x):
        return y.add_(linear(x, weight))
    flat(y).addmm_(flat(x), weight.t())
    return y


def outer_sum(grad: Tensor, x: Tensor) -> Tensor:  # [..., out], [..., in] -> [out, in]
    """grad^T x over all tokens. Fast where out is the narrow side; the other way round it takes a quarter longer."""
    if _is_for_onednn(grad):
        return _ONEDNN(flat(grad).t(), flat(x).t(), None, "none", [], "")
    return flat(grad).t() @ flat(x)


def _is_for_onednn(x: Tensor) -> bool:
    return _ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def flat(x: Tensor) -> Tensor:  # [..., n] -> [tokens, n]
    """A view where x is contiguous."""
    return x.reshape(-1, x.shape[-1])


CACHED_TOKENS = 128


def outer_sums(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:  # [k, g, n], [k, n, g] -> [k, g, g]
    """sum over tokens of grad x^T by block, in `dtype`.

    On a CPU in pieces of the tokens that stay in its cache: a block's columns lie far apart, and of wide layers (k g of
    3,072) the whole takes half as long again.
    """
    if grad.is_cuda or grad.dtype != dtype:  # one launch; one rounding
        return torch.bmm(grad, x).to(dtype)
    total = grad.new_zeros(*grad.shape[:2], x.shape[2])
    for some_grad, some_x in zip(grad.split(CACHED_TOKENS, 2), x.split(CACHED_TOKENS, 1), strict=True):
        total.baddbmm_(some_grad, some_x)
    return total


def fuses_norms(x: Tensor) -> bool:
    """Whether torch has RMSNorm as one kernel, as it has on a GPU."""
    return x.is_cuda


def _scaled(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return (x * rstd).mul_(weight).to(x.dtype)


def _recompute_norm(ctx: Any) -> Tensor:
    return _scaled(*ctx.saved_tensors)


class RootMeanSquareNorm(torch.autograd.Function):
    """RMSNorm. torch composes it of seven elementwise operators; this takes three passes and a sixth of the time.

    With r = 1 / sqrt(mean(x^2) + eps) and u = g * weight, dx = r u - x r^3 mean(u x), dweight = sum(g x r).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = x if x.dtype == torch.float64 else x.float()
        rstd = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, rstd)
        ctx.recompute_output = _recompute_norm  # consumers recompute y instead of saving it
        return _scaled(x, weight, rstd)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        wide, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * wide).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            u = grad * weight
            coefficient = torch.linalg.vecdot(u, wide).unsqueeze(-1).mul_(rstd**3).div_(-x.shape[-1])
            grad_x = u.mul_(rstd).addcmul_(wide, coefficient).to(x.dtype)
        return grad_x, grad_weight, None


# What the C library of a CPU process does with memory that torch frees (glibc; elsewhere nothing is changed).
#
# torch keeps no memory of its own on a CPU. glibc hands the end of its heap back to the system as soon as a few dozen
# MiB of it are free, so that a step that frees its activations pays for every page of them anew in the next step: one
# part in fifty of a LoRA step, more of full fine-tuning. The peak is the same either way.

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_NEVER = 2**31 - 1  # bytes free at the end of the heap
_LARGEST = 2**25  # the most that glibc takes: larger blocks come from the system and go back to it
_SMALLEST = 2**16
_decided = False


def keep_freed_memory() -> None:
    """From now on freed memory stays with the process, unless `give_back_freed_memory` was called before."""
    _decide({_MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: _NEVER})


def give_back_freed_memory() -> None:
    """From now on blocks of 64 KiB and more go back to the system when they are freed: what is held is what is used."""
    _decide({_MMAP_THRESHOLD: _SMALLEST})


def _decide(options: dict[int, int]) -> None:
    global _decided
    if _decided or not sys.platform.startswith("linux"):
        return
    _decided = True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
