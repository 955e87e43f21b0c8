"""The optimizer: gradient buffers, groups and schedule, built from our configuration; and what follows backward: the
Hybrid's lambda, the optimizer's step, bounds on norms, changes merged into weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_peft.adapters.attach import all_names, linear_layers
from megatron_peft.adapters.linear import AdaptedLinear
from megatron_peft.adapters.low_rank import LowRank, gram_matrices, low_rank_part, shrink, shrinkage
from megatron_peft.adapters.quantized_weight import dense
from megatron_peft.checkpoint.state import TrainingState, schedule_state
from megatron_peft.config import PeftConfig, RunConfig, require
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import gradient_of, sum_coalesced
from megatron_peft.runtime.cpu import redirect_norm
from megatron_peft.runtime.launch import largest_over_world
from megatron_peft.runtime.precision import full_precision

OPTIMIZER_FIELDS = frozenset(field.name for field in fields(OptimizerConfig))


class GradientShards:
    """This rank's shards of the flattened gradients.

    Without the distributed optimizer every data-parallel rank holds whole gradients. With it they are scattered: a rank
    holds a shard of some parameters' gradients and nothing of the others.
    """

    def __init__(self, optimizer: Any) -> None:
        optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        sharded = [part for part in optimizers if isinstance(part, DistributedOptimizer)]
        self.is_sharded = bool(sharded)
        self._ranges = {
            parameter: part._get_model_param_range_map(parameter)["param"]
            for part in sharded
            if not part.is_stub_optimizer
            for parameter in part.model_param_group_index_map
        }

    def shard(self, parameter: nn.Parameter) -> slice:
        """This rank's range of the flattened gradient; empty if another rank holds it."""
        if not self.is_sharded:
            return slice(0, parameter.numel())
        held = self._ranges.get(parameter)
        return slice(0, 0) if held is None else slice(held.start, held.end)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's shard of the gradient, flat; a view."""
        return gradient_of(parameter).flatten()[self.shard(parameter)]

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Copies of the whole gradients. Sharded: one all-reduce over the data-parallel ranks."""
        gradients = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter, dtype=torch.float32)
            gradient.view(-1)[self.shard(parameter)] = self.own(parameter).float()
            gradients.append(gradient)
        if self.is_sharded and gradients:
            group: Any = parallel_state.get_data_parallel_group()
            sum_coalesced(gradients, group)
        return gradients


def start_state(
    model_chunks: Sequence[nn.Module], config: RunConfig, shape: ModelShape, train_iters: int
) -> TrainingState:
    """The state of a run of `train_iters` iterations at its start, of bare chunks with adapters and weights."""
    wrapped = wrap_data_parallel(model_chunks, config)
    optimizer = build_optimizer(wrapped, config)
    return TrainingState(config, shape, wrapped, optimizer, build_schedule(optimizer, config, train_iters))


def wrap_data_parallel(model_chunks: Sequence[nn.Module], config: RunConfig) -> list[DistributedDataParallel]:
    """Wrap each chunk in megatron-core's DistributedDataParallel, which holds the gradient buffers."""
    overlaps = config.optimizer.overlap_param_gather
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.model.bf16 and not config.training.grad_reduce_in_bf16,  # as Megatron does
        overlap_grad_reduce=config.training.overlap_grad_reduce,
        overlap_param_gather=overlaps,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        # Otherwise the first microbatch waits for a gather in every chunk of every stage, one after the other. Of
        # adapters a gather is small, and rotations ask for theirs before the first microbatch.
        align_param_gather=overlaps and len(model_chunks) > 1 and not config.peft.trains_adapters,
    )
    wrapped = []
    for index, chunk in enumerate(model_chunks):
        # Above the first, megatron-core takes all buffers of a chunk in one call, which must be of one type.
        types = {parameter.dtype for parameter in chunk.parameters() if parameter.requires_grad}
        one_bucket = index > 0 and len(types) < 2
        wrapped.append(DistributedDataParallel(get_model_config(chunk), settings, chunk, disable_bucketing=one_bucket))
    if overlaps:
        for chunk in wrapped:
            _wait_for_adapter_submodules(chunk)
    if settings.align_param_gather:
        get_model_config(model_chunks[0]).param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    return wrapped


def _wait_for_adapter_submodules(chunk: DistributedDataParallel) -> None:
    """Make an adapter's forward wait for the gathered parameters of its submodules.

    megatron-core waits for a gather before the forward of the module that owns the parameters. The Hybrid reads the
    parameters of its submodules without calling their forward, and would use stale ones.
    """
    wait = chunk._make_forward_pre_hook()

    def wait_for_submodules(adapter: nn.Module, inputs: Any) -> None:
        for module in adapter.modules():
            wait(module)

    for module in chunk.modules():
        if isinstance(module, AdaptedLinear) and module.adapter is not None:
            module.adapter.register_forward_pre_hook(wait_for_submodules)


def build_optimizer(model_chunks: Sequence[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """megatron-core's optimizer over the trainable parameters, in the groups that the method declares."""
    # Our fields have the names of megatron-core's, but those of the schedule.
    own = {name: value for name, value in vars(config.optimizer).items() if name in OPTIMIZER_FIELDS}
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    optimizer_config = OptimizerConfig(**own, bf16=config.model.bf16, params_dtype=dtype)
    overrides = group_overrides(config.peft, optimizer_config)
    redirect_norm()
    return get_megatron_optimizer(
        optimizer_config, list(model_chunks), config_overrides=overrides, use_gloo_process_groups=False
    )


def schedule_values(config: RunConfig, train_iters: int) -> Mapping[str, Any]:
    """The schedule of a run at its start, as checkpoints hold it, before there is an optimizer."""
    without_parameters: Any = SimpleNamespace(param_groups=[])
    return schedule_state(build_schedule(without_parameters, config, train_iters))


def group_overrides(peft: PeftConfig, optimizer: OptimizerConfig) -> dict[ParamKey, Any]:
    """`config_overrides` of megatron-core's optimizer: Megatron's own groups, and those that the method declares."""
    lr, min_lr = optimizer.lr or 0.0, optimizer.min_lr or 0.0
    overrides: dict[ParamKey, Any] = {**get_standard_config_overrides(optimizer)}
    for group in peft.spec.param_groups:
        rate = group.learning_rate(peft, lr) if group.learning_rate else lr
        if rate == lr and group.is_decayed:
            continue  # no group of their own: norms of gradients are summed group by group
        override: Any = {group.attribute: True} if group.is_labelled else {}
        if rate != lr:
            override |= {"max_lr": rate, "min_lr": rate / lr * min_lr}
        if not group.is_decayed:
            override["wd_mult"] = 0.0
        overrides[ParamKey(attr=group.attribute)] = override
    return overrides


def build_schedule(optimizer: MegatronOptimizer, config: RunConfig, train_iters: int) -> OptimizerParamScheduler:
    """megatron-core's schedule. It counts samples, so that its shape does not change with the batch size.

    train_iters: iterations of the whole run; without --train-samples the default length of the decay.
    Raises ConfigurationError: the warmup is as long as the decay.
    """
    settings, batch = config.optimizer, config.global_batch_size
    length = config.training.train_samples or train_iters * batch
    decay = settings.lr_decay_samples or (settings.lr_decay_iters or 0) * batch or length
    warmup = settings.lr_warmup_samples or settings.lr_warmup_iters * batch
    if settings.lr_warmup_fraction is not None:
        warmup = int(settings.lr_warmup_fraction * decay)
    require(
        warmup < decay,  # known only here with --train-epochs
        f"--lr-warmup-iters {settings.lr_warmup_iters} leaves nothing to decay: it must be below the {decay // batch} "
        f"iterations of the run. Shorten it, lengthen --train-epochs, or use --lr-warmup-fraction.",
    )
    wsd_decay = config.wsd_decay_samples
    require(
        warmup + wsd_decay <= decay,
        f"--lr-wsd-decay-iters: a last phase of {wsd_decay // batch} iterations does not fit behind a warmup of "
        f"{warmup // batch} into the {decay // batch} iterations of the schedule: shorten it.",
    )
    start_wd, end_wd = settings.start_weight_decay, settings.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay if start_wd is None else start_wd,
        end_wd=settings.weight_decay if end_wd is None else end_wd,
        wd_incr_steps=length,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=wsd_decay or None,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


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
    return grad_norm


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
    """||W||_F of the whole weights, [layers]; computed at the first step of a process and after a merge, and kept."""
    if parts[0][1].base_norm is None:
        norms = [torch.linalg.vector_norm(dense(layer.weight), dtype=torch.float64) for layer, _ in parts]
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
        return _step_optimizer(state)
    on_group = _modules_with(state.model_chunks, "move")
    parameters = [module.moved for module in on_group]
    gradients = GradientShards(state.optimizer).whole(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    grad_norm = _step_optimizer(state)
    clipping = min(1.0, state.clip_grad / (grad_norm + CLIP_EPSILON)) if state.clip_grad > 0 else 1.0
    rate = rotation_learning_rate(state) * clipping
    for module, start, gradient in zip(on_group, before, gradients, strict=True):
        module.move(start, gradient, rate)
    for module in _modules_with(state.model_chunks, "project"):
        module.project()
    return grad_norm


def _step_optimizer(state: Trained) -> float:
    """Step the optimizer. Returns the norm of the gradients before clipping, 0 if megatron-core computed none.

    megatron-core 0.19 with Transformer Engine returns it on the device: this is the only read of it, a host-device
    sync.
    """
    grad_norm = state.optimizer.step()[1]
    return 0.0 if grad_norm is None else float(grad_norm)


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


def mixed_layers(state: Trained) -> list[str]:
    """Global names of the model's layers with a lambda, in its order; none for a method without. A collective."""

    def place(name: str) -> tuple[int, bool, str]:
        _, _, number, part, *_ = name.split(".")
        return int(number), part == "mlp", name

    return sorted(all_names([*mixing_adapters(state)]) if state.peft.spec.mixes else [], key=place)


def mixtures(state: Trained, layers: Sequence[str] | None = None) -> Mixtures | None:
    """lambda now; None for a method without. A collective: one small all-reduce if `mixed_layers` are known."""
    layers = mixed_layers(state) if layers is None else layers
    if not layers:
        return None
    adapters = mixing_adapters(state)
    of_others = torch.full((2,), -1.0, dtype=torch.float64, device=torch.cuda.current_device())
    rows = [
        torch.stack([adapter.mix.double(), adapter.num_kept.double()]) if adapter is not None else of_others
        for adapter in map(adapters.get, layers)
    ]
    numbers = largest_over_world(torch.stack(rows, 1).view(-1))  # every holder of a layer has the same
    return Mixtures(dict(zip(layers, numbers, strict=False)), int(sum(numbers[len(layers) :])))


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
    for adapter in _modules_with(state.model_chunks, "merge_and_restart"):
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
