"""The recipes' flags are flags of this version, and each fits the model that it names, by its own configuration."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_peft.adapters import attach
from megatron_peft.cli.parser import read_config
from megatron_peft.config import RunConfig
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.rules import expected_tensors
from megatron_peft.plan.cluster import read_cluster
from megatron_peft.runtime import cpu
from megatron_peft.runtime.launch import start_model_parallel, stop
from tests.time_limits import seconds
from tools import one_node, recipe_plans

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
CONFIGURATIONS = FOLDER.with_name("models")
# The number of parameters that each model is published with; of its config.json, `models` has what decides the shape.
MODELS = {
    "bloomz-7b1": 7_069_016_064,
    "laptop-cpu": 134_515_008,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-405b-one-node": 405_853_388_800,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "wizard-vicuna-30b": 32_528_943_616,
}


def parse(name: str) -> RunConfig:
    """The recipe as examples/finetune.sbatch passes it on, in a world of the size that it names, for its model.

    Ends the process where a flag is unknown, a size does not divide, or a sample is longer than the model's positions.
    """
    file = FOLDER / f"{name}.yaml"
    ranks = re.search(r"^(?:# ranks|nproc-per-node): (\d+)$", file.read_text(), re.MULTILINE)
    assert ranks, "a recipe says how many ranks it is for"
    model, data = f"--pretrained-checkpoint={CONFIGURATIONS / name}", "--train-data-path=train.jsonl"
    words = [f"--config={file}", model, data, "--save=runs/x"]
    return read_config(words, {"WORLD_SIZE": ranks[1], "RANK": "0"}, read_shape)


@contextmanager
def last_rank(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The last rank's part of the model at the recipe's layout, adapted, without weights; the world is made up."""
    assert config.model.pretrained_checkpoint is not None
    shape, world_size = read_shape(config.model.pretrained_checkpoint), config.parallel.world_size
    monkeypatch.setattr(attach, "all_names", sorted)  # of this stage: the names' ends are those of all
    cpu.install()
    dist.init_process_group("fake", rank=world_size - 1, world_size=world_size, store=FakeStore())
    try:
        start_model_parallel(config.parallel, 1, config.parallel.num_virtual_stages(shape.num_layers))
        with monkeypatch.context() as building, torch.device("meta"):
            building.setattr(torch.cuda, "current_device", lambda: "meta")
            built = build_model_chunks(shape, config.model, config.parallel)
        attach.attach_adapters(built, config.peft, config.training.seed)
        yield built
    finally:
        stop()


def test_every_recipe_is_checked() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == MODELS.keys()


@pytest.mark.parametrize(("name", "num_parameters"), MODELS.items())
def test_recipe_fits_its_model_and_its_row_of_the_readme(name, num_parameters):
    """The model's configuration is known by its number of parameters; the plan in the recipe's head is of its flags."""
    tensors = expected_tensors(rules_for(read_shape(CONFIGURATIONS / name)))
    assert sum(map(math.prod, tensors.values())) == num_parameters
    config = parse(name)
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = config.parallel.data_parallel_size
    row = next(line for line in (FOLDER.parent / "README.md").read_text().splitlines() if f"`{name}.yaml`" in line)
    assert row.split("|")[3].strip() == f"{tp} x {pp} x {dp}"
    assert config.training.global_batch_size % (config.training.micro_batch_size * dp) == 0
    assert pp == 1 or config.data.pad_to_seq_length, "stages exchange messages of a known size"
    found = recipe_plans.stated(name)
    assert found is not None and found[1] == recipe_plans.digest(name), "make recipe-plans writes it anew"
    if "0.78" in (FOLDER / f"{name}.yaml").read_text():
        law = 5e-4 * (2000 / read_shape(CONFIGURATIONS / name).hidden_size) ** 0.78
        assert config.optimizer.lr == pytest.approx(law, rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_recipe_adapts_the_last_stage_of_its_model(name, monkeypatch):
    """Each of its layers: target modules match, and every layer divides over the tensor-parallel ranks."""
    config, shape = parse(name), read_shape(CONFIGURATIONS / name)
    with last_rank(config, monkeypatch) as chunks:
        targets = [target for chunk in chunks for target in attach.linear_layers(chunk)]
        stages = layers_by_stage(chunks[0].config)
    assert sorted(layer for stage in stages for layer in stage) == list(range(shape.num_layers))
    names = [f"decoder.layers.{layer}.mlp.linear_fc2" for layer in stages[-1]]
    assert [target.name for target in targets if target.name.endswith("fc2")] == names
    assert len(targets) == 4 * len(names) and all(target.module.adapter is not None for target in targets)
    tp = config.parallel.tensor_model_parallel_size
    assert targets[-1].module.weight.shape == (shape.hidden_size, shape.ffn_hidden_size // tp)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"laptop-cpu"}))
def test_weeks_of_a_recipe_fill_no_file_system_and_a_lost_node_costs_less_than_an_hour(name):
    config, (figures, _) = parse(name), recipe_plans.stated(name) or ("", "")
    checkpoint, logging = config.checkpoint, config.logging
    assert checkpoint.keep_last_checkpoints == 3 and logging.log_interval >= 10
    (step,) = re.findall(r"([\d.]+) s a step", figures)
    assert 1200 <= float(step) * (checkpoint.save_interval or 0) <= 3600


@pytest.mark.slow
@pytest.mark.timeout(seconds(1800))
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.rehearsal] * name.endswith("one-node")) for name in MODELS]
)
def test_a_recipe_that_is_planned_again_has_the_figures_in_its_head(name):
    found = recipe_plans.stated(name)
    assert found is not None and found[0] == recipe_plans.figures(name, read_cluster(recipe_plans.CLUSTER))


@pytest.mark.slow
@pytest.mark.rehearsal
@pytest.mark.timeout(seconds(1800))
def test_tables_of_a_quantized_base_on_few_gpus_are_what_the_plan_says():
    cluster, records = read_cluster(recipe_plans.CLUSTER), FOLDER.parents[1] / "docs" / "results" / "planning"
    assert one_node.smaller_models(cluster) == read_json_object(records / "one_node_smaller.json")
    assert one_node.by_method(cluster) == read_json_object(records / "one_node.json")


def layers_by_stage(config: TransformerConfig) -> list[list[int]]:
    """Layers that each pipeline rank holds, over all its chunks."""
    chunks = config.virtual_pipeline_model_parallel_size
    return [
        [
            get_transformer_layer_offset(config, chunk, rank) + layer
            for chunk in (range(chunks) if chunks else [None])
            for layer in range(get_num_layers_to_build(config, chunk, rank))
        ]
        for rank in range(config.pipeline_model_parallel_size)
    ]


def test_the_stages_of_the_largest_model_are_even_and_nothing_is_recomputed(monkeypatch):
    config = parse("llama-3.1-405b")
    with last_rank(config, monkeypatch) as chunks:
        held = [len(stage) for stage in layers_by_stage(chunks[0].config)]
    assert held == [7, *[8] * 14, 7] and len(chunks) == 8
    assert not config.model.transformer.get("recompute_granularity")
