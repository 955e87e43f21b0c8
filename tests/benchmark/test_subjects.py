"""Every benchmark is documented, and the measured steps do what they are said to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_peft.benchmark import registry, subjects
from megatron_peft.benchmark.registry import BENCHMARKS, Workplace
from megatron_peft.benchmark.subjects import STEPS, Setting
from tests.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_benchmarks_are_those_of_the_documentation() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \|", PAGE.read_text(), re.M) == list(BENCHMARKS)


def test_model_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(registry, "loading_figures", lambda setting: seen.append(setting) or [])
    (tmp_path / "model").mkdir()
    BENCHMARKS["loading"].measure(Workplace(tmp_path, tmp_path / "model", turns=1))
    assert seen[0].checkpoint == str(tmp_path / "model") and seen[0].tensor_parallel == 3


def test_every_token_counts_and_labels_are_the_next_tokens() -> None:
    batch = subjects.microbatch(Setting("nowhere", rows=2, positions=8), vocab_size=50)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.num_loss_tokens == 16


def test_small_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(subjects, "SHAPE", {**subjects.SHAPE, **small, "num_hidden_layers": 1})
    folder = subjects.save_shape(tmp_path / "a")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert (subjects.save_shape(folder) / "model.safetensors").stat().st_mtime_ns == written


def losses_of_two_steps(setting: Setting) -> dict[str, list[float]]:
    """Started on a rank. Loss sums of our steps, in the same world."""
    subjects.join(setting)
    losses = {}
    for name in ("frozen", "lora", "full"):
        step = STEPS[name](setting)
        losses[name] = [_loss(step()) for _ in range(3)]
    subjects.leave()
    return losses


def _loss(answer) -> float:
    if isinstance(answer, torch.Tensor):  # of the schedule: sum of the losses, tokens, positions
        return (answer[0, 0] / answer[0, 1]).item()
    return answer.loss


def test_frozen_base_learns_nothing_and_the_others_do(tiny: Setting) -> None:
    (losses,) = run_ranks(1, losses_of_two_steps, tiny)
    frozen, lora, full = losses["frozen"], losses["lora"], losses["full"]
    assert frozen[0] == frozen[2] == pytest.approx(lora[0], rel=1e-6) == pytest.approx(full[0], rel=1e-6)
    assert lora[2] < lora[0] and full[2] < full[0]


def test_peer_starts_from_the_same_weights_and_learns(tiny: Setting) -> None:
    step = subjects.hf_peft_step(tiny)
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[0]
