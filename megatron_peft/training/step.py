"""One training step: microbatches through megatron-core's schedule, gradients summed, checked, applied.

The loss is the mean over the completion tokens of the global batch: each microbatch contributes a sum, and gradients
are divided by the global number of tokens at the end, so it does not depend on how tokens fall on microbatches and
ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_peft.adapters.step import AdaptersStep, adapters_step
from megatron_peft.data.batches import Microbatch
from megatron_peft.models.layers import PackedSamples
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.runtime.launch import gather_over_world, read_on_host
from megatron_peft.training.state import TrainingState
from megatron_peft.training.update import layer_gradient_squares, update


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite. The message names iteration, rank and microbatch."""


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

    Args:
        num_tokens: completion tokens of this rank's microbatches, on the last pipeline stage; gradients are divided by
            their sum over the replicas. None: they are not divided.
        step: of the adapters; None where it has ended.
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
    stop: bool = False,
    by_layer: bool = False,
    around_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepReport:
    """Forward, backward and update on this rank's microbatches of one global batch.

    Args:
        state: updated in place, except for its position.
        stop: this rank wants the run to end; the report has it on all ranks.
        by_layer: the report has the gradient norm of each layer; the same on all ranks.
        around_forward: entered for each forward pass, for instance to measure it.

    Raises:
        NonFiniteError: on every rank, before parameters and optimizer have changed.
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
    totals = _sum_over_world(losses, state.model_chunks if check else (), stop, num_pairs, squares)
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

    Args:
        forward: megatron-core's `forward_step_func`, whose own reports are returned; None computes token losses.

    Returns:
        float64 [microbatches, 3] on the last pipeline stage: sum of the token losses, number of completion tokens,
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
    return token_losses, partial(_sum_of_losses, microbatch.loss_mask)


def _sum_of_losses(loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss to run backward from, number of completion tokens, a row of `run_schedule`'s result)

    The loss is a sum. megatron-core adds up the numbers of tokens, and `finish_gradients` divides by their total.
    """
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

    Returns:
        Sum of losses, numbers of completion tokens and of positions; how many ranks have found a loss or gradient that
        is not finite, and how many were asked to stop; numbers of attended pairs; `squares`, float64, of the layers.
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
