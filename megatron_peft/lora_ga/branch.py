"""What stands in an adapter's place while a layer's gradient is sketched: it changes nothing and sums a narrow product.

    pass 1:  Y = G Omega    = sum over tokens of dy (Omega^T x)^T
    pass 2:  Z = Q^T G      = sum over tokens of (Q^T dy) x^T           G = sum over tokens of dy x^T

Each costs two narrow products a layer beside the frozen layer's own, half of what training a LoRA of that width costs.
The sums are in float32, over all microbatches that are run. Under sequence parallelism the narrow side travels, as in
`adapters/frozen_linear.py`.

Letters: s sequence, b batch, w width; in and out are a rank's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear, weight_gradient
from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)


class LeftProduct(nn.Module):
    """Adds up Y = G Omega for one layer.

    Args:
        omega: [w, in], the rank's own slice, in the type of the activations.
        out_features: of this rank.

    Attributes:
        total: Y^T, [w, out], float32.
    """

    def __init__(self, omega: Tensor, out_features: int) -> None:
        super().__init__()
        self.omega = omega
        self.total = torch.zeros(omega.shape[0], out_features, device=omega.device)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        u = x.detach() @ self.omega.t()
        if call.splits_sequence:
            u = start_gather_sequence_over_tensor_parallel(u, call.group)()
        return call.reduce(_AddLeft.apply(frozen_linear(x, call), u, self.total))


class RightProduct(nn.Module):
    """Adds up Z = Q^T G for one layer.

    Args:
        Q: [out, w], the rank's own rows, in the type of the activations.
        in_features: of this rank.

    Attributes:
        total: Z, [w, in], float32.
    """

    def __init__(self, Q: Tensor, in_features: int) -> None:
        super().__init__()
        self.Q = Q
        self.total = torch.zeros(Q.shape[1], in_features, device=Q.device)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        return call.reduce(_AddRight.apply(frozen_linear(x, call), x.detach(), self.Q, self.total, call))


class _AddLeft(torch.autograd.Function):
    """The identity on z; on the way back total += u^T dz."""

    @staticmethod
    def forward(ctx, z, u, total):  # type: ignore[override]
        ctx.save_for_backward(u)
        ctx.total = total
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        ctx.total.add_(weight_gradient(ctx.saved_tensors[0], grad))
        return grad, None, None


class _AddRight(torch.autograd.Function):
    """The identity on z; on the way back total += (dz Q)^T x, over the rank's own tokens."""

    @staticmethod
    def forward(ctx, z, x, Q, total, call):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.Q, ctx.total, ctx.call = Q, total, call
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        du = grad @ ctx.Q
        if ctx.call.splits_sequence:
            du = start_sum_scatter_sequence_over_tensor_parallel(du, ctx.call.group)()
        ctx.total.add_(weight_gradient(du, ctx.saved_tensors[0]))
        return grad, None, None, None, None
