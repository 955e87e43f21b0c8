"""Validation loss, and checks of training: layers without gradients, orthogonality, the loss at the start."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.step import adapters_step
from megatron_peft.checkpoint.state import whole_parameters
from megatron_peft.data.batches import Step
from megatron_peft.runtime.launch import gather_over_world, read_on_host
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import run_schedule


class ValidationInterrupted(Exception):
    """A rank was asked to stop; every rank raises it, before the same step."""


def validation_loss(
    model_chunks: Sequence[DistributedDataParallel], steps: Iterable[Step], stops: Callable[[], bool] = lambda: False
) -> float:
    """Mean token loss over all steps and ranks; the same number on every rank, at any layout. A collective.

    Args:
        stops: asked before each step, whether this rank wants to end it. Then all do, with ValidationInterrupted.
    """
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    # `forward_only` skips backward, but megatron-core's schedules would still record the graph.
    with inference_mode(model_chunks), torch.no_grad(), adapters_step(model_chunks, is_training=False):
        for microbatches in steps:
            stopping = total.new_full((1,), float(stops()))
            dist.all_reduce(stopping)
            if any(read_on_host(stopping)):
                raise ValidationInterrupted
            total += run_schedule(model_chunks, microbatches, forward_only=True)[:, :2].sum(0)
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        total.zero_()  # tensor-parallel ranks compute the same losses: count them once
    dist.all_reduce(total)
    loss_sum, num_tokens = read_on_host(total)
    return loss_sum / max(num_tokens, 1)


@contextmanager
def inference_mode(model_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Turn dropout off, and gather parameters (`whole_parameters`)."""
    for chunk in model_chunks:
        chunk.eval()
    try:
        with whole_parameters(model_chunks):
            yield
    finally:
        for chunk in model_chunks:
            chunk.train()


START_TOLERANCE = {False: 1e-4, True: 2e-2}  # without and with --bf16, relative to the base's loss
ORTHOGONALITY_LIMIT = 1e-5  # largest entry of |R^T R - I| of the float32 blocks


def layers_without_gradient(state: TrainingState) -> list[str]:
    """Global names of adapted layers (or halves of a Hybrid) whose last gradients are all zero. A collective.

    They would never train, while the loss still falls through the other layers.
    """
    own: dict[str, float] = {}
    for layer in [layer for chunk in state.model_chunks for layer in linear_layers(chunk)]:
        adapter: Any = layer.module.adapter
        if adapter is None:
            continue
        # Halves of a Hybrid can lose their gradients alone.
        for half, part in adapter.trained_parts() if hasattr(adapter, "trained_parts") else [("", adapter)]:
            gradients = [parameter.main_grad for parameter in part.parameters() if parameter.requires_grad]
            largest = (float(gradient.abs().max()) for gradient in gradients if gradient.numel())
            own[f"{layer.name}{half}"] = max(largest, default=0.0)
    by_rank = gather_over_world(own)
    of_model = {name: max(values.get(name, 0.0) for values in by_rank) for values in by_rank for name in values}
    return sorted(name for name, value in of_model.items() if value == 0)


def start_losses(state: TrainingState, step: Step) -> tuple[float, float]:
    """Mean loss of a step's first microbatches, with the adapters and without them. A collective."""
    # As few microbatches as megatron-core's interleaved schedule takes.
    step = step[: state.config.parallel.pipeline_model_parallel_size]
    modules = [layer.module for chunk in state.model_chunks for layer in linear_layers(chunk)]
    adapters = [module.adapter for module in modules]
    # megatron-core takes its hooks off module by module, so no module may be missing when it does.
    with whole_parameters(state.model_chunks):
        adapted = validation_loss(state.model_chunks, [step])
        for module in modules:
            module.adapter = None
        try:
            return adapted, validation_loss(state.model_chunks, [step])
        finally:
            for module, adapter in zip(modules, adapters, strict=True):
                module.adapter = adapter


def largest_orthogonality_error(state: TrainingState) -> float | None:
    """Largest |R^T R - I| of all rotations of the model; None without rotations. A collective."""
    modules: Iterable[Any] = [module for chunk in state.model_chunks for module in chunk.modules()]
    with torch.no_grad():
        errors = [module.orthogonality_error() for module in modules if hasattr(module, "orthogonality_error")]
    worst = torch.stack(errors).max() if errors else torch.tensor(-1.0, device=torch.cuda.current_device())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return None if worst < 0 else float(worst)
