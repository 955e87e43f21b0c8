"""megatron-core's column- and row-parallel linear layers with a place for an adapter.

Subclasses, put in place through the layer spec: names, shapes and checkpoint keys of the base weight stay Megatron's.
Without an adapter they behave as their parents do.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear
from megatron_peft.adapters.quantized_weight import dense, quantize, weights_as
from megatron_peft.parallel.layout import LinearLayout, mark_split
from megatron_peft.runtime.cpu_kernels import linear

_MODULE_NAMES = {"qkv": "linear_qkv", "proj": "linear_proj", "fc1": "linear_fc1", "fc2": "linear_fc2"}


class AdaptedLinear(nn.Module):
    """What the two adapted layers share. `attach_adapters` sets `adapter`, or leaves None, and `is_frozen`."""

    adapter: nn.Module | None
    is_frozen: bool = False
    layout: LinearLayout
    weight: nn.Parameter
    bias: nn.Parameter | None
    tp_group: dist.ProcessGroup
    config: Any

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's keys for the base, `adapter.*` for the adapter, each split as it lies on the ranks.

        `MLP` splits fc1's own weight and bias into gate and up; the adapter's output side is split likewise here.
        """
        state = self.state_dict(prefix="", keep_vars=True)
        split = {name: x for name, x in state.items() if getattr(x, "tensor_model_parallel", False)}
        sharded = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {name: x.partition_dim for name, x in split.items()},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        for name, x in split.items():
            if name.startswith("adapter.") and x.partition_stride > 1:
                key = f"{prefix}{name}"
                sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)
        return sharded


class FrozenColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's layer, with our product while its weight is frozen: the output layer of a model with adapters."""

    is_frozen: bool = False
    tp_group: dist.ProcessGroup

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        if not (torch.is_grad_enabled() or kwargs["sequence_parallel"]):
            return _alone(input, weight, kwargs["bias"])
        if not self.is_frozen or weight.requires_grad:
            return super()._forward_impl(input=input, weight=weight, **kwargs)
        return frozen_linear(input, self._call(weight, kwargs))

    def _call(self, weight: Tensor, kwargs: dict[str, Any]) -> FrozenLinearCall:
        return FrozenLinearCall(
            stored=weight,
            bias=kwargs["bias"],
            sums_input_gradient=kwargs["allreduce_dgrad"],
            splits_sequence=kwargs["sequence_parallel"],
            group=self.tp_group,
        )


class AdaptedColumnParallelLinear(AdaptedLinear, FrozenColumnParallelLinear):
    """y = x W^T with the rows of W, the output features, split over the tensor-parallel ranks."""

    def __init__(self, input_size: int, output_size: int, *, stride: int = 1, **kwargs: Any) -> None:
        with weights_as(_precision(kwargs["config"])):
            super().__init__(input_size, output_size, stride=stride, **_with_own_bias(kwargs))
        quantize(self, _precision(self.config))
        self.make_place(stride, has_heads=kwargs.get("tp_comm_buffer_name") == "qkv")

    def make_place(self, stride: int, has_heads: bool) -> None:
        """Mark the weight and describe its split for an adapter."""
        mark_split(self.weight, 0, stride)
        heads = self.config.kv_channels if has_heads else None
        sizes = self.output_size, self.input_size
        self.adapter, self.layout = None, LinearLayout("column", *sizes, self.tp_group, stride, heads)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] -> [s, b, out / t]; under sequence parallelism from [s / t, b, in]. Returns (y, bias)."""
        if torch.is_grad_enabled() or self.sequence_parallel:
            return super().forward(input_, weight, runtime_gather_output)
        # No backward follows: megatron-core's autograd set-up would cost more than the product of a step of generation.
        bias, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        y = self._forward_impl(input_, self.weight, bias=bias, allreduce_dgrad=False, sequence_parallel=False)
        return y, left

    def _forward_impl(self, input: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        if self.adapter is None:
            return super()._forward_impl(input, weight, **kwargs)
        return self.adapter(input, self._call(weight, kwargs))


class AdaptedRowParallelLinear(AdaptedLinear, RowParallelLinear):
    """y = x W^T with the columns of W, the input features, split over the tensor-parallel ranks."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        with weights_as(_precision(kwargs["config"])):
            super().__init__(input_size, output_size, **_with_own_bias(kwargs))
        quantize(self, _precision(self.config))
        self.make_place()

    def make_place(self) -> None:
        """Mark weight and bias, and describe their split for an adapter."""
        mark_split(self.weight, 1)
        if self.bias is not None:
            mark_split(self.bias, None)
        self.adapter, self.layout = None, LinearLayout("row", self.output_size, self.input_size, self.tp_group)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[s, b, in / t] -> [s, b, out], or [s / t, b, out] under sequence parallelism.

        Returns (y, bias). The adapter decides what is summed over the ranks, and acts before or after it.
        """
        records = torch.is_grad_enabled() or self.sequence_parallel
        if self.adapter is None and (not self.is_frozen or self.weight.requires_grad) and records:
            y, left = super().forward(input_)
            return y, _alias(left)
        assert self.input_is_parallel, "as SelfAttention and MLP build it"
        call = FrozenLinearCall(
            stored=self.weight,
            bias=None,
            sums_input_gradient=False,
            splits_sequence=False,
            group=self.tp_group,
            output_sum="own tokens" if self.sequence_parallel else "whole",
        )
        if self.adapter is not None:
            y = self.adapter(input_, call)
        else:
            y = call.reduce(frozen_linear(input_, call) if records else _alone(input_, self.weight))
        if self.skip_bias_add or self.bias is None:
            return y, _alias(self.bias)
        return y + self.bias, None


def _alias(bias: Tensor | None) -> Tensor | None:
    """Another tensor of the same memory.

    If megatron-core recomputes the MLP alone, the bias is an output of its checkpointed function. torch would make that
    function the origin of the parameter itself, and its backward would call itself for ever.
    """
    return None if bias is None else bias.view_as(bias)


def adopt(layer: nn.Module, name: str, config: Any) -> str:
    """Turn a linear layer of megatron-core's own into one of ours, in place; nothing but its class changes.

    name: `linear_qkv`, `linear_proj`, `linear_fc1` or `linear_fc2`.
    config: megatron-core's, of the model.

    Returns why the layer takes no adapter, as `a ...`; empty if it does, or did already.
    """
    if isinstance(layer, AdaptedLinear):
        return ""
    adapted: Any = layer
    if getattr(layer, "is_expert", False):
        return f"an expert's {type(layer).__name__}"
    if type(layer) is ColumnParallelLinear and not layer.gather_output:
        layer.__class__ = AdaptedColumnParallelLinear
        stride = 2 if name == "linear_fc1" and config.gated_linear_unit else 1
        adapted.make_place(stride, has_heads=name == "linear_qkv")
    elif type(layer) is RowParallelLinear and layer.input_is_parallel:
        layer.__class__ = AdaptedRowParallelLinear
        adapted.make_place()
    else:
        return f"a {type(layer).__name__}"
    return ""


def _alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # [s, b, in] -> [s, b, out]
    """The forward of a layer without an adapter, without gradients; `weight` may be quantized.

    A step of generation takes the faster one; longer texts take torch's, as transformers does: scores of the base model
    are the same to the last bit then.
    """
    multiply = linear if len(x) == 1 else F.linear
    return multiply(x, dense(weight), bias)


def _precision(config: Any) -> str:
    """The --base-precision. The configuration of another program does not know it."""
    return getattr(config, "base_precision", "run")


def _with_own_bias(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Whether this very layer has a bias: TransformerConfig knows one switch, Hugging Face one for each half."""
    biased = getattr(kwargs["config"], "linear_biases", None)
    if biased is None:
        return kwargs
    return {**kwargs, "bias": _MODULE_NAMES[kwargs["tp_comm_buffer_name"]] in biased}
