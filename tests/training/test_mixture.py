"""lambda in a run: what moves it, what a log line says, and a gradient that is not finite."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_peft.training.loop import train
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.mixture import hybrid_adapters, mix_from_gradients, mixtures
from megatron_peft.training.step import train_step
from tests.training.recorded_saves import RecordedSaves

PEFT = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 1, "boft_block_size": 2, "boft_factors": 2}


def hybrid(start, tmp_path=None, **groups):
    settings = {"checkpoint": {"save": str(tmp_path)}} if tmp_path else {}
    return start(**settings, **{"peft": PEFT, **groups})


@pytest.mark.parametrize("sharded", [False, True])
def test_lambda_is_the_average_of_the_ratio_of_norms_before_mixing(start, sharded):
    state, data = hybrid(start, optimizer={"use_distributed_optimizer": sharded, "clip_grad": 0.0})
    train_step(state, next(iter(data.train)))
    adapters = hybrid_adapters(state)
    before = {name: float(adapter.mix) for name, adapter in adapters.items()}
    mix_from_gradients(state)  # the gradients of the step are still there
    for name, adapter in adapters.items():
        parts = ((adapter.low_rank, before[name]), (adapter.rotation, 1 - before[name]))
        low, rotation = (torch.cat([p.main_grad.flatten() for p in x.parameters()]).norm() / mix for x, mix in parts)
        expected = 0.9 * before[name] + 0.1 * float(low / (low + rotation))
        assert float(adapter.mix) == pytest.approx(expected, rel=1e-5)
    assert len(adapters) == 8 and before != mixtures(state).by_layer


def test_records_hold_a_summary_and_a_file_of_its_own_every_layer(start, tmp_path):
    state, data = hybrid(start, tmp_path, logging={"log_interval": 2, "tensorboard_dir": str(tmp_path / "tb")})
    train(state, data, RecordedSaves())
    lines = [json.loads(line) for line in (tmp_path / "lambda.jsonl").read_text().splitlines()]
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [line["iteration"] for line in lines] == [record["iteration"] for record in records] == [2, 4]
    values = list(lines[-1]["lambda"].values())
    assert len(values) == 8 and len(set(values)) > 1
    assert records[-1]["lambda"] == pytest.approx({"mean": sum(values) / 8, "min": min(values), "max": max(values)})
    assert "decoder.layers.1.mlp.linear_fc2" in lines[-1]["lambda"]
    assert any((tmp_path / "tb").iterdir())


def test_a_gradient_that_is_not_finite_keeps_lambda_and_is_said(start, tmp_path, capsys):
    state, data = hybrid(start, tmp_path, training={"check_for_nan_in_loss_and_grad": False})
    adapters = list(hybrid_adapters(state).values())
    spoilt = adapters[0]
    spoilt.low_rank.B.register_hook(lambda gradient: gradient * float("nan"))
    train(state, data, RecordedSaves())
    assert float(spoilt.mix) == 0.5 and int(spoilt.num_kept) == 4
    assert "a lambda has kept its last value" in capsys.readouterr().out


def test_one_layers_infinite_gradient_keeps_no_other_layers_lambda(start):
    """Gradients are measured before they are clipped: clipping by an infinite norm makes all of them zero."""
    state, data = hybrid(start, training={"check_for_nan_in_loss_and_grad": False})
    spoilt, *others = hybrid_adapters(state).values()
    spoilt.low_rank.B.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    train_step(state, next(iter(data.train)))
    assert float(spoilt.mix) == 0.5 and int(spoilt.num_kept) == 1
    assert all(float(adapter.mix) != 0.5 and int(adapter.num_kept) == 0 for adapter in others)


def test_other_methods_have_no_lambda(start, tmp_path):
    state, data = start(checkpoint={"save": str(tmp_path)})
    train(state, data, RecordedSaves())
    assert mixtures(state) is None and not (tmp_path / "lambda.jsonl").exists()
