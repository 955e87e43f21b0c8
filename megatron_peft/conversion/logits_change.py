"""What writing a run as a LoRA changes in its logits: by decoder layer, and with all of it in place.

The run's own model is built in float32 and run on random tokens. Then the weights of one decoder layer at a time are
those of the base plus the factors, all others the run's. At last all of them are, and what a LoRA leaves out has the
base's values: that is what the written adapter computes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_peft.config import ModelConfig
from megatron_peft.conversion.lora_approximation import ModuleLora, RunAsLora
from megatron_peft.conversion.pretrained import Weights, base_parameters, load_pretrained, open_weights
from megatron_peft.conversion.trained_adapters import WEIGHT, TrainedAdapters, layer_name
from megatron_peft.conversion.verify import (
    Difference,
    LogitComparison,
    Trace,
    compare_traces,
    random_tokens,
    single_process,
    traced,
)
from megatron_peft.models.rules import Rule


@dataclass(frozen=True)
class LogitsChange:
    """Of the adapter against the run; `layers` has it for each decoder layer alone."""

    whole: LogitComparison
    layers: list[Difference]


def logits_change(run: TrainedAdapters, base: Path, lora: RunAsLora, num_tokens: int) -> LogitsChange:
    """Compare the run with what its LoRA computes, on two random sequences.

    Needs the memory of one model in float32.

    Args:
        run: of any method.
        base: the folder of its base model.
        lora: what `approximate` has found.
        num_tokens: of a sequence.
    """
    shape = run.record.shape
    tokens = random_tokens(shape.vocab_size, min(num_tokens, shape.max_position_embeddings))
    with single_process() as parallel, torch.no_grad():
        from megatron_peft.models.gpt import build_model_chunks

        (chunk,) = build_model_chunks(shape, ModelConfig(str(base), transformer_impl="local"), parallel)
        _load_run(chunk, run, base)
        model = _LoraModel(chunk, lora, *open_weights(base, shape), tokens, shape.vocab_size)
        reference = model.trace()
        layers = [model.difference_of_layer(number, reference) for number in range(shape.num_layers)]
        model.become_lora()
        return LogitsChange(compare_traces(model.trace(), reference), layers)


def _load_run(chunk: nn.Module, run: TrainedAdapters, base: Path) -> None:
    """The run's merged weights."""
    trains_adapters, peft = run.record.config.peft.trains_adapters, run.record.config.peft
    folder = base if trains_adapters else run.folder
    load_pretrained([chunk], folder, run.record.shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    parameters = dict(base_parameters(chunk))
    for layer in run.record.adapted_layers if trains_adapters else ():
        weight = parameters[layer + WEIGHT]
        weight.copy_(import_module(peft.spec.adapter).merge(weight.detach().cpu(), run.of(layer), peft))


@dataclass(frozen=True)
class _LoraModel:
    """The run's model on its tokens, whose weights can become those of base and factors."""

    chunk: nn.Module
    lora: RunAsLora
    rules: Mapping[str, Rule]
    weights: Weights
    tokens: Tensor
    vocab_size: int

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(base_parameters(self.chunk))

    def trace(self, first_layer: int = 0, hidden: Tensor | None = None) -> Trace:
        """Run the layers from `first_layer` on, on the output [s, b, h] of the one before."""
        device = self.tokens_on_device.device
        positions = torch.arange(self.tokens.shape[1], device=device).expand(self.tokens.shape)
        start = None if hidden is None else hidden.to(device)
        with _without_layers(self.chunk, first_layer) as layers:

            def run() -> Tensor:
                logits = self.chunk.eval()(self.tokens_on_device, positions, None, decoder_input=start)
                return logits[..., : self.vocab_size]

            return traced(run, layers)

    @property
    def tokens_on_device(self) -> Tensor:
        return self.tokens.to(next(self.chunk.parameters()).device)

    def difference_of_layer(self, number: int, reference: Trace) -> Difference:
        """What the factors of one decoder layer alone change. The weights are the run's again afterwards."""
        prefix = f"decoder.layers.{number}."
        names = [layer + WEIGHT for layer in self.lora.layers if layer.startswith(prefix)]
        before = {name: self.parameters[name].clone() for name in names}
        for name in names:
            self._become_lora(name)
        hidden = reference.layers[number - 1] if number else None
        found = Difference.of(self.trace(number, hidden).logits, reference.logits)
        for name, weight in before.items():
            self.parameters[name].copy_(weight)
        return found

    def become_lora(self) -> None:
        """Every parameter is what the adapter on its base has."""
        for name in self.parameters:
            self._become_lora(name)

    def _become_lora(self, name: str) -> None:
        rule, parameter = self.rules[name], self.parameters[name]
        self.weights.read(rule, parameter, 0, 1)
        for module in self.lora.layers.get(layer_name(rule), ()):
            _add(parameter, module)


def _add(weight: Tensor, module: ModuleLora) -> None:
    """W += B A in the module's rows."""
    change = (module.found.B @ module.found.A).to(weight)
    for rows in module.ranges:
        weight[rows.megatron] += change[rows.hf]


@contextmanager
def _without_layers(chunk: nn.Module, first_layer: int) -> Iterator[nn.ModuleList]:
    """The decoder as if it began with `first_layer`."""
    decoder = chunk.get_submodule("decoder")
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    decoder.layers = layers[first_layer:]
    try:
        yield decoder.layers
    finally:
        decoder.layers = layers
