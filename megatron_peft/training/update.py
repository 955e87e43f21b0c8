"""What follows backward: the Hybrid's lambda, the optimizer's step, bounds on norms, changes merged into weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.linear import AdaptedLinear
from megatron_peft.adapters.low_rank import LowRank, gram_matrices, low_rank_part, shrink, shrinkage
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.collectives import sum_coalesced
from megatron_peft.runtime.launch import gather_over_world
from megatron_peft.runtime.precision import full_precision
from megatron_peft.training.state import GradientShards


class Trained(Protocol):
    """What `update` needs, of a run (`TrainingState`) or of a loop of the user's own (`ModelAdapters`)."""

    @property
    def peft(self) -> PeftConfig: ...
    @property
    def lr(self) -> float: ...  # the peak, of which those of rotations are fractions
    @property
    def clip_grad(self) -> float: ...  # norm to which the optimizer clips; 0: it does not
    @property
    def iteration(self) -> int: ...  # steps taken before the present one
    @property
    def model_chunks(self) -> Sequence[nn.Module]: ...
    @property
    def optimizer(self) -> Any: ...  # megatron-core's, or `PlainOptimizer`


def update(state: Trained) -> float:
    """Apply the complete gradients of a step, as the method does; returns their norm before clipping. A collective."""
    _mix_from_gradients(state)  # before the optimizer clips the gradients
    grad_norm = _update_parameters(state)
    _bound_low_rank_norms(state)
    merge_if_due(state)
    return float(grad_norm or 0.0)


# --lora-max-norm-ratio, eq. (2): one all-reduce of [layers, w, w] numbers over the tensor-parallel ranks per step. The
# norms are those of the model's parameters, which a distributed optimizer has gathered by then. With --bf16 the
# optimizer updates a float32 copy, or a shard of one, which is scaled by the same number.


@torch.no_grad()
def _bound_low_rank_norms(state: Trained) -> None:
    """Scale every low-rank change whose norm is above --lora-max-norm-ratio of its weight's. No host-device sync."""
    peft = state.peft
    if peft.lora_max_norm_ratio is None:
        return
    layers = [target.module for chunk in state.model_chunks for target in linear_layers(chunk)]
    parts = [(layer, part) for layer in layers if (part := low_rank_part(layer.adapter)) is not None]
    if not parts:
        return
    low_ranks = [part for _, part in parts]
    limits = peft.lora_max_norm_ratio / peft.lora_scale * _base_norms(parts)
    factors = shrinkage(*_whole_gram_matrices(low_ranks), limits, peft.spec.subtracts_start(peft))
    shards = GradientShards(state.optimizer)
    for low_rank, t in zip(low_ranks, factors, strict=True):
        if low_rank.A0 is not None:
            _shrink_with_master(low_rank.A, low_rank.A0, t, shards)
        _shrink_with_master(low_rank.B, low_rank.B0, t, shards)


def _whole_gram_matrices(low_ranks: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Both of each layer, [layers, w, w]; the one over the split side summed over the ranks."""
    left, right = (torch.stack(sides) for sides in zip(*map(gram_matrices, low_ranks), strict=True))
    partial = [(left if low_rank.layout.split == "column" else right)[i] for i, low_rank in enumerate(low_ranks)]
    sum_coalesced(partial, low_ranks[0].layout.group)  # in place: these are views
    return left, right


def _base_norms(parts: Sequence[tuple[AdaptedLinear, LowRank]]) -> Tensor:
    """||W0||_F of the whole weights, [layers]; computed at the first step of a process and kept."""
    if parts[0][1].base_norm is None:
        norms = [torch.linalg.vector_norm(layer.weight, dtype=torch.float64) for layer, _ in parts]
        squares = torch.stack(norms).square()
        group: Any = parallel_state.get_tensor_model_parallel_group()
        sum_coalesced([squares], group)
        for (_, low_rank), square in zip(parts, squares, strict=True):
            low_rank.base_norm = square.sqrt()
    return torch.stack([low_rank.base_norm for _, low_rank in parts if low_rank.base_norm is not None])


def _shrink_with_master(parameter: nn.Parameter, start: Tensor | None, t: Tensor, shards: GradientShards) -> None:
    """Shrink a parameter and its float32 copy, which is then rounded into it as the optimizer does.

    A shard is not rounded: the parameter must stay the same on all data-parallel ranks until the next gather.
    """
    shrink(parameter, start, t)
    master = getattr(parameter, "main_param", None)
    if master is None:
        return
    shard = shards.shard(parameter)
    shrink(master.view(-1), None if start is None else start.view(-1)[shard], t)
    if not shards.is_sharded:
        parameter.copy_(master.view_as(parameter))


# The update of a step. `--boft-parametrization projection` projects what the optimizer returns onto the nearest
# orthogonal blocks, eq. (6). `--urnn-update riemannian` replaces the optimizer's update by a step on the unitary group,
# eq. (11)-(12), with the clipped gradient and the scheduled learning rate. Both need whole float32 parameters on every
# rank, since a shard may cut a block in two: they act after a distributed optimizer has gathered them.

CLIP_EPSILON = 1e-6  # megatron-core's own: clipping multiplies by clip / (norm + epsilon)


def _update_parameters(state: Trained) -> float:
    """Step the optimizer, and take what the method adds. Returns the norm of the gradients before clipping."""
    peft = state.peft
    if not peft.spec.updates_whole_parameters(peft):
        return state.optimizer.step()[1]
    on_group = _modules_with(state.model_chunks, "move")
    parameters = [module.moved for module in on_group]
    gradients = GradientShards(state.optimizer).whole(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    grad_norm = state.optimizer.step()[1]
    clipping = min(1.0, state.clip_grad / (grad_norm + CLIP_EPSILON)) if state.clip_grad > 0 else 1.0
    rate = rotation_learning_rate(state) * clipping
    for module, start, gradient in zip(on_group, before, gradients, strict=True):
        module.move(start, gradient, rate)
    for module in _modules_with(state.model_chunks, "project"):
        module.project()
    return grad_norm


def rotation_learning_rate(state: Trained) -> float:
    """Learning rate of rotations in this step; 0 without rotations."""
    labels = [group.attribute for group in state.peft.spec.param_groups if group.is_labelled]
    groups = [group for group in state.optimizer.param_groups if any(map(group.get, labels))]
    return groups[0]["lr"] if groups else 0.0


def _modules_with(model_chunks: Sequence[nn.Module], hook: str) -> list[Any]:
    """The adapters, and parts of them, that have a method of this name."""
    adapters = [layer.module.adapter for chunk in model_chunks for layer in linear_layers(chunk)]
    modules = [module for adapter in adapters if adapter is not None for module in adapter.modules()]
    return [module for module in modules if hasattr(module, hook)]


# The Hybrid's lambda within a step: which gradients a rank counts, and what a log line says.


@dataclass(frozen=True)
class Mixtures:
    """lambda of every adapted layer of the whole model, by its global name.

    `num_kept`: how often, so far in this process, a lambda kept its value because a gradient's norm was not finite.
    """

    by_layer: dict[str, float]
    num_kept: int


def mixing_adapters(state: Trained) -> dict[str, Any]:
    """This rank's adapters that have a lambda, by the global name of their layer, in the order of the layers."""
    layers = [layer for chunk in state.model_chunks for layer in linear_layers(chunk)]
    return {layer.name: layer.module.adapter for layer in layers if hasattr(layer.module.adapter, "mix")}


def _mix_from_gradients(state: Trained) -> None:
    """Update every lambda from this step's complete gradients, before they are clipped. One all-reduce."""
    adapters = list(mixing_adapters(state).values())
    if not adapters or state.peft.fixed_mix is not None:
        return
    shards = GradientShards(state.optimizer)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    if shards.is_sharded:
        group = parallel_state.get_tensor_and_data_parallel_group()
    adapters[0].update_mixtures(adapters, state.peft, _counted(shards), group, state.lr)


def mixtures(state: Trained) -> Mixtures | None:
    """lambda now; None for a method without. A collective."""
    if not state.peft.spec.mixes:
        return None
    adapters = mixing_adapters(state)
    rows = [torch.stack([adapter.mix.double(), adapter.num_kept.double()]) for adapter in adapters.values()]
    own = dict(zip(adapters, torch.stack(rows).tolist() if rows else [], strict=True))  # one read for all layers
    every = {name: values for part in gather_over_world(own) for name, values in part.items()}
    ordered = sorted(every, key=lambda name: int(name.split(".")[2]))
    return Mixtures({name: every[name][0] for name in ordered}, sum(kept for _, kept in every.values()))


def _counted(shards: GradientShards) -> Callable[[nn.Parameter], Tensor]:
    """What this rank counts of a parameter's gradient: that of a replicated one on the first tensor-parallel rank."""
    counts_replicated = parallel_state.get_tensor_model_parallel_rank() == 0

    def own(parameter: nn.Parameter) -> Tensor:
        gradient = shards.own(parameter)
        counts = counts_replicated or getattr(parameter, "tensor_model_parallel", False)  # a norm's has no such mark
        return gradient if counts else gradient[:0]

    return own


# --log-grad-norm-by-layer


@torch.no_grad()
def layer_gradient_squares(state: Trained, num_layers: int) -> Tensor:
    """Squared norms of what this rank counts of each transformer layer's complete gradients, on the device.

    Returns float64 [layers of the whole model]; the sum over all ranks is the model's.
    """
    shards = GradientShards(state.optimizer)
    squares = [torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())] * num_layers
    if not shards.is_sharded and parallel_state.get_data_parallel_rank() > 0:
        return torch.stack(squares)  # every replica has the same gradients: the first one counts
    own = _counted(shards)
    modules = [module for chunk in state.model_chunks for module in chunk.modules()]
    for layer in [module for module in modules if isinstance(module, TransformerLayer)]:
        gradients = [own(parameter) for parameter in layer.parameters() if parameter.requires_grad]
        if gradients:
            norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
            squares[layer.layer_number - 1] = norms.double().square().sum()
    return torch.stack(squares)


# --hybrid-merge-interval: the Hybrid's change goes into the weights, and the adapters start again.
#
# The paper's W <- W + dW (Algorithm 2, line 21), made consistent: dW is added once, then it is zero again, and so are
# the moments that the optimizer has of its parameters. lambda, the schedule and A go on.


@full_precision
def merge_if_due(state: Trained) -> None:
    """Merge after every so many iterations; the step of `state.iteration + 1` has just been taken."""
    interval = state.peft.spec.merge_interval(state.peft)
    if interval is None or (state.iteration + 1) % interval:
        return
    for adapter in mixing_adapters(state).values():
        adapter.merge_and_restart()
    forget_moments(state.optimizer)


def forget_moments(optimizer: Any) -> None:
    """Set every moment and step count to zero: the parameters that they belong to have started again."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:  # a rank without trainable parameters
            continue
        for group in part.optimizer.param_groups:
            if "step" in group:  # fused optimizers count a group's steps, torch's a parameter's
                group["step"] = 0
        for moment in (moment for moments in part.optimizer.state.values() for moment in moments.values()):
            if isinstance(moment, Tensor):
                moment.zero_()
