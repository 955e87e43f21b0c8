"""The recipes' flags are flags of this version, and their sizes fit the models that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_peft.arguments import parse_arguments
from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"


def shape(num_layers: int, heads: int, groups: int, hidden: int, ffn: int, vocabulary: int) -> ModelShape:
    """What a layout must divide, from the model's published configuration."""
    return ModelShape(
        architecture="llama",
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
    )


MODELS = {
    "bloomz-7b1": shape(30, 32, 32, 4096, 16384, 250880),
    "laptop-cpu": shape(30, 9, 3, 576, 1536, 49152),
    "llama-3.1-405b": shape(126, 128, 8, 16384, 53248, 128256),
    "llama-3.1-8b": shape(32, 32, 8, 4096, 14336, 128256),
    "llama-3.3-70b": shape(80, 64, 8, 8192, 28672, 128256),
    "wizard-vicuna-30b": shape(60, 52, 52, 6656, 17920, 32000),
}


def parse(name: str) -> RunConfig:
    """The recipe as examples/finetune.sbatch passes it on, in a world of the size that it names, for its model."""
    text = (FOLDER / f"{name}.args").read_text()
    ranks = re.search(r"^# ranks: (\d+)$", text, re.MULTILINE)
    assert ranks, "a recipe says how many ranks it is for"
    paths = ["--pretrained-checkpoint", "/models/x", "--train-data-path", "train.jsonl", "--save", "runs/x"]
    environment = {"WORLD_SIZE": ranks[1], "RANK": "0"}
    return parse_arguments([*paths, *shlex.split(text, comments=True)], environment, lambda folder: MODELS[name])


def test_every_recipe_is_checked() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_recipe_fits_its_model_and_its_row_of_the_readme(name: str) -> None:
    """Parsing ends the process where a flag is unknown or a size does not divide."""
    parallel = parse(name).parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.data_parallel_size,
    )
    row = next(line for line in (FOLDER.parent / "README.md").read_text().splitlines() if f"`{name}.args`" in line)
    assert row.split("|")[3].strip() == " x ".join(map(str, sizes))
