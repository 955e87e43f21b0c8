"""What an adapter builds once a step is there for every forward of it, wherever a step is, and gone afterwards."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.step import AdaptersStep, adapters_step
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.training.run import first_steps, start_lora_ga
from megatron_peft.training.step import train_step
from megatron_peft.training.validation import validation_loss

FORWARDS = "forwards"


class Counted(nn.Module):
    """Another adapter's function; counts steps and forwards."""

    held: Any = None

    def __init__(self, adapter: nn.Module, seen: list[Any]) -> None:
        super().__init__()
        self.own, self.seen = adapter, seen

    @staticmethod
    def begin_step(layers: Any, is_training: bool) -> list[Any]:
        layers[0].adapter.seen.append(("begin", len(layers), is_training, torch.is_grad_enabled()))
        return [f"of {number}" for number in range(len(layers))]

    @staticmethod
    def end_step(layers: Any) -> list[nn.Parameter]:
        layers[0].adapter.seen.append(("end", layers[0].adapter.own.B.main_grad.abs().sum().item() > 0))
        return []

    def forward(self, x: Any, call: Any) -> Any:
        assert self.held is not None, "a forward without what the step has built"
        if self.seen[-1] != FORWARDS:
            self.seen.append(FORWARDS)
        return self.own(x, call)


@pytest.fixture
def counted(start):
    """A state with two of its layers' adapters counted; its data; what was seen."""
    state, data = start(peft={"method": "lora", "lora_rank": 4}, training={"micro_batch_size": 2})
    seen: list[Any] = []
    layers = [target.module for target in linear_layers(state.model_chunks[0])][1:3]
    for layer in layers:
        layer.adapter = Counted(layer.adapter, seen)
    yield state, data, seen
    assert all(layer.adapter.held is None for layer in layers)


def test_a_training_step_begins_and_ends_once(counted):
    state, data, seen = counted
    step = next(iter(data.train))
    assert len(step) > 1
    train_step(state, step)
    assert seen == [("begin", 2, True, True), FORWARDS, ("end", True)]


def test_validation_and_generation_begin_without_gradients(counted):
    state, data, seen = counted
    step = next(iter(data.train))
    validation_loss(state.model_chunks, [step, step])
    begun = [("begin", 2, False, False), FORWARDS]
    assert seen == begun
    models: Any = [chunk.module for chunk in state.model_chunks]
    generate(models, [[1, 2, 3]], GenerationSettings(frozenset(), 4))
    assert seen == 2 * begun


def test_each_pass_of_lora_gas_start_is_a_step_of_the_layers_that_it_does_not_sketch(start):
    state, data = start(peft={"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 1})
    seen: list[Any] = []
    [chunk] = [wrapped.module for wrapped in state.model_chunks]
    layer = next(linear_layers(chunk)).module
    layer.adapter = Counted(layer.adapter, seen)
    start_lora_ga([chunk], state.config, first_steps(state.config, data.train))
    assert seen == 2 * [("begin", 1, True, True), FORWARDS]
    assert layer.adapter.held is None


def test_a_step_that_fails_is_forgotten(counted):
    state, _, seen = counted
    with pytest.raises(RuntimeError), adapters_step(state.model_chunks):
        raise RuntimeError
    assert len(seen) == 1


def test_parameters_are_gathered_in_the_order_of_the_modules():
    """Every rank must ask for them in the same one."""
    seen: list[nn.Module] = []

    class Wrapped(DistributedDataParallel):
        def __init__(self, adapters: nn.ModuleList) -> None:
            nn.Module.__init__(self)
            self.adapters, self.remove_forward_pre_hook_handles = adapters, {"one": "hook"}

        def _make_forward_pre_hook(self) -> Any:
            return seen.append

    adapters = nn.ModuleList(nn.Identity() for _ in range(50))
    step = object.__new__(AdaptersStep)
    step.model_chunks = [Wrapped(adapters)]
    step.layers = {nn.Identity: [SimpleNamespace(adapter=one) for one in reversed(adapters)]}
    step._gather_parameters()
    assert seen == [*adapters]
