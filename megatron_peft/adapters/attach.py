"""Adapters put in place of a model's linear layers, or merged into them; `config.methods` says which layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from megatron_peft.adapters.linear import AdaptedLinear, FrozenColumnParallelLinear, adopt
from megatron_peft.config import LINEAR_MODULES, PeftConfig, is_targeted, require, require_matches
from megatron_peft.parallel.collectives import gather_slices
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime.launch import checked_together, gather_over_world
from megatron_peft.runtime.precision import full_precision


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer and its global name, `decoder.layers.N.….linear_x`."""

    name: str
    module: AdaptedLinear


def attach_adapters(model_chunks: Sequence[nn.Module], peft: PeftConfig, seed: int) -> list[str]:
    """Freeze the base model and give every targeted layer its adapter.

    Returns the global names of this rank's adapted layers. They and the run's seed fix the initial values.

    Raises ConfigurationError: on every rank, with nothing changed: a pattern matches nothing in the whole model (the
        message lists what exists), or the method does not fit a layer.
    """
    targets = [target for chunk in model_chunks for target in linear_layers(chunk)]
    modules = huggingface_modules(model_chunks)
    require_matches(peft.target_modules, all_names([target.name for target in targets]), modules)
    adapted = [target for target in targets if is_targeted(target.name, peft.target_modules, modules)]
    checked_together(lambda: [peft.spec.check_layer(peft, layer.module.layout, layer.name) for layer in adapted])
    for chunk in model_chunks:
        freeze(chunk)
    adapters: dict[str, nn.Module] = {}
    for dtype in dict.fromkeys(layer.module.weight.dtype for layer in adapted):  # none where a stage adapts no layer
        layouts = {layer.name: layer.module.layout for layer in adapted if layer.module.weight.dtype == dtype}
        adapters |= new_adapters(layouts, peft, seed, dtype)
    for target in adapted:
        adapter: Any = adapters[target.name]
        target.module.adapter = adapter
        if hasattr(adapter, "bind_weight"):  # it may change the layer's own weight
            weight = target.module.weight
            require(
                not hasattr(weight, "quantized") or getattr(adapter, "takes_quantized_weight", False),
                f"--peft-method {peft.method} starts from its layers' weights, which --base-precision leaves without "
                f"memory of their own: leave that out.",
            )
            adapter.bind_weight(weight)
    for chunk in model_chunks:
        if chunk.config.recompute_granularity is not None or not any(t.module.adapter for t in linear_layers(chunk)):
            start_gradients_at_the_embedding(chunk)
    return [target.name for target in adapted]


def new_adapters(
    layouts: Mapping[str, LinearLayout], peft: PeftConfig, seed: int, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Adapters of this rank's layers, by the layers' global names.

    What the layers share is made once by `share` of the method's module, and given to each adapter's `bind_shared`.
    """
    method = import_module(peft.spec.adapter)
    adapters = {name: method.build(layout, peft, f"{name}.adapter", seed, dtype) for name, layout in layouts.items()}
    if hasattr(method, "share"):
        shared = method.share([*dict.fromkeys(layouts.values())], peft, seed, dtype)
        for adapter in adapters.values():
            adapter.bind_shared(shared)
    return adapters


def freeze(chunk: nn.Module) -> None:
    """No parameter of a model chunk is trained, and while none is, its linear layers multiply as adapted ones do."""
    chunk.requires_grad_(False)
    for module in chunk.modules():
        if isinstance(module, (AdaptedLinear, FrozenColumnParallelLinear)):
            module.is_frozen = True


def linear_layers(chunk: nn.Module) -> Iterator[TargetLayer]:
    """The linear layers of a model chunk that can be adapted."""
    layers = [module for module in chunk.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, AdaptedLinear):
                yield TargetLayer(f"decoder.layers.{layer.layer_number - 1}.{name}", module)


# A model of another program, made of megatron-core's own layers.


def make_adaptable(model_chunks: Sequence[Any], peft: PeftConfig) -> None:
    """Turn the linear layers of megatron-core's `get_gpt_layer_local_spec` into ours, which can take an adapter.

    Weights, their names and keys in checkpoints, and the function stay the same.

    Raises ConfigurationError: a targeted layer is of another class, as Transformer Engine's are, or is an expert's.
    """
    modules, problems = huggingface_modules(model_chunks), []
    for chunk in model_chunks:
        for name, layer in _named_linear_layers(chunk):
            problem = adopt(layer, name.rpartition(".")[2], chunk.config)
            if problem and is_targeted(name, peft.target_modules, modules):
                problems.append(f"{name} is {problem}")
    checked_together(
        lambda: require(
            not problems,
            f"{'; '.join(problems[:4])}{'; ...' if len(problems) > 4 else ''}: adapters fit megatron-core's own linear "
            f"layers. Build the model with get_gpt_layer_local_spec(), or leave these layers out of target_modules.",
        )
    )


def _named_linear_layers(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for layer in [module for module in chunk.modules() if isinstance(module, TransformerLayer)]:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in LINEAR_MODULES:
                yield f"decoder.layers.{layer.layer_number - 1}.{name}", module


@torch.no_grad()
@full_precision
def merge_adapters(model_chunks: Sequence[nn.Module], peft: PeftConfig) -> None:
    """Merge every adapter into its layer's weight, in place, and remove it. A collective.

    A layer at a time is put together, in float32 at least, and every rank keeps its slice.

    Raises ConfigurationError: the method's adapters cannot be merged.
    """
    method = import_module(peft.spec.adapter)
    require(hasattr(method, "merge"), f"adapters of {peft.spec.describe(peft)} cannot be merged.")
    is_quantized = any(parameter.is_meta for chunk in model_chunks for parameter in chunk.parameters())
    require(not is_quantized, "adapters cannot be merged into a quantized base: megatron-peft convert merge does it.")
    for layer in (target.module for chunk in model_chunks for target in linear_layers(chunk)):
        if layer.adapter is None:
            continue
        layout, weight = layer.layout, layer.weight
        state = layer.adapter.state_dict(keep_vars=True)
        tensors = {name: gather_slices(tensor, layout.group) for name, tensor in state.items()}
        whole = gather_slices(weight, layout.group).to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        changed = method.merge(whole, tensors, peft)
        weight.copy_(layout.slice_output(layout.slice_input(changed)))
        layer.adapter = None


def all_names(names: Sequence[str]) -> list[str]:
    """The union of every stage's names: a pattern may match on another pipeline stage only. A collective."""
    stages: Any = parallel_state.get_pipeline_model_parallel_group()
    return sorted({name for stage_names in gather_over_world({*names}, stages) for name in stage_names})


def huggingface_modules(model_chunks: Sequence[Any]) -> Mapping[str, str]:
    """Hugging Face's names of the model's linear layers -> the last part of Megatron's (`q_proj` -> `linear_qkv`).

    A model of another program has none.
    """
    return getattr(model_chunks[0].config, "huggingface_modules", {})


def start_gradients_at_the_embedding(chunk: Any) -> RemovableHandle | None:
    """Make the frozen embedding's output require a gradient, which training by itself has no use for.

    Activation recompute skips the backward of a checkpointed block whose input needs none: every adapter of the first
    stage would silently keep gradient zero. A stage without adapters still needs a differentiable output, and LoRA-GA
    needs a backward through layers without trainable parameters.

    Returns what removes it again; None where the chunk has no embedding.
    """
    embedding = getattr(chunk, "embedding", None)
    if embedding is None:
        return None
    return embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
