"""Adapters on a model and in a loop of the user's own: docs/your-own-model.md.

`add_adapters` returns a handle. What it does stands around the loop's own forward, backward and optimizer:

    begin_step        before the first microbatch
    sum_gradients     after the last backward; or `finalize_model_grads`, called by megatron-core's schedule
    step              the optimizer's step, and what the method adds to it
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_peft.adapters.attach import attach_adapters, linear_layers, make_adaptable, merge_adapters
from megatron_peft.adapters.step import AdaptersStep, adapters_step
from megatron_peft.checkpoint.load import require_whole
from megatron_peft.checkpoint.save import write_new_folder
from megatron_peft.checkpoint.tensors import ADAPTER, global_slices, load_parameters, sharded_parameters, sharded_state
from megatron_peft.config import METHODS, ConfigurationError, PeftConfig, require
from megatron_peft.lora_ga.initialize import init_from_gradients
from megatron_peft.parallel.collectives import gradient_of, sum_partial_gradients_over_tensor_parallel
from megatron_peft.runtime.launch import checked_together
from megatron_peft.training.step import finish_gradients
from megatron_peft.training.terminal import print_rank_0, unused_flags_notes
from megatron_peft.training.update import CLIP_EPSILON, group_overrides, mixtures, update


def add_adapters(
    model: nn.Module | Sequence[nn.Module],
    config: PeftConfig,
    *,
    seed: int = 1234,
    huggingface_modules: Mapping[str, str] | None = None,
) -> "ModelAdapters":
    """Freeze a GPTModel of megatron-core and give its targeted linear layers adapters. A collective.

    Call it once the weights are loaded or before, on the device that trains, and before the model is wrapped in
    DistributedDataParallel, but after Float16Module, which would round rotations to bf16. The model keeps the names of
    its parameters; those of adapters are `....adapter.*`.

    model: of `get_gpt_layer_local_spec` (megatron-core's own layers); under the interleaved schedule the list of this
    rank's chunks.
    seed: with the names of the layers it fixes the initial values, at any layout.
    huggingface_modules: names that `config.target_modules` may use, such as {"q_proj": "linear_qkv"}.
    Raises ConfigurationError: on every rank, with the model unchanged: the targets match nothing, a targeted layer is
    of a class that takes no adapter, the method does not fit a layer, or the model has adapters already.
    """
    chunks = list(model) if isinstance(model, Sequence) else [model]
    checked_together(lambda: _check_model(chunks, config))
    if huggingface_modules is not None:
        for chunk in chunks:
            settings: Any = chunk.config
            settings.huggingface_modules = dict(huggingface_modules)
    make_adaptable(chunks, config)
    for note in unused_flags_notes(config):
        print_rank_0(note)
    return ModelAdapters(chunks, config, seed, attach_adapters(chunks, config, seed))


def _check_model(chunks: Sequence[nn.Module], config: PeftConfig) -> None:
    require(
        config.trains_adapters,
        f"PeftConfig(method={config.method!r}) trains the model's own weights and has no adapters: train the model as "
        "it is, or use another method.",
    )
    parts = TransformerLayer, TransformerBlock  # a pipeline stage may have a block without layers
    for chunk in chunks:
        wrapped = isinstance(chunk, DistributedDataParallel)
        require(not wrapped, "add_adapters: the model is wrapped in DistributedDataParallel: wrap it afterwards.")
        require(
            any(isinstance(module, parts) for module in chunk.modules()) and hasattr(chunk, "config"),
            f"add_adapters: {type(chunk).__name__} has no TransformerLayer of megatron-core: pass a GPTModel.",
        )
        attached = any(name.endswith(".adapter") for name, _ in chunk.named_modules())
        require(not attached, "add_adapters: the model has adapters already; merge() removes them.")
        current = torch.device(torch.cuda.current_device())
        device = next((parameter.device for parameter in chunk.parameters()), current)  # a chunk may hold no layer
        require(
            device == current, f"add_adapters: the model is on {device}, but this rank trains on {current}: move it."
        )


class ModelAdapters:
    """The adapters of a model, in a loop of the user's own.

    names: global names of this rank's adapted layers.
    iteration: steps taken; set it when a loop resumes (`--hybrid-merge-interval` counts by it).
    lr: the peak learning rate that `param_groups` or `config_overrides` was given.
    """

    def __init__(self, model_chunks: Sequence[nn.Module], peft: PeftConfig, seed: int, names: Sequence[str]) -> None:
        self.model_chunks, self.peft, self.seed, self.names = model_chunks, peft, seed, tuple(names)
        self.iteration, self.lr, self.clip_grad = 0, 0.0, 0.0
        self.scatters_gradients = False
        self.optimizer: Any = None
        self.current: AdaptersStep | None = None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained on this rank."""
        parameters = (parameter for chunk in self.model_chunks for parameter in chunk.parameters())
        return [parameter for parameter in parameters if parameter.requires_grad]

    # The optimizer: the method's own groups, with their learning rates and without decay where it would do harm.

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for an optimizer of torch, such as AdamW. `lr` is the peak; a schedule scales all rates alike.

        A collective. Raises ConfigurationError, on every rank: the weight of a layer with an adapter is not frozen.
        """
        self._set_rate(lr)
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for parameter in self.parameters():
            own = [group for group in self.peft.spec.param_groups if getattr(parameter, group.attribute, False)]
            rate = next((group.learning_rate(self.peft, lr) for group in own if group.learning_rate), lr)
            decays = parameter.ndim > 1 and all(group.is_decayed for group in own)
            labels = {group.attribute: True for group in own if group.is_labelled}
            settings = {"lr": rate, "weight_decay": weight_decay if decays else 0.0, **labels}
            groups.setdefault((*settings.items(),), {"params": [], **settings})["params"].append(parameter)
        return list(groups.values())

    def config_overrides(self, optimizer_config: OptimizerConfig) -> dict[Any, Any]:
        """`config_overrides` for `get_megatron_optimizer`, whose `lr` and `min_lr` the groups' rates follow.

        A collective. Raises ConfigurationError, on every rank: the weight of a layer with an adapter is not frozen; or
        the optimizer scales the loss, and the method takes gradients as they are.
        """
        scales = {name: getattr(optimizer_config, name) for name in ("fp16", "loss_scale")}
        scaled = [f"{name}={value}" for name, value in scales.items() if value]
        require(
            not (scaled and self.peft.spec.updates_whole_parameters(self.peft)),
            f"adapters.config_overrides: {' and '.join(self.peft.spec.late_updates(self.peft))} takes gradients as "
            f"they are, but with OptimizerConfig({', '.join(scaled)}) they are multiplied by a loss scale: train in "
            f"bf16 or float32, without loss_scale.",
        )
        self._set_rate(optimizer_config.lr or 0.0)
        return group_overrides(self.peft, optimizer_config)

    def _set_rate(self, lr: float) -> None:
        require(lr > 0, f"the learning rate is {lr}; it must be above 0.")
        layers = [layer for chunk in self.model_chunks for layer in linear_layers(chunk) if layer.module.adapter]
        trained = [layer.name for layer in layers if layer.module.weight.requires_grad]
        message = (
            f"{', '.join(trained[:4])}{', ...' if len(trained) > 4 else ''}: the weight of a layer with an adapter "
            f"gets no gradient, but its requires_grad is True: leave it frozen, or the layer out of target_modules."
        )
        checked_together(lambda: require(not trained, message))  # one stage may have such a layer, and others none
        self._check_step()
        self.lr = lr

    def _check_step(self) -> None:
        """Raise ConfigurationError if adapters cannot begin a step, as rotations that Float16Module has rounded."""

        def begin_and_end() -> None:
            with adapters_step(self.model_chunks, is_training=False):
                pass

        checked_together(begin_and_end)

    # LoRA-GA and the Hybrid.

    def start_from_gradients(self, replay: Callable[[], None], num_tokens: int = 1) -> dict[str, float]:
        """LoRA-GA's start: set A and B from the gradient of the base weights over some batches. A collective.

        replay: runs forward and backward over the same batches at each of its two calls, and no optimizer.
        num_tokens: what the sum of the losses, over all batches of `replay`, microbatches and replicas, is divided by:
            their tokens if each loss is a sum, the number of losses if each is a mean. `lora_ga_init="paper"` depends
            on it. megatron-core's schedule makes one mean of a call's microbatches.
        Returns, by layer of this rank, the share of the gradient's squared norm in the directions that were taken.
        """
        able = ", ".join(name for name, method in METHODS.items() if method.starts_from_gradients)
        require(
            self.peft.spec.starts_from_gradients,
            f"start_from_gradients: {self.peft.spec.describe(self.peft)} has no such start; use one of {able}.",
        )
        self._check_step()  # here, since a Hybrid's passes of this start do not use its rotation
        return init_from_gradients(self.model_chunks, self.peft, self.seed, replay, num_tokens).energy

    # A step.

    def begin_step(self) -> None:
        """Call it before the first microbatch of a step: gradients become zero, and what holds for a step is built."""
        for parameter in self.parameters():
            gradient_of(parameter).zero_()
            if hasattr(parameter, "main_grad"):  # where backward's own gradient is added
                parameter.grad = None
        self.current = AdaptersStep(self.model_chunks)
        self.current.begin()

    def sum_gradients(self) -> None:
        """Call it after the last backward of a step where no schedule of megatron-core does. A collective.

        It completes the gradients of rotations, and of parameters that every tensor-parallel rank holds.
        `finalize_model_grads` does the same, and sums over data-parallel replicas.
        """
        group: Any = parallel_state.get_tensor_model_parallel_group()
        require(
            parallel_state.get_data_parallel_world_size() == 1,
            "sum_gradients sums over tensor-parallel ranks only, and there are data-parallel replicas: wrap the model "
            "in megatron-core's DistributedDataParallel and set or call finalize_model_grads, which sums over both.",
        )
        self._end_step(self.model_chunks)
        sum_partial_gradients_over_tensor_parallel(self.model_chunks, group)

    def finalize_model_grads(self, model: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
        """megatron-core's own sums, then ours: set it as `TransformerConfig.finalize_model_grads_func`."""
        wrapped = [chunk for chunk in model if isinstance(chunk, DistributedDataParallel)]
        gathers_late = any(chunk.ddp_config.overlap_param_gather for chunk in wrapped)
        require(not gathers_late, "adapters read parameters before a late gather ends: set overlap_param_gather=False.")
        self.scatters_gradients = any(chunk.ddp_config.use_distributed_optimizer for chunk in wrapped)
        self._end_step(model)
        finish_gradients(model, *args, **kwargs)

    def _end_step(self, model: Sequence[nn.Module]) -> None:
        current, self.current = self.current, None
        if current is not None:
            current.finish(model)
            current.clear()

    def step(self, optimizer: Any, clip_grad: float = 0.0) -> float:
        """Take the optimizer's step, and what the method adds to it (`training.update`). A collective.

        optimizer: of torch, made of `param_groups`; or megatron-core's, made with `config_overrides`.
        clip_grad: norm over all ranks to which gradients are clipped for torch's optimizer; 0: they are not.
        megatron-core's clips by its own `clip_grad`.
        Returns the norm of the whole gradient, before clipping.
        """
        require(
            self.lr > 0,
            "adapters.step: make the optimizer of adapters.param_groups(lr) or with adapters.config_overrides(config): "
            "the method has learning rates of its own.",
        )
        require(
            self.current is None,
            "adapters.step: gradients are not complete, nor summed over the tensor-parallel ranks: call "
            "adapters.sum_gradients() after the last backward, or set config.finalize_model_grads_func = "
            "adapters.finalize_model_grads.",
        )
        if isinstance(optimizer, MegatronOptimizer):
            require(not clip_grad, "adapters.step: megatron-core's optimizer clips by OptimizerConfig(clip_grad=...).")
            self.optimizer, self.clip_grad = optimizer, optimizer.config.clip_grad
        else:
            require(
                not self.scatters_gradients,
                "adapters.step: with use_distributed_optimizer=True a rank has the sums of its own shard alone: use "
                "megatron-core's get_megatron_optimizer, or use_distributed_optimizer=False.",
            )
            self.optimizer, self.clip_grad = PlainOptimizer(optimizer, clip_grad), clip_grad
        grad_norm = update(self)
        self.iteration += 1
        return grad_norm

    @property
    def mixtures(self) -> dict[str, float]:
        """The Hybrid's lambda by layer of the whole model; empty for other methods. A collective."""
        lambdas = mixtures(self)
        return lambdas.by_layer if lambdas else {}

    # What becomes of the adapters.

    def save(self, folder: str | Path) -> None:
        """Write the adapters, without the method's numbers, to a new folder in Megatron's `torch_dist` format.

        A collective. Raises ConfigurationError, on every rank, if the folder exists or cannot be written.
        """
        entries = sharded_parameters(self.model_chunks, only_adapters=True)
        write_new_folder([tensor for entry in entries for tensor in global_slices(entry)], Path(folder))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote, at this layout or another, before the optimizer is made. A collective.

        Raises ConfigurationError, on every rank, with nothing changed, if it is damaged or of another method or rank.
        """
        require_whole(Path(folder))
        load_parameters(sharded_parameters(self.model_chunks, only_adapters=True), Path(folder))

    def sharded_state_dict(self) -> dict[str, Any]:
        """The adapters for `megatron.core.dist_checkpointing`, in a checkpoint of your own.

        What its `load` returns goes to `model.load_state_dict(..., strict=False)`. Several chunks are `model0`, ...
        """
        states = [
            {name: entry for name, entry in sharded_state(chunk).items() if ADAPTER in name}
            for chunk in self.model_chunks
        ]
        return states[0] if len(states) == 1 else {f"model{index}": state for index, state in enumerate(states)}

    def merge(self) -> None:
        """Merge the adapters into the model's weights, in place, and remove them. A collective."""
        merge_adapters(self.model_chunks, self.peft)
        self.names = ()


class PlainOptimizer:
    """An optimizer of torch, stepped as megatron-core's are: gradients are clipped by their norm over all ranks.

    torch's own clipping would give each tensor-parallel rank another norm, and copies of a parameter would drift apart.
    """

    is_stub_optimizer = False

    def __init__(self, optimizer: torch.optim.Optimizer, clip_grad: float) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigurationError(f"adapters.step: {type(optimizer).__name__} is not an optimizer of torch.")
        self.optimizer, self.clip_grad = optimizer, clip_grad

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> tuple[bool, float, None]:
        """(True, the norm before clipping, None), as megatron-core's optimizers."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [gradient_of(parameter) for parameter in parameters]
        # The norm is that of the whole gradient: what every tensor-parallel rank holds counts once.
        counts_replicated = parallel_state.get_tensor_model_parallel_rank() == 0
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if counts_replicated or getattr(parameter, "tensor_model_parallel", False)
        ]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=torch.cuda.current_device())
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        norm = float(total.sqrt())
        if self.clip_grad > 0:
            torch._foreach_mul_(gradients, min(1.0, self.clip_grad / (norm + CLIP_EPSILON)))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        self.optimizer.step()
        return True, norm, None
