"""What stands in an adapter's place while a layer's gradient is sketched: it changes nothing and sums a narrow product.

    pass 1:  Y = G Omega    = sum over tokens of dy (Omega^T x)^T
    pass 2:  Z = Q^T G      = sum over tokens of (Q^T dy) x^T           G = sum over tokens of dy x^T

Each costs two narrow products a layer beside the frozen layer's own, half of what training a LoRA of that width costs.
The sums are in float32, over all microbatches that are run. Under sequence parallelism the narrow side travels, as in
`adapters/frozen_linear.py`.

Both work in backward alone, and need x there. The frozen base keeps no layer's input; where the operation that x came
from keeps what it can be made of again (SwiGLU, RMSNorm on a CPU), it is, and a pass takes the memory of its sketches
and no more. Else x is kept.

Letters: s sequence, b batch, w width; in and out are a rank's own.
"""

import torch
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear
from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
)
from megatron_peft.runtime.autograd import made_again, maker_of
from megatron_peft.runtime.cpu_kernels import linear, outer_sum


class _Product(nn.Module):
    """One layer's frozen product, and a sum that grows on the way back."""

    total: Tensor

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        return call.reduce(_AddOnTheWayBack.apply(frozen_linear(x, call), x.detach(), maker_of(x), self, call))

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        """The part of a microbatch: dy [s, b, out], x [s, b, in]."""
        raise NotImplementedError


class LeftProduct(_Product):
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

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        u = linear(x, self.omega)
        if call.splits_sequence:
            u = start_gather_sequence_over_tensor_parallel(u, call.group)()
        self.total.add_(outer_sum(u, grad))


class RightProduct(_Product):
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

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        du = linear(grad, self.Q.t())
        if call.splits_sequence:
            du = start_sum_scatter_sequence_over_tensor_parallel(du, call.group)()
        self.total.add_(outer_sum(du, x))


class _AddOnTheWayBack(torch.autograd.Function):
    """The identity on z."""

    @staticmethod
    def forward(ctx, z, x, maker, product, call):  # type: ignore[override]
        ctx.save_for_backward(x if maker is None else None)
        ctx.maker, ctx.product, ctx.call = maker, product, call
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if x is None:
            x = made_again(ctx.maker)
        ctx.product.add(grad, x, ctx.call)
        return grad, None, None, None, None
