"""No rank of any method would wait for ever in a recipe's layout. `test_recipes.py` plans the recipes as they are."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.cli.parser import read_config
from megatron_peft.config import RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.rehearsal import order_problem, rehearse_run

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
MODELS = Path(__file__).parents[2] / "examples" / "models"
WORLDS = {"bloomz-7b1": 16, "llama-3.1-8b": 16, "llama-3.3-70b": 16, "wizard-vicuna-30b": 16, "llama-3.1-405b": 128}
METHODS: dict[str, list[str]] = {
    "full": [],
    "lora-ga": [],
    "boft": ["--boft-block-size", "8", "--boft-factors", "2"],
    "urnn": ["--urnn-block-size", "32"],
    "hybrid": ["--boft-block-size", "8", "--boft-factors", "2"],
}


def recipe(name: str, words: list[str], worlds: Mapping[str, int] = WORLDS) -> tuple[RunConfig, ModelShape]:
    base = ["--config", str(RECIPES / f"{name}.yaml"), "--pretrained-checkpoint", str(MODELS / name)]
    environ = {"WORLD_SIZE": str(worlds[name])}
    config = read_config([*base, *words], environ, read_shape, saved=lambda values: {"save": "never written"})
    return config, read_shape(str(MODELS / name))


# `make test-all` takes another method for each recipe; `make test-rehearsals` takes all.
SAMPLE = [*zip(WORLDS, METHODS, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*case, marks=[] if case in SAMPLE else [pytest.mark.rehearsal]) for case in product(WORLDS, METHODS)],
)
def test_no_rank_waits_for_ever_with_any_method(name, method):
    """Few layers and microbatches, in the recipe's own layout: a stage has at least one layer."""
    config, shape = recipe(name, ["--peft-method", method, *METHODS[method]])
    stages = config.parallel.pipeline_model_parallel_size
    shape = replace(shape, num_layers=fewest_layers(config))
    few = config.training.micro_batch_size * config.parallel.data_parallel_size * 2 * stages
    training: Any = replace(config.training, global_batch_size=few)
    run = rehearse_run(replace(config, training=training), shape, peaks=False)
    assert order_problem(run) is None


def fewest_layers(config: RunConfig) -> int:
    """Two chunks a stage in an interleaved schedule, else one layer; the embedding and the loss may count as one."""
    parallel = config.parallel
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    divided = parallel.pipeline_model_parallel_size * (2 * chunk if chunk else 1)
    return divided - parallel.account_for_embedding_in_pipeline_split - parallel.account_for_loss_in_pipeline_split
