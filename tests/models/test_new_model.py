"""A model family costs one file and one line: the one that docs/new-model.md shows computes what transformers does."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

from megatron_peft.certify.comparison import compare_curves
from megatron_peft.certify.runs import START, RankReport
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.hf_files import write_config
from megatron_peft.models import families
from megatron_peft.models.families import FAMILIES, read_shape
from tests.models.family_runs import check_round_trip, made_config, run_all
from tests.models.test_bloom import GENERATING, LAYOUTS, QUICK, asked_layouts, check_answers, check_logits, quickly
from tests.ranks import run_ranks
from tests.tiny_families import SIZES
from tests.tiny_llama import draw_parameters, save_pairs
from tests.training.layout_runs import Job, run_each, run_jobs

PAGE = Path(__file__).parents[2] / "docs" / "new-model.md"
(SOURCE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
LINES = r'^    "(\w+)": "([\w.]+)",$'
(LINE,) = re.findall(LINES, PAGE.read_text(), re.MULTILINE)

MODELS = {
    "untied": {"tie_word_embeddings": False},
    "tied, heads of 20, no biases": {"head_dim": 20, "use_bias": False, "sliding_window": 160},
}
TARGETS = {"peft": {"target_modules": ("q_proj", "c_proj")}}
BUILT_IN = ("llama", "bloom", "mistral", "qwen2", "qwen3")
TP2 = {"parallel": {"tensor_model_parallel_size": 2}}


def add_the_family() -> None:
    """As the page says."""
    module = sys.modules[LINE[1]] = ModuleType(LINE[1])
    exec(compile(SOURCE, str(PAGE), "exec"), module.__dict__)
    FAMILIES.update([LINE])


def run_with_the_new_family(asked: tuple[dict[str, str], list[str], Job]):
    """On two ranks: logits and answers by model and layout, and the report of a training run."""
    bases, layouts, job = asked
    add_the_family()
    return run_all(bases, layouts), run_each([job])[job.name]


def train_with_the_new_family(job: Job) -> RankReport:
    add_the_family()
    return run_jobs([job])[job.name]


@pytest.fixture(scope="module", autouse=True)
def family():
    add_the_family()
    yield
    del sys.modules[LINE[1]], FAMILIES[LINE[0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What transformers writes: biases and norms too are random."""
    found = {}
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        model = Starcoder2ForCausalLM(Starcoder2Config(**{**SIZES, "num_hidden_layers": 4, **changes}))
        draw_parameters(model, std=0.08)
        found[name] = tmp_path_factory.mktemp("starcoder2")
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def models(folders):
    return {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


@pytest.fixture(scope="module")
def outcomes(folders, request, tmp_path_factory):
    """Logits and answers by model and layout, and a short run at TP1 and at TP2."""
    bases = {name: str(folder) for name, folder in folders.items()}
    data = str(save_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"))
    alone, split = (Job("run", bases["untied"], data, **TARGETS, **layout, num_steps=8) for layout in ({}, TP2))
    found, curve = run_ranks(2, run_with_the_new_family, (bases, asked_layouts(request), split))[-1]
    return found, run_ranks(1, train_with_the_new_family, alone)[0], curve


@pytest.mark.parametrize("layout", quickly(LAYOUTS, QUICK))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(outcomes, models, name, layout):
    check_logits(outcomes[0][name, layout][0], models[name])


@pytest.mark.parametrize("layout", quickly(GENERATING, QUICK))
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers(outcomes, models, name, layout):
    check_answers(outcomes[0][name, layout][1], models[name])


def test_hugging_faces_names_are_targets_and_training_is_alike_at_tp2(outcomes):
    _, alone, split = outcomes
    assert alone.curve.losses[-1] < alone.curve.losses[0]
    assert all(line.passed for line in compare_curves(split.curve, alone.curve))
    layers = {
        f"decoder.layers.{n}.{name}" for n in range(4) for name in ("self_attention.linear_qkv", "mlp.linear_fc2")
    }
    assert {key.partition(".adapter.")[0] for key, _ in alone.tensors[START]} == layers


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_converted_there_and_back_bit_for_bit(folders, tmp_path, name):
    check_round_trip(folders[name], tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_made_config_gives_the_shape_back_and_transformers_reads_it_alike(folders, models, tmp_path, caplog, name):
    ours, _ = made_config(folders[name], tmp_path, caplog)
    assert ours["head_dim"] == models[name].model.layers[0].self_attn.head_dim


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"architectures": ["Starcoder2ForTokenClassification"]}, "Supported: .*, Starcoder2ForCausalLM"),
    ],
)
def test_what_is_refused(folders, tmp_path, changes, told):
    config = json.loads((folders["untied"] / "config.json").read_text()) | changes
    write_config(tmp_path, config)
    with pytest.raises(ConfigurationError, match=told):
        read_shape(tmp_path)


def test_it_takes_one_line_and_no_other_file_names_a_family():
    package = Path(families.__file__).parents[1]
    registered = re.findall(LINES, Path(families.__file__).read_text(), re.MULTILINE)
    assert {(name, f"megatron_peft.models.{name}") for name in BUILT_IN} <= {*registered}
    assert all(module == f"megatron_peft.models.{name}" for name, module in registered)
    names = {name for name, _ in registered}
    own = {package / "models" / f"{name}.py" for name in names} | {Path(families.__file__)}
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path not in own
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {
        "conversion/pretrained.py",  # Megatron-LM's arguments without a config.json name no family
        "data/tokenizers.py",  # types for which AutoTokenizer has no class of its own
        "certify/certify.py",  # Bloom's hidden size is that of its heads
    }
