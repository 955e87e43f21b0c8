"""RMSNorm, LayerNorm and SwiGLU, on any device and under sequence parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import run_function
from megatron_peft.runtime.cpu_kernels import RootMeanSquareNorm, fuses_norms

# megatron-core's `WrappedTorchNorm` refuses sequence parallelism, and its other norms need Transformer Engine or Apex.
#
# Letters: s sequence, b batch, h hidden, f a rank's own feed-forward features.


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32.

    Args:
        config: gives the dtype of the parameters, and whether the sequence is split.
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
    # Under sequence parallelism a rank sees its own tokens only: megatron-core sums the gradients of marked parameters.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class SwiGLU(MegatronModule):
    """y = silu(gate) * up, x = [gate, up]: the activation of megatron-core's MLP.

    A module, because megatron-core from 0.19 on accepts nothing else there; a MegatronModule, because it calls
    `sharded_state_dict` on every child of the MLP.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        assert config.gated_linear_unit and config.activation_func is F.silu
        assert config.activation_func_clamp_value is None and config.glu_linear_offset == 0

    def forward(self, x: Tensor) -> Tensor:  # [s, b, 2 f] -> [s, b, f]
        return run_function(_SwiGLU, x)


def _recompute_swiglu(ctx: Any) -> Tensor:
    """y; silu(gate) is cached for the function's own backward, which runs next."""
    gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
    ctx.activated = F.silu(gate)
    return ctx.activated * up


class _SwiGLU(torch.autograd.Function):
    """Saves x only; values and gradients are those of megatron-core's four operators, bit for bit.

    Those also save silu(gate) and a copy of `up`, and concatenate the two halves of the gradient.
    """

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
        grad_activated = torch.mul(grad, up, out=activated)  # reuses its memory
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=grad_gate)
        return grad_x
