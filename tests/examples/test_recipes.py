"""The recipes' flags are flags of this version, and each fits the model that it names, by its own configuration."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_peft.adapters import attach
from megatron_peft.arguments import parse_arguments
from megatron_peft.config import RunConfig
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.rules import expected_tensors
from megatron_peft.models.gpt import build_model_chunks, num_virtual_stages
from megatron_peft.models.huggingface import read_shape
from megatron_peft.runtime import cpu
from megatron_peft.runtime.launch import start_model_parallel, stop

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"


def llama(**sizes: Any) -> dict[str, Any]:
    common = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    return {**common, "tie_word_embeddings": False, **sizes}


ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3 = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": ROPE,
    "attention_bias": False,
    "mlp_bias": False,
}
# What decides the shape in each published config.json, and the number of parameters that the model is published with.
MODELS = {
    "bloomz-7b1": (
        {
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "n_layer": 30,
            "n_head": 32,
            "hidden_size": 4096,
            "vocab_size": 250880,
            "seq_length": 2048,
            "layer_norm_epsilon": 1e-5,
        },
        7_069_016_064,
    ),
    "laptop-cpu": (
        llama(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000,
            tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "llama-3.1-405b": (
        llama(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **LLAMA_3),
        405_853_388_800,
    ),
    "llama-3.1-8b": (
        llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA_3),
        8_030_261_248,
    ),
    "llama-3.3-70b": (
        llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA_3),
        70_553_706_496,
    ),
    "wizard-vicuna-30b": (
        llama(
            hidden_size=6656,
            intermediate_size=17920,
            num_hidden_layers=60,
            num_attention_heads=52,
            vocab_size=32000,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
        ),
        32_528_943_616,
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, int]:
    """(name of the recipe, folder of its model's configuration, the model's number of parameters)"""
    config, num_parameters = MODELS[request.param]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return request.param, tmp_path, num_parameters


def parse(name: str, folder: Path) -> RunConfig:
    """The recipe as examples/finetune.sbatch passes it on, in a world of the size that it names, for its model.

    Ends the process where a flag is unknown, a size does not divide, or a sample is longer than the model's positions.
    """
    text = (FOLDER / f"{name}.args").read_text()
    ranks = re.search(r"^# ranks: (\d+)$", text, re.MULTILINE)
    assert ranks, "a recipe says how many ranks it is for"
    paths = ["--pretrained-checkpoint", str(folder), "--train-data-path", "train.jsonl", "--save", "runs/x"]
    environment = {"WORLD_SIZE": ranks[1], "RANK": "0"}
    return parse_arguments([*paths, *shlex.split(text, comments=True)], environment, read_shape)


@contextmanager
def last_rank(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The last rank's part of the model at the recipe's layout, adapted, without weights; the world is made up."""
    assert config.model.pretrained_checkpoint is not None
    shape, world_size = read_shape(config.model.pretrained_checkpoint), config.parallel.world_size
    monkeypatch.setattr(attach, "all_names", sorted)  # of this stage: the names' ends are those of all
    cpu.install()
    dist.init_process_group("fake", rank=world_size - 1, world_size=world_size, store=FakeStore())
    try:
        start_model_parallel(config.parallel, 1, num_virtual_stages(shape, config.parallel))
        with monkeypatch.context() as building, torch.device("meta"):
            building.setattr(torch.cuda, "current_device", lambda: "meta")
            built = build_model_chunks(shape, config.model, config.parallel)
        attach.attach_adapters(built, config.peft, config.training.seed)
        yield built
    finally:
        stop()


def test_every_recipe_is_checked() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == MODELS.keys()


def test_configuration_is_that_of_the_model_by_its_number_of_parameters(model: tuple[str, Path, int]) -> None:
    _, folder, num_parameters = model
    tensors = expected_tensors(rules_for(read_shape(folder)))
    assert sum(map(math.prod, tensors.values())) == num_parameters


def test_recipe_fits_its_model_and_its_row_of_the_readme(model: tuple[str, Path, int]) -> None:
    name, folder, _ = model
    config = parse(name, folder)
    parallel = config.parallel
    tp, pp, dp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
    )
    row = next(line for line in (FOLDER.parent / "README.md").read_text().splitlines() if f"`{name}.args`" in line)
    assert row.split("|")[3].strip() == f"{tp} x {pp} x {dp}"
    assert config.training.global_batch_size % (config.training.micro_batch_size * dp) == 0


def test_recipe_adapts_the_last_stage_of_its_model(
    model: tuple[str, Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its layers: target modules match, and every layer divides over the tensor-parallel ranks."""
    name, folder, _ = model
    config, shape = parse(name, folder), read_shape(folder)
    with last_rank(config, monkeypatch) as (chunk,):
        targets = list(attach.linear_layers(chunk))
    stages = config.parallel.pipeline_model_parallel_size
    here = config.parallel.decoder_last_pipeline_num_layers or shape.num_layers // stages
    assert len(targets) == 4 * here and all(target.module.adapter is not None for target in targets)
    assert targets[-1].name == f"decoder.layers.{shape.num_layers - 1}.mlp.linear_fc2"
    tp = config.parallel.tensor_model_parallel_size
    assert targets[-1].module.weight.shape == (shape.hidden_size, shape.ffn_hidden_size // tp)
