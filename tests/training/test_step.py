"""A training step: the loss is a mean over tokens, gradients are whole however sharded, a NaN changes no parameter.

Validation loss is such a mean too; adapters without gradient and drifting rotations are detected.
"""

import itertools
import math
import signal
from types import SimpleNamespace

import pytest
import torch

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.training import loop, step
from megatron_peft.training.loop import train
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.step import (
    ORTHOGONALITY_LIMIT,
    NonFiniteError,
    inference_mode,
    largest_orthogonality_error,
    layers_without_gradient,
    run_schedule,
    train_step,
    validation_loss,
)
from megatron_peft.training.update import GradientShards
from tests.kept import kept_for_backward
from tests.training.recorded_saves import RecordedSaves, signal_in_forward
from tests.training.test_layout import METHODS


def _trained(state):
    return {name: p for chunk in state.model_chunks for name, p in chunk.named_parameters() if p.requires_grad}


def _steps(start, count=3, **groups):
    state, data = start(**groups)
    steps = iter(data.train)
    return [train_step(state, next(steps)) for _ in range(count)]


@pytest.mark.parametrize(("num_losses", "counted"), [(0, 0), (2, 7)], ids=["another stage", "the last stage"])
def test_pairs_are_counted_where_the_losses_are(alone, num_losses, counted):
    """Every stage has the microbatches, and the sum is over all."""
    losses = torch.ones(num_losses, 3, dtype=torch.float64)
    assert step._sum_over_world(losses, [], False, 7, None)[5] == counted


def test_one_number_that_is_not_finite_is_seen_wherever_it_stands(alone):
    for place in range(7):
        losses, gradients = torch.ones(3, 3, dtype=torch.float64), [torch.ones(5) for _ in range(4)]
        (losses[place, 0] if place < 3 else gradients[place - 3][-1]).fill_(math.nan)
        buffers = [SimpleNamespace(grad_data=one) for one in gradients]
        chunks = [SimpleNamespace(buffers=buffers[:2]), SimpleNamespace(buffers=buffers[2:])]
        assert step._sum_over_world(losses, chunks, False, 7, None)[3] == 1, place


def test_the_pretrained_weights_are_in_place_and_frozen_and_it_says_so(start, capsys):
    lora, full = start()[0], start(peft={"method": "full"})[0]
    said, layers = capsys.readouterr().out, "linear_fc1 (2), linear_fc2 (2), linear_proj (2), linear_qkv (2)"
    assert "MiB of weights on this rank" in said and f"--peft-method lora: 8 layers: {layers}" in said
    loaded = dict(lora.model_chunks[0].named_parameters())
    for name, parameter in full.model_chunks[0].named_parameters():
        assert torch.equal(loaded[name], parameter), name
        assert parameter.requires_grad and not loaded[name].requires_grad
    assert loaded["module.embedding.word_embeddings.weight"].std() > 0.01


def test_microbatches_change_nothing_but_rounding(start):
    expected, *others = (_steps(start, training={"micro_batch_size": size}) for size in (2, 1, 4, 8))
    for found in others:
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-5)
            assert ours.num_tokens == theirs.num_tokens


@pytest.mark.parametrize("method", METHODS)
def test_training_on_a_batch_lowers_its_loss(start, method):
    state, data = start(num_steps=6, **METHODS[method])
    losses = [train_step(state, data.train.step_at(0)).loss for _ in range(4)]
    assert losses[3] < losses[0] - 0.02


def test_the_loss_is_the_mean_over_all_completion_tokens(start):
    state, data = start()
    microbatches = next(iter(data.train))
    sums, counts = [], []
    for microbatch in microbatches:
        model, labels = state.model_chunks[0], microbatch.labels
        losses = model(microbatch.tokens, microbatch.position_ids, None, labels=labels).detach()
        sums.append((losses * microbatch.loss_mask).sum().item())
        counts.append(microbatch.loss_mask.sum().item())
    report = train_step(state, microbatches)
    assert len(set(counts)) > 1, "equal counts could not tell a mean of means from a mean"
    assert report.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-6)
    assert report.num_tokens == sum(counts)
    assert report.num_positions == sum(microbatch.tokens.numel() for microbatch in microbatches)


def test_a_packed_sample_does_not_see_the_one_before_it(start):
    state, data = start(data_settings={"pack_sequences": True})
    (microbatch, *_) = next(iter(data.train))
    first = slice(0, int(microbatch.cu_seqlens[1]))
    microbatch.loss_mask[:, first] = 0
    losses = []
    for token in (1, 2):
        microbatch.tokens[:, first] = token
        losses.append(float(run_schedule(state.model_chunks, [microbatch], forward_only=True)[0, 0]))
    assert losses[0] == losses[1] > 0


def test_the_norm_is_of_a_steps_own_gradients_before_clipping_and_known_without(start):
    state, data = start(optimizer={"lr": 1e-30, "clip_grad": 1e9})
    reports = [train_step(state, data.train.step_at(0), by_layer=True) for _ in range(2)]
    norms = [report.grad_norm for report in reports]
    assert [math.hypot(*report.layer_grad_norms) for report in reports] == pytest.approx(norms, rel=1e-5)
    norms += [_steps(start, 1, optimizer={"clip_grad": clip_grad})[0].grad_norm for clip_grad in (1e-3, 0.0)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-5) and norms[0] > 1e-2


def test_the_reported_rate_is_that_of_the_step(start):
    reports = _steps(start, 4, optimizer={"lr": 1e-3, "lr_decay_style": "linear", "lr_warmup_iters": 2})
    assert [report.learning_rate for report in reports] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


def test_a_signal_in_the_forward_of_a_step_makes_it_the_last(start):
    state, data = start(num_steps=4)
    signal_in_forward(state, 1, signal.SIGTERM)
    assert "asked to stop at iteration 2" in train(state, data, RecordedSaves())


def test_a_loss_that_is_not_finite_is_named_and_changes_no_parameter(start):
    state, data = start()
    steps = iter(data.train)
    train_step(state, next(steps))
    state.position.iteration, count = 1, itertools.count()
    hook = lambda module, inputs, losses: losses * torch.nan if next(count) == 2 else losses  # noqa: E731
    state.model_chunks[0].module.register_forward_hook(hook)
    before = {name: p.detach().clone() for name, p in _trained(state).items()}
    told = r"(?s)iteration 2: the loss is NaN or infinite \(rank 0, microbatch 2\).*those of iteration 1\..*--no-check"
    with pytest.raises(NonFiniteError, match=told):
        train_step(state, next(steps))
    assert all(torch.equal(before[name], parameter) for name, parameter in _trained(state).items())


def test_a_gradient_that_is_not_finite_has_its_own_message(start):
    state, data = start()
    parameter = next(iter(_trained(state).values()))
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match="iteration 1: a gradient is NaN or infinite"):
        train_step(state, next(iter(data.train)))
    assert all(torch.isfinite(parameter).all() for parameter in _trained(state).values())


def test_a_bfloat16_step_trains(start):
    state, data = start(model={"bf16": True}, optimizer={"lr": 1e-2})
    steps = iter(data.train)
    before = {name: p.detach().clone() for name, p in _trained(state).items()}
    reports = [train_step(state, next(steps)) for _ in range(2)]
    assert all(report.grad_norm > 0 for report in reports)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in _trained(state).items())
    assert {parameter.dtype for parameter in _trained(state).values()} == {torch.bfloat16}


@pytest.mark.parametrize("sharded", [False, True])
def test_own_shards_make_the_whole_gradient(start, sharded):
    state, data = start(optimizer={"use_distributed_optimizer": sharded, "clip_grad": 0.0})
    train_step(state, next(iter(data.train)))
    shards = GradientShards(state.optimizer)
    parameters = [p for p in state.model_chunks[0].parameters() if p.requires_grad]
    assert shards.is_sharded is sharded and len(parameters) == 16
    for parameter, whole in zip(parameters, shards.whole(parameters), strict=True):
        assert torch.equal(whole, parameter.main_grad.float()) and whole.data_ptr() != parameter.main_grad.data_ptr()
        assert torch.equal(shards.own(parameter), parameter.main_grad.flatten())
    elsewhere = torch.nn.Parameter(torch.zeros(3))  # a rank that shards holds nothing of what others hold
    elsewhere.main_grad = torch.ones(3)
    assert shards.own(elsewhere).numel() == (0 if sharded else 3)
    assert torch.equal(shards.whole([elsewhere])[0], torch.zeros(3) if sharded else torch.ones(3))


def test_recomputed_modules_change_nothing(start):
    """Of a model whose linear_fc2 has a bias, which is then an output of megatron-core's checkpointed function."""
    found = []
    for modules in ((), ("core_attn", "layernorm", "mlp")):
        recompute = {"recompute_granularity": "selective"} if modules else {}
        model = {"recompute_modules": modules}
        state, data = start(peft={"method": "full"}, transformer=recompute, model=model)
        layer = state.model_chunks[0].module.decoder.layers[0]
        assert (layer.recompute_mlp, layer.recompute_input_layernorm) == (bool(modules),) * 2
        report = train_step(state, next(iter(data.train)), by_layer=True)
        found.append((report.loss, report.grad_norm, report.layer_grad_norms))
    assert found[0] == found[1]


GROUPS_OF_FOUR = {"boft_block_size": 2, "boft_factors": 2, "urnn_block_size": 4}


def peft(method, **settings):
    return {"peft": {"method": method, "lora_rank": 4, "lora_ga_batches": 1, **GROUPS_OF_FOUR, **settings}}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("lora-ga", {"lora_ga_init": "paper"}),
        ("boft", {"boft_parametrization": "projection"}),
        ("urnn", {"urnn_update": "riemannian"}),
        ("hybrid", {"hybrid_lambda": "fixed:0"}),
    ],
)
def test_every_adapted_layer_has_a_gradient_after_the_first_backward(start, monkeypatch, method, settings):
    state, data = start(**peft(method, **settings))
    train_step(state, next(iter(data.train)))
    for others in ([], [{}]):  # another stage has other layers
        monkeypatch.setattr(step, "gather_over_world", lambda own, others=others: [own, *others])
        assert layers_without_gradient(state) == []


def test_a_layer_that_is_cut_off_is_named_in_a_run(start, tmp_path, capsys):
    state, data = start(**peft("lora"), checkpoint={"save": str(tmp_path)})
    assert largest_orthogonality_error(state) is None
    layer = next(layer for layer in linear_layers(state.model_chunks[0]) if layer.name.endswith("1.mlp.linear_fc2"))
    layer.module.adapter.forward = lambda x, call: call.reduce(torch.nn.functional.linear(x, call.weight))
    train(state, data, RecordedSaves())
    said = capsys.readouterr().out
    assert said.count("WARNING: 1 adapted layers have no gradient after the first step") == 1 and layer.name in said


@pytest.mark.parametrize(
    ("method", "data_settings", "recorded"),
    [
        pytest.param("boft", {}, [2, 4], id="boft"),
        pytest.param("urnn", {}, [2, 4], id="urnn"),
        pytest.param("hybrid", {}, [2, 4], id="hybrid"),
        pytest.param("boft", {"valid_data_path": ()}, [4], id="no validation data"),
    ],
)
def test_orthogonality_is_recorded_with_validation_and_at_the_end(
    start, tmp_path, method, data_settings, recorded, capsys
):
    groups = {"training": {"eval_interval": 2}, "checkpoint": {"save": str(tmp_path)}, "data_settings": data_settings}
    state, data = start(**peft(method, peft_lr_rotation=1e-2), **groups)
    train(state, data, RecordedSaves())
    records = read_metrics(tmp_path / METRICS_FILE)
    errors = {one["iteration"]: one["orthogonality_error"] for one in records if "orthogonality_error" in one}
    assert [*errors] == recorded and all(0 < error < ORTHOGONALITY_LIMIT for error in errors.values())
    assert "WARNING" not in capsys.readouterr().out


def test_a_rotation_that_drifts_gives_a_warning(start, tmp_path, capsys):
    state, data = start(**peft("boft", boft_parametrization="projection"), checkpoint={"save": str(tmp_path)})
    assert largest_orthogonality_error(state) == 0
    [*linear_layers(state.model_chunks[0])][-1].module.adapter.project = lambda: None
    train(state, data, RecordedSaves())
    assert largest_orthogonality_error(state) > ORTHOGONALITY_LIMIT
    assert "away from orthogonal, above 1e-05: lower --peft-lr-rotation" in capsys.readouterr().out


def test_a_rotation_of_which_one_number_is_nan_gives_a_warning(start, capsys, monkeypatch):
    state, data = start(**peft("boft"), num_steps=1)
    monkeypatch.setattr(loop.step, "largest_orthogonality_error", lambda state: math.nan)
    train(state, data, RecordedSaves())
    assert "a rotation is nan away from orthogonal" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("boft", {"peft_lr_rotation": 1e-3}),
        ("boft", {"peft_lr_rotation": 1e-3, "boft_parametrization": "projection"}),
        ("urnn", {"peft_lr_rotation": 3e-3}),
        ("urnn", {"peft_lr_rotation": 0.1, "urnn_update": "riemannian"}),
    ],
)
def test_rotations_that_are_trained_in_bfloat16_for_long_stay_orthogonal(start, method, settings):
    state, data = start(
        **peft(method, **settings), model={"bf16": True}, training={"global_batch_size": 2}, num_steps=250
    )
    losses = [train_step(state, microbatches).loss for microbatches in itertools.islice(iter(data.train), 250)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert 0 < largest_orthogonality_error(state) < ORTHOGONALITY_LIMIT


def _by_hand(state, data):
    model, total, count = state.model_chunks[0], 0.0, 0.0
    with torch.no_grad():
        for sample in range(len(data.valid.dataset)):
            (microbatch,) = data.valid.step_at(sample)[:1]
            losses = model(microbatch.tokens[:1], microbatch.position_ids[:1], None, labels=microbatch.labels[:1])
            total += (losses * microbatch.loss_mask[:1]).sum().item()
            count += microbatch.loss_mask[:1].sum().item()
    return total / count


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_validation_loss_is_the_mean_over_the_tokens_of_all_samples(start, micro_batch_size):
    """40 samples in steps of 9: the last step is filled up with padding."""
    training = {"micro_batch_size": micro_batch_size, "global_batch_size": 9, "eval_iters": None}
    state, data = start(training=training)
    assert validation_loss(state.model_chunks, data.valid) == pytest.approx(_by_hand(state, data), rel=1e-6)


def test_dropout_is_off_in_validation_and_its_samples_are_the_same_each_time(start):
    plain, _ = start()
    state, data = start(peft={"lora_rank": 4, "lora_dropout": 0.5}, transformer={"hidden_dropout": 0.5})
    loss = validation_loss(state.model_chunks, data.valid)
    assert loss == validation_loss(plain.model_chunks, data.valid) == validation_loss(state.model_chunks, data.valid)
    assert all(chunk.training for chunk in state.model_chunks)


def test_all_chunks_train_on_after_a_validation():
    chunks: list = [torch.nn.Dropout(), torch.nn.Dropout()]
    for chunk in chunks:
        chunk.ddp_config = SimpleNamespace(overlap_param_gather=False)
    with inference_mode(chunks):
        assert not any(chunk.training for chunk in chunks)
    assert all(chunk.training for chunk in chunks)


def test_nothing_is_kept_for_a_backward_and_without_samples_it_is_zero(start):
    state, data = start()
    with kept_for_backward() as kept:
        validation_loss(state.model_chunks, data.valid)
    assert kept == [] and validation_loss(state.model_chunks, []) == 0.0
