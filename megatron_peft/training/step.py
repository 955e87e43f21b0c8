"""One training step: microbatches through megatron-core's schedule, gradients summed, checked, applied. And what is
looked at between steps with the same schedule: the validation loss, the loss before training, forgotten layers.

The loss is the mean over the completion tokens of the global batch: each microbatch contributes a sum, and gradients
are divided by the global number of tokens at the end, so it does not depend on how tokens fall on microbatches and
ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.step import AdaptersStep, adapters_step
from megatron_peft.checkpoint.state import TrainingState, whole_parameters
from megatron_peft.data.batches import Microbatch, Step
from megatron_peft.models.layers import PackedSamples
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.runtime.launch import gather_over_world, read_on_host
from megatron_peft.training.update import layer_gradient_squares, update


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite. The message names iteration, rank and microbatch."""

    on_all_ranks = True


@dataclass(frozen=True)
class StepReport:
    """What every rank knows after a step."""

    loss: float  # mean over the completion tokens of the global batch
    num_tokens: int  # completion tokens of the global batch
    num_positions: int  # all tokens that went through the model, including prompts and padding
    num_pairs: int  # pairs of positions that attention computed in each layer (`Microbatch.num_pairs`)
    grad_norm: float  # of the whole gradient, before clipping
    learning_rate: float  # of this step
    stop: bool  # a rank was asked to stop
    layer_grad_norms: tuple[float, ...] = ()  # of each transformer layer, before clipping, if asked for


def finish_gradients(
    model: Sequence[nn.Module],
    num_tokens: Tensor | None = None,
    *args: Any,
    step: AdaptersStep | None = None,
    **kwargs: Any,
) -> None:
    """Sum gradients over the ranks. megatron-core calls this after the last backward of a step.

    num_tokens: completion tokens of this rank's microbatches, on the last pipeline stage; gradients are divided by
    their sum over the replicas, if it is given.
    """
    # From sums over microbatches to gradients of parameters.
    if step is not None:
        step.finish(model)
    # Data parallel, layer norms under sequence parallelism, tied embeddings.
    finalize_model_grads(list(model), None, *args, **kwargs)
    if num_tokens is not None:
        _divide_by_tokens(model, num_tokens)
    # Ours: partial gradients of replicated adapter parameters, in one all-reduce.
    group: Any = parallel_state.get_tensor_model_parallel_group()
    sum_partial_gradients_over_tensor_parallel(model, group)


def _divide_by_tokens(model: Sequence[Any], num_tokens: Tensor) -> None:
    """What megatron-core does with `num_tokens`, except that it asks the device whether there are any."""
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(num_tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def train_step(
    state: TrainingState,
    microbatches: Sequence[Microbatch],
    stops: Callable[[], bool] = lambda: False,
    by_layer: bool = False,
    around_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepReport:
    """Forward, backward and update on this rank's microbatches of one global batch; all but the position of `state`.

    stops: called after forward and backward: True if this rank wants the run to end with this step. The report has it
        on all ranks.
    by_layer: the report has the gradient norm of each layer; the same on all ranks.
    around_forward: entered for each forward pass, for instance to measure it.
    Raises NonFiniteError: on every rank, before parameters and optimizer have changed.
    """
    for chunk in state.model_chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    with adapters_step(state.model_chunks) as step:
        finish_with(state.model_chunks, partial(finish_gradients, step=step))
        forward = partial(_forward, around=around_forward)
        losses = run_schedule(state.model_chunks, microbatches, forward_only=False, forward=forward)
    if state.config.training.empty_unused_memory_level >= 1:
        torch.cuda.empty_cache()
    # Gradients are complete. They are checked before anything uses them, so that a NaN leaves the state as it was. The
    # schedule advances last: to the next step's rate.
    check = state.config.training.check_for_nan_in_loss_and_grad
    num_pairs = sum(microbatch.num_pairs for microbatch in microbatches)
    squares = layer_gradient_squares(state, state.shape.num_layers) if by_layer else None
    totals = _sum_over_world(losses, state.model_chunks if check else (), stops(), num_pairs, squares)
    loss_sum, num_tokens, num_positions, num_non_finite, num_stopping, num_pairs, *squared = totals
    if check and num_non_finite:
        _raise_non_finite(state, losses)
    groups = state.optimizer.param_groups
    learning_rate = next((group["lr"] for group in groups if group.get("default_config", True)), groups[0]["lr"])
    grad_norm = update(state)
    if state.config.training.empty_unused_memory_level >= 2:
        torch.cuda.empty_cache()
    state.schedule.step(increment=state.config.global_batch_size)
    return StepReport(
        loss=loss_sum / max(num_tokens, 1),
        num_tokens=int(num_tokens),
        num_positions=int(num_positions),
        num_pairs=int(num_pairs),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        stop=num_stopping > 0,
        layer_grad_norms=tuple(map(sqrt, squared)),
    )


def finish_with(model_chunks: Sequence[nn.Module], finish: Callable[..., None] | None) -> None:
    """Set what megatron-core's schedule calls after the last backward; None leaves each rank its own gradients."""
    config = get_model_config(model_chunks[0])
    config.finalize_model_grads_func = finish
    # Within no_sync a backward starts no data-parallel sum: the schedule leaves it for the last microbatch.
    no_sync: Any = [chunk.no_sync for chunk in model_chunks if isinstance(chunk, DistributedDataParallel)]
    config.no_sync_func = no_sync if len(no_sync) > 1 else next(iter(no_sync), None)


def run_schedule(
    model_chunks: Sequence[nn.Module],
    microbatches: Sequence[Microbatch],
    forward_only: bool,
    forward: Callable[..., tuple[Tensor, Any]] | None = None,
) -> Tensor:
    """Run megatron-core's schedule (plain, 1F1B or interleaved) over the microbatches.

    forward: megatron-core's `forward_step_func`, whose own reports are returned; None computes token losses.
    Returns float64 [microbatches, 3] on the last pipeline stage: sum of the token losses, number of completion tokens,
    number of positions; [0, 3] on the other stages.
    """
    device = torch.device(torch.cuda.current_device())
    moved = [microbatch.to(device) for microbatch in microbatches]
    # The interleaved schedule runs every chunk (virtual stage) over all microbatches: each has its own iterator.
    iterators = [iter(moved) for _ in model_chunks]
    # All ranks run the same number of microbatches, or sends and sums would not match. Lengths may differ: the stages
    # exchange shapes (`variable_seq_lengths`), and the sizes below are only those of the first microbatch.
    reports = get_forward_backward_func()(
        forward_step_func=forward or _forward,
        data_iterator=iterators if len(model_chunks) > 1 else iterators[0],
        model=list(model_chunks),
        num_microbatches=len(moved),
        seq_length=moved[0].tokens.shape[1],
        micro_batch_size=moved[0].tokens.shape[0],
        forward_only=forward_only,
    )
    return torch.stack(reports) if reports else torch.zeros(0, 3, dtype=torch.float64, device=device)


def _forward(
    microbatches: Iterable[Microbatch],
    model: nn.Module,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    by_sample: list[Tensor] | None = None,
) -> tuple[Tensor, Any]:
    microbatch = next(iter(microbatches))
    with around():
        token_losses = model(
            input_ids=microbatch.tokens,
            position_ids=microbatch.position_ids,
            attention_mask=None,  # causal; padding is on the right, so no real token attends to it
            labels=microbatch.labels,
            packed_seq_params=packing(microbatch),
        )
    # Only the last stage returns token losses, and only there does the schedule call the loss function. The others
    # return activations, which the schedule sends to the next stage.
    return token_losses, partial(_sum_of_losses, microbatch, by_sample)


def _sum_of_losses(
    microbatch: Microbatch, by_sample: list[Tensor] | None, token_losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss to run backward from, number of completion tokens, a row of `run_schedule`'s result)

    The loss is a sum. megatron-core adds up the numbers of tokens, and `finish_gradients` divides by their total.
    """
    loss_mask = microbatch.loss_mask
    if by_sample is not None:
        both = torch.stack([token_losses.float() * loss_mask, loss_mask]).double()  # [2, b, s]
        samples = both.unbind(1) if microbatch.lengths is None else both[:, 0].split(list(microbatch.lengths), 1)
        by_sample += [sample.sum(1) for sample in samples[: microbatch.num_samples]]  # those after them are padding
    loss = torch.sum(token_losses.float() * loss_mask)
    num_tokens = loss_mask.sum()
    num_positions = torch.full_like(num_tokens, loss_mask.numel())
    return loss, num_tokens.to(torch.int), torch.stack([loss.detach(), num_tokens, num_positions]).double()


def packing(microbatch: Microbatch) -> PackedSamples | None:
    """Sample boundaries of a packed microbatch in megatron-core's form, and in ours."""
    if microbatch.cu_seqlens is None or microbatch.lengths is None:
        return None
    return PackedSamples.of(microbatch.cu_seqlens, microbatch.lengths, microbatch.position_ids)


def _sum_over_world(
    losses: Tensor, model_chunks: Sequence[DistributedDataParallel], stop: bool, num_pairs: int, squares: Tensor | None
) -> list[float]:
    """Everything ranks must agree on, in one all-reduce and one host-device sync: the first of a step's two.

    The other is the norm of the gradients, which megatron-core's optimizer reads to clip them.

    Returns sum of losses, numbers of completion tokens and of positions; how many ranks have found a loss or gradient
    that is not finite, and how many were asked to stop; numbers of attended pairs; `squares`, float64, of the layers.
    """
    # Tensor-parallel ranks compute the same losses: count them once.
    counts = parallel_state.get_tensor_model_parallel_rank() == 0
    total = losses.sum(0) if counts else torch.zeros_like(losses).sum(0)
    finite = torch.isfinite(losses).all()
    for chunk in model_chunks:
        buffers: Any = chunk.buffers  # megatron-core's gradient buffers, not nn.Module's method
        for buffer in buffers:
            finite = finite & torch.isfinite(buffer.grad_data.sum())
    here = [stop, num_pairs if counts and len(losses) else 0]  # every stage has the microbatches: the last one counts
    of_the_host = [total.new_full((1,), float(number)) for number in here]  # a tensor of a list is copied: a wait
    numbers = torch.cat([total, (~finite).double().view(1), *of_the_host, *([] if squares is None else [squares])])
    dist.all_reduce(numbers)
    return read_on_host(numbers)


def _raise_non_finite(state: TrainingState, losses: Tensor) -> None:
    bad = gather_over_world((~torch.isfinite(losses[:, 0])).nonzero().flatten().tolist())
    places = [f"rank {rank}, microbatch {index}" for rank, indices in enumerate(bad) for index in indices]
    what = f"the loss is NaN or infinite ({'; '.join(places[:8])})" if places else "a gradient is NaN or infinite"
    done = state.position.iteration
    cause = "Lower --lr" if done else "Nothing is trained yet: check the weights of --pretrained-checkpoint"
    raise NonFiniteError(
        f"iteration {done + 1}: {what}. The parameters are those of iteration {done}. {cause}, check the data, or "
        f"continue anyway with --no-check-for-nan-in-loss-and-grad."
    )


# Validation loss, and checks of training: layers without gradients, orthogonality, the loss at the start.


class ValidationInterrupted(Exception):
    """A rank was asked to stop; every rank raises it, before the same step."""


def validation_loss(
    model_chunks: Sequence[DistributedDataParallel],
    steps: Iterable[Step],
    stops: Callable[[], bool] = lambda: False,
    by_sample: list[Tensor] | None = None,
) -> float:
    """Mean token loss over all steps and ranks; the same number on every rank, at any layout. A collective.

    stops: asked before each step, whether this rank wants to end it. Then all do, with ValidationInterrupted.
    by_sample: gets the sum of token losses and the number of tokens, float64 [2], of each sample that this rank reads,
    in its order; on the last pipeline stage only.
    """
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    forward = partial(_forward, by_sample=by_sample)
    # `forward_only` skips backward, but megatron-core's schedules would still record the graph.
    with inference_mode(model_chunks), torch.no_grad(), adapters_step(model_chunks, is_training=False):
        for microbatches in steps:
            stopping = total.new_full((1,), float(stops()))
            dist.all_reduce(stopping)
            if any(read_on_host(stopping)):
                raise ValidationInterrupted
            total += run_schedule(model_chunks, microbatches, forward_only=True, forward=forward)[:, :2].sum(0)
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
