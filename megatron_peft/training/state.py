"""What a training run is made of (the wrapped model, its optimizer and schedule), and how far it has come."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
from megatron_peft.config import RunConfig, require
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import sum_coalesced


class GradientShards:
    """The stretches of the flattened gradients that are this rank's own.

    Without a distributed optimizer every data-parallel rank holds the whole; with one, gradients were scattered and a
    rank has a stretch of some parameters and nothing of the others.

    Args:
        optimizer: megatron-core's.
    """

    def __init__(self, optimizer: Any) -> None:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self.is_sharded = any(isinstance(part, DistributedOptimizer) for part in parts)
        self._held = {
            parameter: part._get_model_param_range_map(parameter)["param"]
            for part in parts
            if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer
            for parameter in part.model_param_group_index_map
        }

    def stretch(self, parameter: nn.Parameter) -> slice:
        """Of the flattened gradient."""
        if not self.is_sharded:
            return slice(0, parameter.numel())
        held = self._held.get(parameter)
        return slice(0, 0) if held is None else slice(held.start, held.end)

    def own(self, parameter: nn.Parameter) -> Tensor:
        """This rank's stretch of the gradient, flat; a view."""
        return parameter.main_grad.flatten()[self.stretch(parameter)]  # pyright: ignore[reportAttributeAccessIssue]

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Copies of the whole gradients. Sharded: one all-reduce over the data-parallel ranks."""
        found = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter, dtype=torch.float32)
            gradient.view(-1)[self.stretch(parameter)] = self.own(parameter).float()
            found.append(gradient)
        if self.is_sharded and found:
            group: Any = parallel_state.get_data_parallel_group()
            sum_coalesced(found, group)
        return found


@dataclass
class Position:
    """How far a run has come. The data position is `consumed_samples`; all are counts over all ranks."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass
class TrainingState:
    """One rank's part of a run: everything that a checkpoint saves and a resumed run restores.

    `model_chunks` are wrapped in megatron-core's DistributedDataParallel, one for each virtual pipeline stage.
    `data_digest` is that of the training data, if it is known.
    """

    config: RunConfig
    shape: ModelShape
    model_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    position: Position = field(default_factory=Position)
    data_digest: str | None = None


# Gradients' buffers, optimizer and learning-rate schedule: megatron-core's own, from our configuration.


def wrap_data_parallel(model_chunks: Sequence[nn.Module], config: RunConfig) -> list[DistributedDataParallel]:
    """Each chunk with megatron-core's gradient buffers around its trainable parameters.

    Under --bf16 gradients are summed in float32, as Megatron does.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.model.bf16,
        overlap_grad_reduce=config.training.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(get_model_config(chunk), settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model_chunks)
    ]
    if settings.overlap_param_gather:
        for chunk in wrapped:
            _wait_for_parts_of_adapters(chunk)
    return wrapped


def _wait_for_parts_of_adapters(chunk: DistributedDataParallel) -> None:
    """Have an adapter's forward wait until the parameters of its parts are gathered.

    megatron-core starts and awaits a gather in front of the forward of the module that owns the parameter. An adapter
    made of parts (the Hybrid) reads their parameters and never calls them, and would train with stale ones.
    """
    wait = chunk._make_forward_pre_hook()

    def wait_for_parts(adapter: nn.Module, inputs: Any) -> None:
        for part in adapter.modules():
            wait(part)

    for module in chunk.modules():
        if isinstance(module, AdaptedLinear) and module.adapter is not None:
            module.adapter.register_forward_pre_hook(wait_for_parts)


def build_optimizer(model_chunks: Sequence[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """megatron-core's optimizer over the trainable parameters, in the groups that the method declares."""
    settings = config.optimizer
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    optimizer_config = OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.clip_grad,
        bf16=config.model.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    for group in config.peft.spec.param_groups:
        rate = group.learning_rate(config.peft, settings.lr) if group.learning_rate else settings.lr
        if rate == settings.lr and group.is_decayed:
            continue  # no group of their own: norms of gradients are summed group by group
        override: Any = {group.attribute: True}
        if rate != settings.lr:
            override |= {"max_lr": rate, "min_lr": rate / settings.lr * settings.min_lr}
        if not group.is_decayed:
            override["wd_mult"] = 0.0
        overrides[ParamKey(attr=group.attribute)] = override
    return get_megatron_optimizer(
        optimizer_config, list(model_chunks), config_overrides=overrides, use_gloo_process_groups=False
    )


def build_schedule(optimizer: MegatronOptimizer, config: RunConfig, train_iters: int) -> OptimizerParamScheduler:
    """megatron-core's schedule. It counts samples, so that a change of batch size keeps its shape.

    Args:
        train_iters: iterations of the whole run; the decay's default length.

    Raises:
        ConfigurationError: the warmup is as long as the decay.
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
