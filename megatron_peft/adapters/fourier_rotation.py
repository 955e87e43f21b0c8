"""A structured unitary rotation applied by fast Fourier transforms: for groups too large for dense blocks.

y = U(theta) U(theta_0)^H x, or its inverse. Backward keeps y alone: the inverse gives x back, and the factors between
are computed again.

Letters: s sequence, b batch, k groups, n complex features of a group.
"""

import torch
from torch import Tensor

from megatron_peft.adapters.unitary import apply_structured, apply_structured_inverse


def rotate_by_fourier(
    x: Tensor, theta: Tensor, start: Tensor, permutation: Tensor, tokens: slice, inverse: bool
) -> Tensor:  # [s, b, 2 k n], twice
    """y = Q x, Q = U(theta) U(theta_0)^H; with `inverse` y = Q^H x.

    Args:
        theta, start, permutation: [k, 7, n], [k, 7, n], [n].
        tokens: rows of the flattened tokens over which this rank forms the gradient of theta.
    """
    return _RotateByFourier.apply(x, theta, start, permutation, tokens, inverse)


class _RotateByFourier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, start, permutation, tokens, inverse):  # type: ignore[override]
        y = _as_features(_turned(_as_complex(x, theta), theta, start, permutation, inverse), x)
        ctx.save_for_backward(y, theta, start, permutation)
        ctx.tokens, ctx.inverse = tokens, inverse
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        y, theta, start, permutation = ctx.saved_tensors
        upstream = _as_complex(grad, theta)
        x = _turned(_as_complex(y, theta), theta, start, permutation, not ctx.inverse)
        dx = _as_features(_turned(upstream, theta, start, permutation, not ctx.inverse), grad)
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            again = _turned(x[ctx.tokens].detach(), theta, start, permutation, ctx.inverse)
            (dtheta,) = torch.autograd.grad(again, theta, upstream[ctx.tokens])
        return dx, dtheta, None, None, None, None


def _turned(x: Tensor, theta: Tensor, start: Tensor, permutation: Tensor, inverse: bool) -> Tensor:
    first, second = (theta, start) if inverse else (start, theta)
    return apply_structured(apply_structured_inverse(x, first, permutation), second, permutation)


def _as_complex(x: Tensor, theta: Tensor) -> Tensor:  # [s, b, 2 k n] -> [s b, k, n]
    groups, _, size = theta.shape
    return torch.view_as_complex(x.reshape(-1, groups, size, 2).to(theta.dtype).contiguous())


def _as_features(x: Tensor, like: Tensor) -> Tensor:  # [s b, k, n] -> [s, b, 2 k n]
    return torch.view_as_real(x).reshape(like.shape).to(like.dtype)
