"""Gradient buffers, optimizer and learning-rate schedule: megatron-core's, built from our configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_peft.adapters.linear import AdaptedLinear
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import PeftConfig, RunConfig, require
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import gradient_of, sum_coalesced
from megatron_peft.runtime.cpu import redirect_norm

OPTIMIZER_FIELDS = frozenset(one.name for one in fields(OptimizerConfig))


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
    wrapped = [
        DistributedDataParallel(get_model_config(chunk), settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model_chunks)
    ]
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
    return build_schedule(without_parameters, config, train_iters).state_dict()


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

    train_iters: iterations of the whole run; the default length of the decay.
    Raises ConfigurationError: the warmup is as long as the decay.
    """
    settings, batch = config.optimizer, config.global_batch_size
    decay = settings.lr_decay_samples or (settings.lr_decay_iters or train_iters) * batch
    warmup = settings.lr_warmup_samples or settings.lr_warmup_iters * batch
    if settings.lr_warmup_fraction is not None:
        warmup = int(settings.lr_warmup_fraction * decay)
    require(
        warmup < decay,  # known only here with --train-epochs
        f"--lr-warmup-iters {settings.lr_warmup_iters} leaves nothing to decay: it must be below the {decay // batch} "
        f"iterations of the run. Shorten it, lengthen --train-epochs, or use --lr-warmup-fraction.",
    )
    wsd_decay = settings.lr_wsd_decay_samples or (settings.lr_wsd_decay_iters or 0) * batch
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
        wd_incr_steps=train_iters * batch,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=wsd_decay or None,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
