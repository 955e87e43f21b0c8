"""One autograd function for a frozen linear layer and its low-rank branch: y = W x + s B (A x).

Fused by hand so that the branch costs its arithmetic and little else: the base's products are accumulated onto the
branch's, which spares a pass over y and one over dx; the branch's part of dx joins the base's before the one
all-reduce (or reduce-scatter) that the base does anyway; and the tensors kept for backward are the rank's own x, once,
and the r-wide u.

    backward, with g = dy:   u = s A x   du = s g B   dx = g W + du A   dB = g^T u   dA = du^T x

Under sequence parallelism (column-parallel layers) A is applied to the rank's own tokens and the r-wide u is gathered;
du is summed and scattered back, r-wide too. The gathered x is never kept.

Letters: s sequence, b batch, r rank, t tensor-parallel size; in and out are a rank's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)


@dataclass(frozen=True)
class FrozenLinearCall:
    """What megatron-core hands to a linear layer's `_forward_impl`, for a frozen weight.

    Args:
        weight: [out, in].
        bias: [out] or None; added here only where the layer does not leave it to its caller.
        sums_input_gradient: the input is whole on every rank, so dx is a partial sum (column, no sequence parallelism).
        splits_sequence: the input holds the rank's own tokens only, [s / t, b, in].
        group: tensor-parallel ranks.
    """

    weight: Tensor
    bias: Tensor | None
    sums_input_gradient: bool
    splits_sequence: bool
    group: dist.ProcessGroup


def frozen_linear_plus_low_rank(
    x: Tensor, A: Tensor, B: Tensor, scale: float, call: FrozenLinearCall, mask: Tensor | None = None
) -> Tensor:
    """y = W x + s B (A (mask x)).

    Args:
        x: [s, b, in], or [s / t, b, in] where the sequence is split.
        A, B: [r, in], [out, r].
        mask: dropout of the branch's input, shaped like x.

    Returns:
        [s, b, out].
    """
    return _FrozenLinearPlusLowRank.apply(x, A, B, scale, call, mask)


class _FrozenLinearPlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, scale, call, mask):  # type: ignore[override]
        branch_input = x if mask is None else x * mask
        u = (branch_input @ A.t()).mul_(scale)
        if call.splits_sequence:
            wait_u = start_gather_sequence_over_tensor_parallel(u, call.group)
            x = start_gather_sequence_over_tensor_parallel(x, call.group)()
            u = wait_u()
        y = F.linear(u, B, call.bias)
        _flat(y).addmm_(_flat(x), call.weight.t())
        ctx.save_for_backward(branch_input, u, A, B, call.weight, mask)
        ctx.scale, ctx.call = scale, call
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        branch_input, u, A, B, weight, mask = ctx.saved_tensors
        call = ctx.call
        du = (grad @ B).mul_(ctx.scale)
        if call.splits_sequence:
            wait_du = start_sum_scatter_sequence_over_tensor_parallel(du, call.group)
            wait_dx = start_sum_scatter_sequence_over_tensor_parallel(grad @ weight, call.group)
            dB = _weight_gradient(u, grad).t()
            du = wait_du()
            dx = _add_branch(wait_dx(), du, A, mask)
        else:
            dx = du @ A if mask is None else (du @ A).mul_(mask)
            _flat(dx).addmm_(_flat(grad), weight)
            wait_dx = start_sum_over_tensor_parallel(dx, call.group) if call.sums_input_gradient else lambda: dx
            dB = _weight_gradient(u, grad).t()
        dA = _weight_gradient(du, branch_input)
        if not call.splits_sequence:
            dx = wait_dx()
        return dx, dA, dB, None, None, None


def _flat(x: Tensor) -> Tensor:  # [s, b, n] -> [s b, n]
    return x.reshape(-1, x.shape[-1])


def _add_branch(dx: Tensor, du: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """dx + mask (du A), in place where nothing has to be masked."""
    if mask is None:
        _flat(dx).addmm_(_flat(du), A)
        return dx
    return dx.addcmul_(mask, du @ A)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:  # [s, b, out], [s, b, in] -> [out, in]
    """Fast where out is the narrow side; the other way round it takes a quarter longer."""
    return _flat(grad).t() @ _flat(x)
