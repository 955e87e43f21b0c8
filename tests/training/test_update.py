"""What follows the optimizer's step: rules on whole matrices, --hybrid-merge-interval and the Hybrid's lambda."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.boft import ProjectedBoft, nearest_orthogonal
from megatron_peft.adapters.unitary import exponential_step
from megatron_peft.adapters.urnn import RiemannianUrnn
from megatron_peft.config import ConfigurationError, ParallelConfig, PeftConfig
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop, stop_model_parallel
from megatron_peft.training import update as update_module
from megatron_peft.training.loop import train
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.step import train_step, validation_loss
from megatron_peft.training.update import _mix_from_gradients, merge_if_due, mixing_adapters, mixtures
from tests.ranks import run_ranks
from tests.training.recorded_saves import RecordedSaves
from tests.training.test_layout import GROUPS_OF_FOUR
from tests.training.waits import Waits

RATE = 0.05
UNCHECKED = {"check_for_nan_in_loss_and_grad": False}
RIEMANNIAN = {"method": "urnn", "urnn_update": "riemannian", "urnn_block_size": 4, "peft_lr_rotation": RATE}
PROJECTED = {"method": "boft", "boft_parametrization": "projection", "peft_lr_rotation": RATE, **GROUPS_OF_FOUR}


def adapters(state, kind):
    return [module for module in state.model_chunks[0].modules() if isinstance(module, kind)]


@pytest.mark.parametrize("clip_grad", [0.0, 1e-2, 1e3])
@pytest.mark.parametrize("sharded", [False, True])
def test_riemannian_blocks_move_by_the_clipped_gradient_and_the_schedules_rate(start, clip_grad, sharded):
    settings = {"clip_grad": clip_grad, "use_distributed_optimizer": sharded, "lr_decay_style": "constant"}
    state, data = start(peft=RIEMANNIAN, optimizer=settings)
    modules = adapters(state, RiemannianUrnn)
    before = [module.U.detach().clone() for module in modules]
    kept, real = {}, state.optimizer.step
    state.optimizer.step = lambda: (kept.update({one: one.U.main_grad.clone() for one in modules}), real())[1]
    report = train_step(state, next(iter(data.train)))
    clipping = min(1.0, clip_grad / (report.grad_norm + 1e-6)) if clip_grad else 1.0
    assert len(modules) == 8 and (clipping < 0.5) == (clip_grad == 1e-2)
    for module, U in zip(modules, before, strict=True):
        gradient = kept[module].view_as(U)
        expected = exponential_step(torch.view_as_complex(U), torch.view_as_complex(gradient), RATE * clipping)
        torch.testing.assert_close(module.U.detach(), torch.view_as_real(expected), atol=1e-7, rtol=1e-6)
        assert not torch.equal(module.U, U)


def test_projected_blocks_end_where_the_optimizer_led_to(start):
    state, data = start(peft=PROJECTED)
    modules = adapters(state, ProjectedBoft)
    ended, real = {}, state.optimizer.step
    state.optimizer.step = lambda: (real(), ended.update({one: one.P.detach().clone() for one in modules}))[0]
    train_step(state, next(iter(data.train)))
    for module in modules:
        assert torch.equal(module.P.detach(), nearest_orthogonal(ended[module]))
        assert not torch.equal(module.P.detach(), ended[module])


OVERLAPPED = {"use_distributed_optimizer": True, "overlap_param_gather": True}
LATE = {"optimizer": OVERLAPPED, "training": {"overlap_grad_reduce": True}}
MERGED = {"method": "hybrid", "hybrid_merge_interval": 2, **GROUPS_OF_FOUR}
BOUNDED = {"lora_max_norm_ratio": 0.1}


@pytest.mark.parametrize(
    ("peft", "groups", "message"),
    [
        (RIEMANNIAN, LATE, "whole parameters at the end of a step, before --overlap-param-gather has"),
        (PROJECTED, LATE, "whole parameters at the end of a step, before --overlap-param-gather has"),
        (MERGED, LATE, "--hybrid-merge-interval: changes whole parameters at the end"),
        (BOUNDED, LATE, "--lora-max-norm-ratio: .* --overlap-param-gather"),
        (MERGED, {"model": {"bf16": True}}, "merges changes into weights, which must be float32: leave out --bf16"),
        (MERGED, {"optimizer": {"lr": 1e-3, "lr_warmup_init": 2e-4}}, "0.0002 is above 0.000125, .*with is_rotation"),
    ],
)
def test_what_has_no_whole_or_no_precise_parameters_as_a_step_ends_is_refused(job, peft, groups, message):
    with pytest.raises(ConfigurationError, match=message):
        job(peft=peft, **groups).config(1)


HYBRID = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 1, **GROUPS_OF_FOUR}


@pytest.mark.parametrize(
    ("peft", "rate"),
    [
        pytest.param(PROJECTED, RATE, id="nothing but rotations"),
        pytest.param({**HYBRID, "lora_ga_init": "original"}, 1e-3, id="no parameter is decayed"),
        pytest.param({**HYBRID, "lora_plus_ratio": 4.0}, 1e-3, id="three rates"),
    ],
)
def test_logged_rate_is_lr_unless_only_rotations_are_trained(start, peft, rate):
    state, data = start(peft=peft, optimizer={"lr": 1e-3, "lr_decay_style": "constant"})
    assert train_step(state, next(iter(data.train))).learning_rate == rate


def test_the_rate_of_rotations_is_that_of_their_own_group_wherever_it_stands():
    peft = PeftConfig("hybrid")
    (label,) = [one.attribute for one in peft.spec.param_groups if one.is_labelled]
    groups = [{"lr": 1.0}, {"lr": 2.0, label: True}, {"lr": 3.0, label: False}]
    for order in itertools.permutations(groups):
        state = SimpleNamespace(peft=peft, optimizer=SimpleNamespace(param_groups=order))
        assert update_module.rotation_learning_rate(state) == 2.0  # pyright: ignore[reportArgumentType]


def take_steps(state, steps, num_steps):
    for _ in range(num_steps):
        train_step(state, next(steps))
        state.position.iteration += 1


def trained(start, num_steps, interval, **settings):
    state, data = start(peft={**HYBRID, "hybrid_merge_interval": interval, **settings})
    steps = iter(data.train)
    take_steps(state, steps, num_steps)
    return state, data, steps


@pytest.mark.parametrize("settings", [{}, {"lora_ga_init": "paper"}, {"hybrid_rotation": "urnn", "urnn_block_size": 4}])
def test_merging_keeps_the_function_and_takes_the_change_back_to_zero(start, settings):
    state, data, _ = trained(start, 3, interval=4, **settings)
    before = validation_loss(state.model_chunks, data.valid)
    weights = {layer.name: layer.module.weight.clone() for layer in linear_layers(state.model_chunks[0])}
    merge_if_due(state)
    assert validation_loss(state.model_chunks, data.valid) == pytest.approx(before, rel=1e-5)
    for layer in linear_layers(state.model_chunks[0]):
        adapter = layer.module.adapter
        assert (layer.module.weight - weights[layer.name]).abs().max() > 1e-4
        assert (adapter.rotation.changes() == 0).all() and adapter.low_rank.delta_weight().abs().max() < 1e-7
        assert adapter.folded_weight.data_ptr() == layer.module.weight.data_ptr()
    moments = [moment for moments in state.optimizer.optimizer.state.values() for moment in moments.values()]
    assert moments and all((moment == 0).all() for moment in moments)


def test_a_bound_is_of_the_weight_that_the_change_is_added_to_after_a_merge_too(start):
    """So a run that is resumed after a merge has the same bound."""
    state, _, steps = trained(start, 1, interval=2, lora_max_norm_ratio=0.1)
    norms = []
    for _ in range(3):
        modules = [layer.module for layer in linear_layers(state.model_chunks[0])]
        norms.append([float(module.adapter.low_rank.base_norm or 0) for module in modules])
        weights = [float(torch.linalg.vector_norm(module.weight, dtype=torch.float64)) for module in modules]
        take_steps(state, steps, num_steps=1)
    first, merged, after = norms
    assert min(first) > 0 and merged == [0] * len(first) and after == pytest.approx(weights, rel=1e-9)
    assert all(one != pytest.approx(other, rel=1e-6) for one, other in zip(first, after, strict=True))


def test_it_merges_at_the_interval_only_and_lambda_and_training_go_on(start):
    state, data, steps = trained(start, 0, interval=2)
    losses = []
    for folded in (False, True, False, True):
        take_steps(state, steps, num_steps=1)
        assert all((adapter.low_rank.B == 0).all() == folded for adapter in mixing_adapters(state).values())
        losses.append(validation_loss(state.model_chunks, data.valid))
    assert {float(adapter.mix) for adapter in mixing_adapters(state).values()} != {0.5}
    assert losses[3] < losses[1]


def test_without_the_flag_no_weight_is_in_the_checkpoint(start):
    state, _ = start(peft=HYBRID)
    assert all(adapter.folded_weight is None for adapter in mixing_adapters(state).values())
    assert not any("folded" in name for name, _ in state.model_chunks[0].named_buffers())


@pytest.mark.parametrize("sharded", [False, True])
def test_lambda_is_the_average_of_the_ratio_of_norms_before_mixing(start, sharded):
    state, data = start(peft=HYBRID, optimizer={"use_distributed_optimizer": sharded, "clip_grad": 0.0})
    train_step(state, next(iter(data.train)))
    adapters = mixing_adapters(state)
    before = {name: float(adapter.mix) for name, adapter in adapters.items()}
    _mix_from_gradients(state)  # the gradients of the step are still there
    for name, adapter in adapters.items():
        parts = ((adapter.low_rank, before[name]), (adapter.rotation, 1 - before[name]))
        low, rotation = (torch.cat([p.main_grad.flatten() for p in x.parameters()]).norm() / mix for x, mix in parts)
        expected = 0.9 * before[name] + 0.1 * float(low / (low + rotation))
        assert float(adapter.mix) == pytest.approx(expected, rel=1e-5)
    assert len(adapters) == 8 and before != mixtures(state).by_layer


def test_records_hold_a_summary_and_a_file_of_its_own_every_layer(start, tmp_path):
    state, data = start(
        peft=HYBRID,
        checkpoint={"save": str(tmp_path)},
        logging={"log_interval": 2, "tensorboard_dir": str(tmp_path / "tb")},
    )
    train(state, data, RecordedSaves())
    lines = [json.loads(line) for line in (tmp_path / "lambda.jsonl").read_text().splitlines()]
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [line["iteration"] for line in lines] == [record["iteration"] for record in records] == [2, 4]
    values = list(lines[-1]["lambda"].values())
    assert len(values) == 8 and len(set(values)) > 1
    assert records[-1]["lambda"] == pytest.approx({"mean": sum(values) / 8, "min": min(values), "max": max(values)})
    assert "decoder.layers.1.mlp.linear_fc2" in lines[-1]["lambda"]
    assert any((tmp_path / "tb").iterdir())


def test_lambdas_stand_in_the_order_of_the_layers(start, monkeypatch):
    state, _ = start(peft=HYBRID)
    adapter = next(iter(mixing_adapters(state).values()))
    of_a_layer = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    names = [f"decoder.layers.{layer}.{name}" for layer in (2, 10) for name in of_a_layer]
    monkeypatch.setattr(update_module, "mixing_adapters", lambda _: dict.fromkeys(names[::-1], adapter))
    adapter.num_kept.fill_(2)
    assert [*mixtures(state).by_layer] == names
    assert mixtures(state).num_kept == 16, "of all layers"


def _mixtures_with_its_own_layers(by_rank):
    """Of a rank with these (lambda, times it was kept) by layer, and how many objects were gathered for it."""
    start_world("gloo")
    start_model_parallel(ParallelConfig(pipeline_model_parallel_size=2, world_size=4), seed=0)
    gathered, plain = [], dist.all_gather_object
    dist.all_gather_object = lambda *own, **group: (gathered.append(own), plain(*own, **group))
    adapters = {
        name: SimpleNamespace(mix=torch.tensor(mix), num_kept=torch.tensor(kept))
        for name, (mix, kept) in by_rank[dist.get_rank()].items()
    }
    update_module.mixing_adapters = lambda _: adapters
    state: Any = SimpleNamespace(peft=PeftConfig("hybrid"))
    layers = update_module.mixed_layers(state)
    lines = [mixtures(state, layers) for _ in range(3)]
    stop_model_parallel()
    stop()
    return lines[-1], len(gathered)


def test_a_log_line_sums_the_lambdas_of_all_ranks_and_gathers_no_objects():
    """Two replicas of each of two stages."""
    first, second, third = (f"decoder.layers.{layer}.mlp.linear_fc1" for layer in (2, 10, 11))
    replica = {second: (0.1, 1), first: (0.0, 0)}
    found = run_ranks(4, _mixtures_with_its_own_layers, [replica, replica, {third: (0.9, 2)}, {third: (0.9, 2)}])
    expected = [(first, 0.0), (second, float(torch.tensor(0.1))), (third, float(torch.tensor(0.9)))]
    for lambdas, num_gathers in found:
        assert [*lambdas.by_layer.items()] == expected and lambdas.num_kept == 3
        assert num_gathers == 1, "the names, at the start"


def test_one_log_line_reads_the_lambdas_of_all_layers_at_once(start):
    state, data = start(peft=HYBRID)
    train_step(state, data.train.step_at(0))
    layers = update_module.mixed_layers(state)
    with Waits() as waits:
        found = mixtures(state, layers)
    assert len([one for one in waits.found if "/megatron_peft/" in one]) == 1, waits.found
    assert found.by_layer == {name: float(one.mix) for name, one in mixing_adapters(state).items()}
    assert len(found.by_layer) > 1 and found.num_kept == 0


def test_a_gradient_that_is_not_finite_keeps_lambda_and_is_said(start, tmp_path, capsys):
    state, data = start(peft=HYBRID, checkpoint={"save": str(tmp_path)}, training=UNCHECKED)
    spoilt, *_ = mixing_adapters(state).values()
    spoilt.low_rank.B.register_hook(lambda gradient: gradient * float("nan"))
    train(state, data, RecordedSaves())
    assert float(spoilt.mix) == 0.5 and int(spoilt.num_kept) == 4
    assert "a lambda has kept its last value" in capsys.readouterr().out


def test_one_layers_infinite_gradient_keeps_no_other_layers_lambda(start):
    """Gradients are measured before they are clipped: clipping by an infinite norm makes all of them zero."""
    state, data = start(peft=HYBRID, training=UNCHECKED)
    spoilt, *others = mixing_adapters(state).values()
    spoilt.low_rank.B.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    train_step(state, next(iter(data.train)))
    assert float(spoilt.mix) == 0.5 and int(spoilt.num_kept) == 1
    assert all(float(adapter.mix) != 0.5 and int(adapter.num_kept) == 0 for adapter in others)
