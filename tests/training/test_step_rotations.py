"""Blocks built once a step train as blocks built in every forward do, in every form of a rotation."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from weakref import ref

import pytest
import torch

from megatron_peft.adapters.boft import Boft
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.adapters.step import adapters_step
from megatron_peft.adapters.step_rotations import RotatesOnceAStep
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.parallel.collectives import gradient_of
from megatron_peft.training import step as step_module
from megatron_peft.training.step import train_step
from megatron_peft.training.validation import validation_loss
from tests.tiny_llama import save_llama
from tests.training.layout_runs import build

BOFT = {"method": "boft", "boft_block_size": 2, "boft_factors": 2}
URNN = {"method": "urnn", "urnn_block_size": 4}
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


def counted(monkeypatch) -> tuple[list[int], list[ref]]:
    """Of each computation of blocks: the number of groups, and the blocks if they still exist."""
    built, results, changes_of = [], [], Boft.changes_of

    def count(trained):
        blocks = changes_of(trained)
        built.append(len(trained))
        results.append(ref(blocks))
        return blocks

    monkeypatch.setattr(Boft, "changes_of", staticmethod(count))
    return built, results


def test_blocks_are_built_once_a_step_and_forgotten(start, monkeypatch):
    state, data = start(peft=BOFT, training={"micro_batch_size": 2})
    built, results = counted(monkeypatch)
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


def test_blocks_are_built_once_for_all_tokens_of_answers(start, monkeypatch):
    state, _ = start(peft=BOFT)
    built, _ = counted(monkeypatch)
    generate([chunk.module for chunk in state.model_chunks], [[1, 2, 3]], GenerationSettings(frozenset(), 4))  # pyright: ignore[reportArgumentType]
    assert len(built) == 1


def test_a_layer_takes_the_blocks_of_its_own_weights(start):
    state, _ = start(peft=BOFT)
    for number, rotation in enumerate(one for one in state.model_chunks[0].modules() if isinstance(one, Boft)):
        torch.nn.init.normal_(rotation.Q, std=0.1, generator=torch.Generator().manual_seed(number))
    with adapters_step(state.model_chunks, is_training=False):
        for rotation in (one for one in state.model_chunks[0].modules() if isinstance(one, Boft)):
            torch.testing.assert_close(rotation.held.D, rotation.changes(), atol=1e-6, rtol=0)


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
