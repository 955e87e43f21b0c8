"""SwiGLU as one autograd function: it keeps its input and nothing else.

    y = silu(gate) * up,   x = [gate, up]

megatron-core composes it of four operators, which keep silu(gate) and a copy of `up` besides x, and join the two halves
of the gradient by a copy. Here backward computes silu(gate) again and writes each half into its place. Every product is
the composed one, so values and gradients are those of the composed form to the last bit.

Letters: s sequence, b batch, f a rank's own feed-forward features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_peft.runtime.autograd import run_function


class SwiGLU(MegatronModule):
    """What megatron-core's MLP calls between its two linear layers, in place of an activation function.

    A module without parameters, since megatron-core takes nothing else there from 0.19 on; one of Megatron's, since a
    checkpoint asks each part of the MLP for what it has.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        assert config.gated_linear_unit and config.activation_func is F.silu
        assert config.activation_func_clamp_value is None and config.glu_linear_offset == 0

    def forward(self, x: Tensor) -> Tensor:  # [s, b, 2 f] -> [s, b, f]
        return run_function(_SwiGLU, x)


def _made_again(ctx: Any) -> Tensor:
    """y, and silu(gate) left for the function's own backward, which comes next."""
    gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
    ctx.activated = F.silu(gate)
    return ctx.activated * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.activated = None
        ctx.make_again = _made_again  # for who needs y in backward and would else keep it
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        activated = F.silu(gate) if ctx.activated is None else ctx.activated
        ctx.activated = None
        torch.mul(grad, activated, out=grad_up)
        grad_activated = torch.mul(grad, up, out=activated)  # the memory is free again
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
        return grad_x
