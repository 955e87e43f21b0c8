"""Megatron-LM's Llama scripts, with only paths and sizes changed, train two steps; what they ask for is done."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_peft.checkpoint import load
from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.runtime.launch import stop_model_parallel
from megatron_peft.training import watchers
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.run import finetune
from tests.data.tiny_tokenizers import save_tokenizer
from tests.one_rank import one_rank
from tests.tiny_llama import save_llama
from tools import reference

VOCAB_SIZE = 320  # of the tokenizer
# What differs from the published scripts: sizes of the model and of the run.
SIZES = {
    "--num-layers": 2,
    "--hidden-size": 32,
    "--ffn-hidden-size": 48,
    "--num-attention-heads": 4,
    "--num-query-groups": 2,
    "--kv-channels": 8,
    "--seq-length": 16,
    "--max-position-embeddings": 32,
    "--vocab-size": VOCAB_SIZE,
    "--global-batch-size": 4,
    "--train-samples": 8,
    "--lr-decay-samples": 8,
    "--lr-warmup-samples": 4,
    "--eval-iters": 1,
    "--profile-step-start": 1,
    "--profile-step-end": 2,
}
MOCK, REAL, LLAMA_3 = 0, 1, 7  # of the list


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base model, tokenizer and indexed data, of the shape that the scripts claim but for its sizes."""
    folder = tmp_path_factory.mktemp("scripts")
    base = save_llama(
        folder / "base",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        rope_theta=1e6,
        attention_bias=False,
        mlp_bias=False,
    )
    builder = IndexedDatasetBuilder(f"{folder / 'data'}.bin", dtype=np.uint16)
    draw = np.random.default_rng(0)
    for _ in range(100):
        builder.add_document(torch.from_numpy(draw.integers(VOCAB_SIZE, size=40)), [40])
    builder.finalize(f"{folder / 'data'}.idx")
    return {"base": base, "tokenizer": save_tokenizer(folder / "tokenizer"), "data": folder / "data"}


def command(number: int, files: dict[str, Path], run: Path, *more: str, refused: bool = False) -> list[str]:
    """A script's flags with our sizes and paths, and the base model; without those that are refused."""
    paths = {
        "--data-path": files["data"],
        "--tokenizer-model": files["tokenizer"],
        "--data-cache-path": run / "cache",
        "--save": run,
        "--load": run,
        "--tensorboard-dir": run / "tensorboard",
    }
    script = reference.scripts()[number]
    flags = script["served"] + script["accepted"] + (script["refused"] if refused else [])
    words = ["--pretrained-checkpoint", str(files["base"])]
    for name, *values in (flag.split() for flag in flags):
        changed = {**SIZES, **paths}.get(name)
        words += [name, *(values if changed is None else [str(changed)])]
    return [*words, *more]


@pytest.fixture
def train() -> Iterator[object]:
    def trained(words: list[str]) -> RunConfig:
        config = read_config(words, {})
        try:
            finetune(config)
        finally:
            stop_model_parallel()
        return config

    with one_rank(with_groups=False):
        yield trained


@pytest.mark.parametrize("number", [MOCK, pytest.param(REAL, marks=pytest.mark.slow)], ids=["generated data", "data"])
def test_the_training_script_trains_two_steps(number, files, tmp_path, train, monkeypatch, caplog):
    emptied, collected = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(watchers.gc, "collect", lambda generation=2: collected.append(gc.isenabled()))
    config = train(command(number, files, tmp_path))
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(3 < record["loss"] < 9 and record["grad_norm"] > 0 for record in records)
    assert [record["learning_rate"] for record in records] == pytest.approx([0.0, 1.5e-4])
    assert config.model.bf16 and config.training.grad_reduce_in_bf16
    # Collected at the start, before and after validation; and once more for the groups, as they are destroyed.
    assert len(emptied) == 2 and collected == [*[False] * 3, True]
    assert gc.isenabled() and "--profile marks steps for Nsight Systems" in caplog.text
    assert list((tmp_path / "tensorboard").iterdir()) and (tmp_path / "iter_0000002").is_dir()


def test_its_fp8_and_context_parallelism_are_refused(files, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        read_config(command(MOCK, files, tmp_path, "--context-parallel-size", "2", refused=True), {})
    told = caught.value.problems
    assert len(told) == 5 and all(": " not in one or "invalid choice: '2'" in one for one in told)
    assert sum("--bf16 trains in bfloat16" in one for one in told) == 4
    assert sum("--sequence-parallel with --tensor-model-parallel-size" in one for one in told) == 1
    assert not any(tmp_path.iterdir())


def test_flags_of_llama_3_load_a_run_without_its_optimizer(files, tmp_path, train, monkeypatch):
    opened = []
    set_steps, restore = load.set_steps, load.restore_random
    monkeypatch.setattr(load, "set_steps", lambda *given: opened.append("optimizer") or set_steps(*given))
    monkeypatch.setattr(load, "restore_random", lambda *given: opened.append("random") or restore(*given))
    data = ["--train-iters", "4", "--mock-data", "--log-interval", "1", "--save", str(tmp_path), "--eval-iters", "0"]
    data += ["--rotary-base", "1e6", "--micro-batch-size", "2", "--num-workers", "0"]
    whole = [*command(LLAMA_3, files, tmp_path), *data]
    with pytest.raises(ConfigurationError, match="--transformer-impl transformer_engine needs a GPU.* auto or local"):
        train(whole)
    here = [*whole, "--transformer-impl", "local"]
    with pytest.raises(ConfigurationError, match="holds no checkpoint, and --exit-on-missing-checkpoint ends the run"):
        train(here)
    train([word for word in here if word != "--exit-on-missing-checkpoint"] + ["--train-iters", "2"])
    train(here)
    assert [record["iteration"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]
    assert opened == []
    whole = [word for word in here if not word.startswith("--no-load")]
    train([*whole, "--train-iters", "5", "--override-opt-param-scheduler"])
    assert opened == ["optimizer", "random"]


@pytest.mark.slow
def test_profiled_steps_are_a_trace_of_torchs_profiler(files, tmp_path, train):
    traces = tmp_path / "traces"
    more = ["--use-pytorch-profiler", "--tensorboard-dir", str(traces), "--eval-iters", "0", "--num-workers", "0"]
    train(command(MOCK, files, tmp_path, *more))
    (trace,) = traces.glob("rank0.*.json")
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::scaled_dot_product_attention") == 4 * 2  # of one step: microbatches x layers
