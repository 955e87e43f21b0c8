"""Parameter groups, their learning rates, and the schedule."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as optimizer_module

from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.adapters.step import AdaptersStep
from megatron_peft.checkpoint.state import Position
from megatron_peft.config import ConfigurationError
from megatron_peft.training import update as state_module
from megatron_peft.training.run import length_of_resumed
from megatron_peft.training.step import layers_without_gradient, train_step
from megatron_peft.training.update import build_optimizer, build_schedule, wrap_data_parallel

HYBRID = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 1, "boft_block_size": 2, "boft_factors": 2}
LINEAR = {"lr_decay_style": "linear"}


def _groups(state, key):
    """What the groups of the optimizer say under `key`, by trained parameter."""
    names = {p: name for chunk in state.model_chunks for name, p in chunk.named_parameters()}
    return {names[p]: group[key] for group in state.optimizer.param_groups for p in group["params"]}


def test_lora_plus_gives_every_B_a_rate_of_its_own_that_follows_the_schedule(start):
    settings = {"lr": 1e-3, "min_lr": 1e-4, **LINEAR}
    state, _ = start(peft={"lora_rank": 4, "lora_plus_ratio": 8.0}, optimizer=settings)
    rates = _groups(state, "max_lr")
    assert len(rates) == 16
    assert rates == pytest.approx({name: 8e-3 if name.endswith(".B") else 1e-3 for name in rates})
    state.schedule.step(2 * state.config.global_batch_size)
    assert sorted({group["lr"] for group in state.optimizer.param_groups}) == pytest.approx([5.5e-4, 4.4e-3])


def test_only_trainable_parameters_have_gradients_and_moments(start):
    state, _ = start(peft={"lora_rank": 4, "target_modules": ("linear_fc2",)})
    fc2 = "module.decoder.layers.{}.mlp.linear_fc2.adapter.{}"
    assert set(_groups(state, "max_lr")) == {fc2.format(layer, factor) for layer in (0, 1) for factor in "AB"}
    assert sum(buffer.numel_unpadded for buffer in state.model_chunks[0].buffers) == 2 * 4 * (160 + 96)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_virtual_stages_gather_ahead_where_the_weights_are_trained(job, monkeypatch, num_chunks, method, overlaps):
    """Only the first of them has buckets, as in Megatron; the others' sums wait for the whole chunk."""
    made = []

    def wrap(config, settings, chunk, disable_bucketing):
        made.append((settings, disable_bucketing))
        return SimpleNamespace(start_param_sync=lambda: chunk, _make_forward_pre_hook=lambda: None, modules=list)

    monkeypatch.setattr(state_module, "DistributedDataParallel", wrap)
    flags = {"use_distributed_optimizer": overlaps, "overlap_param_gather": overlaps}
    config = job(peft={"method": method}, optimizer=flags, training={"overlap_grad_reduce": overlaps}).config(1)
    chunks = [SimpleNamespace(config=SimpleNamespace(param_sync_func=None), parameters=list) for _ in range(num_chunks)]
    wrap_data_parallel(chunks, config)
    ahead = overlaps and method == "full" and num_chunks > 1
    assert [settings.align_param_gather for settings, _ in made] == [ahead] * num_chunks
    assert [disabled for _, disabled in made] == [number > 0 for number in range(num_chunks)]
    gathers = chunks[0].config.param_sync_func
    assert [one() for one in gathers or []] == (chunks if ahead else [])


@pytest.mark.parametrize("init, decay_of_factors", [("aligned", 0.1), ("original", 0.0)])
def test_rotations_and_factors_with_a_subtracted_start_do_not_decay(start, init, decay_of_factors):
    state, _ = start(peft={**HYBRID, "lora_ga_init": init}, optimizer={"weight_decay": 0.1})
    decays = _groups(state, "weight_decay")
    assert len(decays) == 24
    for name, decay in decays.items():
        assert decay == (0.0 if ".rotation." in name else decay_of_factors), name


def test_the_hybrids_parts_have_rates_of_their_own(start):
    state, _ = start(peft={**HYBRID, "lora_plus_ratio": 8.0, "peft_lr_rotation": 3e-4}, optimizer={"lr": 1e-3})
    found = {name.split(".adapter.")[1]: rate for name, rate in _groups(state, "max_lr").items()}
    assert found == pytest.approx({"low_rank.A": 1e-3, "low_rank.B": 8e-3, "rotation.Q": 3e-4})


def test_a_mixture_waits_for_the_parameters_of_its_parts(start, monkeypatch):
    """megatron-core waits before the forward of the module that owns them, which a mixture does not call.

    Nor does a method of one's own, for which no step gathers them.
    """
    hook, waited_for = DistributedDataParallel._make_forward_pre_hook, []

    def watched_hook(chunk):
        wait = hook(chunk)
        return lambda module, *inputs: (waited_for.append(module), wait(module, *inputs))[1]

    monkeypatch.setattr(DistributedDataParallel, "_make_forward_pre_hook", watched_hook)
    monkeypatch.setattr(AdaptersStep, "_gather_parameters", lambda self: None)
    late = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    state, data = start(peft=HYBRID, optimizer=late, training={"overlap_grad_reduce": True})
    train_step(state, next(iter(data.train)))
    mixtures = [module for module in state.model_chunks[0].modules() if isinstance(module, Hybrid)]
    assert len(mixtures) == 8 and all(any(one.low_rank is module for module in waited_for) for one in mixtures)


def test_two_clipped_steps_are_adamw_by_hand(start):
    """No schedule has touched the optimizer: rates, betas and decay are those that it was built with."""
    settings = {"adam_beta1": 0.6, "adam_beta2": 0.7, "adam_eps": 0.1, "weight_decay": 0.2, "clip_grad": 0.5}
    state, _ = start(optimizer={"lr": 1e-2, **settings})
    optimizer = build_optimizer(state.model_chunks, state.config)
    parameters = [p for p in state.model_chunks[0].parameters() if p.requires_grad]
    values = [p.detach().double() for p in parameters]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    draw = torch.Generator().manual_seed(0)
    for step in (1, 2):
        gradients = [torch.randn(p.shape, generator=draw) for p in parameters]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
        for parameter, gradient, value, (m, v) in zip(parameters, gradients, values, moments, strict=True):
            parameter.main_grad.copy_(gradient)
            clipped = gradient.double() * 0.5 / norm
            m.lerp_(clipped, 0.4)
            v.lerp_(clipped.square(), 0.3)
            change = m / (1 - 0.6**step) / ((v / (1 - 0.7**step)).sqrt() + 0.1)
            value.mul_(1 - 1e-2 * 0.2).sub_(1e-2 * change)
        assert optimizer.step()[1] == pytest.approx(float(norm))
    for parameter, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7)


def test_gradients_of_a_bfloat16_model_are_summed_in_float32(start):
    state, _ = start(model={"bf16": True})
    trained = [p for p in state.model_chunks[0].parameters() if p.requires_grad]
    assert {(p.dtype, p.main_grad.dtype) for p in trained} == {(torch.bfloat16, torch.float32)}


def recorded(apply, passed):
    """megatron-core's caller of a fused kernel; what it is given goes to `passed`."""

    def record(kernel, flag, lists, *args):
        passed.append((kernel, lists))
        return apply(kernel, flag, lists, *args)

    return record


@pytest.mark.parametrize("sharded", [False, True])
def test_where_gradients_are_summed_in_bfloat16_those_of_rotations_are_not(start, monkeypatch, sharded):
    """Transformer Engine's kernels read a whole list as the type of its first tensor (Megatron-LM's issue 7338). Here
    the float32 gradients of rotations stand beside bfloat16 ones of factors; megatron-core copies both to float32."""
    state, data = start(
        peft=HYBRID,
        model={"bf16": True},
        training={"grad_reduce_in_bf16": True},
        optimizer={"use_distributed_optimizer": sharded, "clip_grad": 1e-3},
    )
    trained = dict(state.model_chunks[0].named_parameters())
    kinds = {name.split(".")[-1]: p.main_grad.dtype for name, p in trained.items() if p.requires_grad}
    assert kinds == {"A": torch.bfloat16, "B": torch.bfloat16, "Q": torch.float32}
    passed = []
    for module in (clip_grads, optimizer_module):
        monkeypatch.setattr(module, "multi_tensor_applier", recorded(module.multi_tensor_applier, passed))
    assert train_step(state, next(iter(data.train))).grad_norm > 0 and layers_without_gradient(state) == []
    assert {clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl} <= {kernel for kernel, _ in passed}
    assert {p.dtype for group in state.optimizer.param_groups for p in group["params"]} == {torch.float32}
    assert all(len({tensor.dtype for tensor in tensors}) == 1 for _, lists in passed for tensors in lists)


def test_the_embedding_and_the_output_layer_have_rates_of_their_own_and_norms_and_biases_no_decay(start):
    rates = {"lr": 1e-3, "min_lr": 1e-5, "decoupled_lr": 5e-4, "decoupled_min_lr": 2e-5, "weight_decay": 0.1, **LINEAR}
    state, _ = start(peft={"method": "full"}, optimizer=rates)
    decays = _groups(state, "weight_decay")
    assert decays == {name: 0.0 if name.endswith("bias") or "norm" in name else 0.1 for name in decays}
    of_vocabulary = {name: "word_embeddings" in name or "output_layer" in name for name in _groups(state, "max_lr")}
    assert sum(of_vocabulary.values()) == 2
    for key, own, common in (("max_lr", 5e-4, 1e-3), ("min_lr", 2e-5, 1e-5)):
        expected = {name: own if found else common for name, found in of_vocabulary.items()}
        assert _groups(state, key) == pytest.approx(expected)
    state, _ = start(optimizer=rates)
    assert set(_groups(state, "max_lr").values()) == {1e-3}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lr_decay_style": "constant"}, [1.0] * 9),
        (LINEAR, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
        ({**LINEAR, "lr_decay_iters": 4, "min_lr": 0.2}, [1.0, 0.8, 0.6, 0.4] + [0.2] * 5),
        ({**LINEAR, "lr_warmup_iters": 4, "lr_warmup_init": 0.2}, [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ({**LINEAR, "lr_warmup_fraction": 0.25}, [0.0, 0.5] + [1 - n / 6 for n in range(7)]),
        ({**LINEAR, "lr_warmup_fraction": 0.5, "lr_decay_iters": 4}, [0.0, 0.5, 1.0, 0.5] + [0.0] * 5),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_wsd_decay_style": "linear"}, [1.0] * 7 + [0.5, 0.0]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}, [1.0] * 7 + [2 * 0.5**0.5 - 1, 0.0]),
    ],
)
def test_the_schedule_counts_the_runs_iterations(start, settings, expected):
    state, _ = start(num_steps=8, optimizer={"lr": 1.0, **settings})
    for rate in expected:
        assert state.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        state.schedule.step(state.config.global_batch_size)


@pytest.mark.parametrize(
    ("style", "expected"),
    [("linear", [0.1, 0.15, 0.2, 0.25, 0.3]), ("cosine", [0.1, 0.2 - 0.1 * 0.5**0.5, 0.2, 0.2 + 0.1 * 0.5**0.5, 0.3])],
    ids=["linear", "cosine"],
)
def test_weight_decay_increases_over_the_run(start, style, expected):
    rising = {"start_weight_decay": 0.1, "end_weight_decay": 0.3, "weight_decay_incr_style": style}
    state, _ = start(num_steps=4, optimizer={"lr_decay_iters": 2, **rising})
    for decay in expected:
        assert state.optimizer.param_groups[0]["weight_decay"] == pytest.approx(decay)
        state.schedule.step(state.config.global_batch_size)


def test_a_warmup_as_long_as_an_epoch_is_refused(start):
    """Only the data says how many iterations --train-epochs are."""
    state, _ = start(optimizer={"lr_warmup_iters": 3})
    with pytest.raises(ConfigurationError, match="--lr-warmup-iters 3 .* below the 3 iterations"):
        build_schedule(state.optimizer, state.config, train_iters=3)


def test_a_last_phase_that_does_not_fit_behind_the_warmup_is_refused(start):
    settings = {"lr_warmup_iters": 1, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_wsd_decay_style": "linear"}
    state, _ = start(optimizer=settings)
    build_schedule(state.optimizer, state.config, train_iters=4)
    with pytest.raises(ConfigurationError, match="a last phase of 3 iterations does not fit behind a warmup of 1 into"):
        build_schedule(state.optimizer, state.config, train_iters=3)


@pytest.mark.parametrize(
    ("length", "batch", "steps", "samples", "expected"),
    [
        ({"train_iters": 400}, 8, 200, 800, 400),
        ({"train_samples": 1600}, 4, 200, 800, 400),  # as it began
        ({"train_samples": 1600}, 8, 200, 800, 300),
        ({"train_samples": 1600}, 2, 200, 800, 600),
        ({"train_samples": 1600}, 8, 201, 804, 300),  # no step beyond them
        ({"train_epochs": 1}, 8, 201, 804, 301),  # all of them
        ({"train_samples": 1600 + 12}, 16, 1, 12, 101),  # those that both batches leave over count once
        ({"train_epochs": 1.015}, 16, 3, 24, 103),
    ],
)
def test_a_run_that_is_resumed_with_another_batch_trains_the_samples_that_are_left(
    length, batch, steps, samples, expected
):
    lengths = {"train_iters": None, "train_samples": None, "train_epochs": None, **length}
    config: Any = SimpleNamespace(global_batch_size=batch, training=SimpleNamespace(**lengths))
    order = SimpleNamespace(positions_in=lambda epochs: round(1600 * epochs))
    data: Any = SimpleNamespace(train=SimpleNamespace(order=order), train_iters=length.get("train_iters"))
    assert length_of_resumed(config, data, Position(steps, samples)) == expected


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 5}


@pytest.mark.parametrize(
    ("settings", "decay"),
    [({}, 14), ({"lr_decay_samples": 10, "lr_warmup_samples": 3, **WSD}, 10)],
    ids=["default", "typed"],
)
def test_the_decay_of_a_run_in_samples_is_as_long_as_it_was_typed_whatever_the_batch(start, settings, decay):
    samples = {"train_iters": None, "train_samples": 14}
    state, _ = start(training={"global_batch_size": 4, **samples}, optimizer=settings)
    assert (state.schedule.lr_decay_steps, state.schedule.wd_incr_steps) == (decay, 14)
    others = (state.schedule.lr_warmup_steps, state.schedule.wsd_decay_steps)
    assert others == (settings.get("lr_warmup_samples", 0), settings.get("lr_wsd_decay_samples"))
