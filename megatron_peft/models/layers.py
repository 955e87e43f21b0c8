"""RMSNorm, LayerNorm and SwiGLU, on any device and under sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import run_function
from megatron_peft.runtime.cpu_kernels import RootMeanSquareNorm, fuses_norms

# RMSNorm and LayerNorm that run on any device and under sequence parallelism.
#
# megatron-core's `WrappedTorchNorm` refuses sequence parallelism and its other norms need Transformer Engine or Apex.
# Under sequence parallelism a rank normalises its own tokens only, so the gradients of the weights are partial sums;
# `sequence_parallel = True` on them makes megatron-core add them up.
#
# Letters: s sequence, b batch, h hidden.


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32.

    Args:
        config: supplies the parameters' type and whether the sequence is split.
        hidden_size: h.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, h] -> [s, b, h]
        if fuses_norms(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return run_function(RootMeanSquareNorm, x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis. Arguments as for `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(config, hidden_size, 1.0)
        self.bias = _norm_parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, h] -> [s, b, h]
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _norm_parameter(config: TransformerConfig, hidden_size: int, value: float) -> nn.Parameter:
    device = torch.cuda.current_device()
    parameter = nn.Parameter(torch.full((hidden_size,), value, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


# SwiGLU as one autograd function: it keeps its input and nothing else.
#
#     y = silu(gate) * up,   x = [gate, up]
#
# megatron-core composes it of four operators, which keep silu(gate) and a copy of `up` besides x, and join the two
# halves of the gradient by a copy. Here backward computes silu(gate) again and writes each half into its place. Every
# product is the composed one, so values and gradients are those of the composed form to the last bit.
#
# Letters: s sequence, b batch, f a rank's own feed-forward features.


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


def _recompute_swiglu(ctx: Any) -> Tensor:
    """y, and silu(gate) left for the function's own backward, which comes next."""
    gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
    ctx.activated = F.silu(gate)
    return ctx.activated * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.activated = None
        ctx.recompute_output = _recompute_swiglu  # consumers recompute y instead of saving it
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
