"""What adapters build once a step is there for every forward of it, wherever a step is, and gone afterwards.

Blocks of rotations that are built once train as blocks built in every forward do, in every form of a rotation.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.boft import Boft
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.adapters.rotation import RotatesOnceAStep
from megatron_peft.adapters.step import AdaptersStep, adapters_step
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.parallel.collectives import gradient_of
from megatron_peft.training import step as step_module
from megatron_peft.training.run import first_steps, start_lora_ga
from megatron_peft.training.step import train_step, validation_loss
from tests.tiny_llama import save_llama
from tests.training.layout_runs import build
from tests.training.test_layout import BOFT, URNN

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


HYBRID = {**BOFT, **URNN, "method": "hybrid", "lora_rank": 4, "lora_ga_batches": 2}
FORMS = {
    "boft": BOFT,
    "boft of the input": {**BOFT, "rotation_side": "input"},
    "boft projection": {**BOFT, "boft_parametrization": "projection"},
    "urnn": URNN,
    "urnn of the input": {**URNN, "rotation_side": "input"},
    "urnn riemannian": {**URNN, "urnn_update": "riemannian", "peft_lr_rotation": 1e-2},
    "urnn replace": {**URNN, "urnn_mode": "replace", "target_modules": ("linear_proj",)},
    "hybrid": HYBRID,
    "hybrid with urnn": {**HYBRID, "hybrid_rotation": "urnn"},
    "hybrid that merges": {**HYBRID, "hybrid_merge_interval": 2},
    "hybrid of a fixed lambda": {**HYBRID, "hybrid_lambda": "fixed:0.3"},
}


@contextmanager
def built_in_each_forward(model_chunks):
    yield None


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> str:
    """A base whose heads fill the hidden size."""
    return str(save_llama(tmp_path_factory.mktemp("square"), num_hidden_layers=2, hidden_size=120))


def _reports(job, square, form, count=3):
    """(loss, norm of the gradient) of some steps of two microbatches each, and what was trained."""
    run = job(peft=FORMS[form], training={"micro_batch_size": 4}, optimizer={"lr": 1e-2})
    state, data = build((replace(run, base=square) if "replace" in form else run).config(1))
    steps = iter(data.train)
    reports = [train_step(state, next(steps)) for _ in range(count)]
    numbers = [number for report in reports for number in (report.loss, report.grad_norm)]
    trained = [p.detach().clone() for chunk in state.model_chunks for p in chunk.parameters() if p.requires_grad]
    return numbers, trained


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_blocks_built_in_each_forward(job, alone, square, monkeypatch, form):
    built_once, trained = _reports(job, square, form)
    monkeypatch.setattr(step_module, "adapters_step", built_in_each_forward)
    expected, expected_trained = _reports(job, square, form)
    assert built_once == pytest.approx(expected, rel=2e-5)
    assert any(abs(one - other) > 0 for one, other in zip(built_once[::2], built_once[2::2], strict=False))
    for ours, theirs in zip(trained, expected_trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_blocks_are_built_once_a_step_and_forgotten(start, monkeypatch):
    state, data = start(peft=BOFT, training={"micro_batch_size": 2})
    built, results, changes_of = [], [], Boft.changes_of

    def count(trained):
        blocks = changes_of(trained)
        built.append(len(trained))
        results.append(ref(blocks))
        return blocks

    monkeypatch.setattr(Boft, "changes_of", staticmethod(count))
    step = next(iter(data.train))
    assert len(step) > 1, "one microbatch could not tell once a step from once a microbatch"
    train_step(state, step)
    rotations = [module for module in state.model_chunks[0].modules() if isinstance(module, Boft)]
    assert built == [sum(one.num_local_groups for one in rotations)] and len(rotations) == 8
    assert all(one.held is None for one in rotations)
    assert results[0]() is None, "their memory is kept until the next step"
    validation_loss(state.model_chunks, [step, step])
    assert len(built) == 2
    built.clear()
    with pytest.raises(RuntimeError), adapters_step(state.model_chunks, is_training=False):
        raise RuntimeError
    assert all(one.held is None for one in rotations)


def test_each_layer_has_the_formula_of_what_it_keeps(start):
    """Whatever stands between them: at TP2 a Hybrid's column layers keep something else than its row layers."""
    state, _ = start(peft=HYBRID)
    adapters = [module for module in state.model_chunks[0].modules() if isinstance(module, Hybrid)]
    for number, one in enumerate(adapters):
        torch.nn.init.normal_(one.rotation.Q, std=0.1, generator=torch.Generator().manual_seed(number))
    kinds = cycle(["input", "mixed output", "output"])
    for one, kept in zip(adapters, kinds, strict=False):
        one.applied_rotation = partial(replace, one.applied_rotation(), kept=kept)
    layers = [SimpleNamespace(adapter=one, weight=torch.zeros(())) for one in adapters]

    def gradients(*together):
        for one in adapters:
            gradient_of(one.rotation.trained).zero_()
        for some in together:
            for layer, held in zip(some, RotatesOnceAStep.begin_step(some, is_training=True), strict=True):
                layer.adapter.held = held
                held.total.normal_(generator=torch.Generator().manual_seed(layers.index(layer)))
            assert len(RotatesOnceAStep.end_step(some)) == len(some)
        return [gradient_of(one.rotation.trained).clone() for one in adapters]

    together = gradients(layers)
    alone = gradients(*([layer] for layer in layers))
    for mine, expected in zip(together, alone, strict=True):
        assert expected.any()
        torch.testing.assert_close(mine, expected)


def test_groups_too_large_for_blocks_have_none(start, monkeypatch):
    monkeypatch.setattr("megatron_peft.adapters.urnn.DENSE_UP_TO", 2)
    state, data = start(peft=URNN)
    with adapters_step(state.model_chunks):
        adapters = [module.adapter for module in state.model_chunks[0].modules() if hasattr(module, "adapter")]
        assert adapters and all(one.held is None for one in adapters)
    assert train_step(state, next(iter(data.train))).grad_norm > 0
