"""What adapters build once a step: it depends on weights alone, and a step has many microbatches.

The class of an adapter may have two functions of all layers of a pipeline stage that it adapts:

    begin_step(layers, is_training)    before the first microbatch; what it returns, one thing for each layer, is the
                                       layer's `adapter.held` until the step ends
    end_step(layers)                   after the last backward, before gradients are summed over ranks: adds to the
                                       gradients of parameters what only their `held` has, and returns these parameters

Both get whole parameters, and layers rather than adapters, which also have the frozen weight. Of all layers together,
because one batched computation or one collective costs less than many. Rotations build their blocks here
(`rotation.py`). Where no step has begun, `held` is None, as their class declares, and a forward builds what it needs.

A step is a training step, an own loop's, a pass of LoRA-GA's start, a validation or an answer: `AdaptersStep`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_peft.runtime.precision import full_precision


class AdaptersStep:
    """A step of the adapters of a stage that build something for it; `is_training`: gradients are wanted.

    The rank's model chunks may be wrapped for data parallelism or bare.
    """

    def __init__(self, model_chunks: Sequence[nn.Module], is_training: bool = True) -> None:
        self.model_chunks, self.is_training = model_chunks, is_training
        self.layers: dict[Any, list[Any]] = {}  # by class of their adapters
        for layer in (module for chunk in model_chunks for module in chunk.modules()):
            kind = type(getattr(layer, "adapter", None))
            if hasattr(kind, "begin_step"):
                self.layers.setdefault(kind, []).append(layer)

    @full_precision
    def begin(self) -> None:
        """Build, from parameters as they are now."""
        self._gather_parameters()
        with torch.set_grad_enabled(self.is_training):
            for kind, layers in self.layers.items():
                for layer, held in zip(layers, kind.begin_step(layers, self.is_training), strict=True):
                    layer.adapter.held = held

    def _gather_parameters(self) -> None:
        """Wait for --overlap-param-gather, which gathers a module's parameters when its forward begins."""
        adapters = {layer.adapter for layers in self.layers.values() for layer in layers}
        owners = {module for adapter in adapters for module in adapter.modules()}
        wrapped = [chunk for chunk in self.model_chunks if isinstance(chunk, DistributedDataParallel)]
        for chunk in wrapped:
            if not chunk.remove_forward_pre_hook_handles:  # parameters are whole
                continue
            gather = chunk._make_forward_pre_hook()
            for module in (owner for owner in chunk.modules() if owner in owners):  # every rank in the same order
                gather(module)

    @full_precision
    def finish(self, model_chunks: Sequence[nn.Module]) -> None:
        """Complete the gradients in the parameters' buffers, and report these to the chunks' wrappers as ready."""
        parameters = [
            parameter
            for kind, layers in self.layers.items()
            if hasattr(kind, "end_step")
            for parameter in kind.end_step(layers)
        ]
        for chunk in model_chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_grad_reduce:
                # What its hook does after the backward of a parameter, which here is none of autograd's.
                for parameter in (kept for kept in parameters if kept in chunk.param_to_bucket_group):
                    chunk.param_to_bucket_group[parameter].register_grad_ready(parameter, chunk.force_all_reduce)

    def clear(self) -> None:
        """Forget what was built: it is of weights that will change. No memory of it is left."""
        for layer in (layer for layers in self.layers.values() for layer in layers):
            layer.adapter.held = None
        self.layers = {}


@contextmanager
def adapters_step(model_chunks: Sequence[nn.Module], is_training: bool = True) -> Iterator[AdaptersStep]:
    """A step. Call `finish` of what it yields after the last backward.

    Without training, a step may take as long as weights stay what they are.
    """
    step = AdaptersStep(model_chunks, is_training)
    try:
        step.begin()
        yield step
    finally:
        step.clear()
