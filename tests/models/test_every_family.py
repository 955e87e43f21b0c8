"""Every family but Llama against transformers and HF PEFT: logits, answers, weights there and back, training.

The family of docs/new-model.md too: it costs one file and one line.
"""

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_peft.certify.comparison import compare_curves
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.convert import hf_to_megatron, megatron_to_hf, merge
from megatron_peft.conversion.hf_files import write_config
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.verify import verify
from megatron_peft.models import families
from megatron_peft.models.families import FAMILIES, config_of_shape, read_shape
from tests.checkpoint.runs import Files
from tests.conversion.megatron_folders import equal, tensors_of
from tests.models import family_runs as runs
from tests.models.family_runs import GENERATING, LAYOUTS, MODELS, NEW_FAMILY, PROMPTS, TOKENS
from tests.ranks import run_ranks
from tests.tiny_llama import save_pairs

BUILT_IN = ("llama", "bloom", "mistral", "qwen2", "qwen3")
SLOW = pytest.mark.slow


def of_models(layouts: Iterable[str]) -> Iterator[Any]:
    """Of each model; `make test` takes the layouts that do most, and some say less of the same."""
    for name, layout in product(MODELS, layouts):
        is_deep = name.startswith(("bloom", NEW_FAMILY))
        if is_deep or layout != "PP2 interleaved":
            is_quick = layout in ("TP2+SP", "PP2 interleaved" if is_deep else "PP2")
            yield pytest.param(name, layout, marks=[] if is_quick else [SLOW], id=f"{name}-{layout}")


def quickly(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [SLOW]) for name in names]


@pytest.fixture(scope="module", autouse=True)
def new_family() -> Iterator[None]:
    runs.add_the_new_family()
    yield
    del sys.modules[runs.NEW_MODULE], FAMILIES[NEW_FAMILY]


@pytest.fixture(scope="module")
def models():
    return {name: runs.random_model(name) for name in MODELS}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> Files:
    work = tmp_path_factory.mktemp("families")
    for name, model in models.items():
        model.save_pretrained(work / "bases" / name)
    return Files(str(work / "bases"), str(save_pairs(work / "pairs.jsonl")), str(work / "runs"))


@pytest.fixture(scope="module")
def outcomes(files, request) -> runs.Outcomes:
    """What the chosen tests of this file ask for."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    chosen = [spec.params for spec in specs if spec]
    pairs = {(one["name"], one["layout"]): None for one in chosen if "layout" in one}
    saved = {one["adapted"]: "lora" for one in chosen if "adapted" in one} | {"qwen3, tied": "full"}
    return run_ranks(2, runs.run_families, (files, [*pairs], saved))[-1]


@pytest.fixture(scope="module")
def alone(files):
    """Reports of one process."""
    cases = dict.fromkeys((family, method, "") for family, method, _ in runs.QUICK)
    return run_ranks(1, runs.run_methods, (files, [*cases]))[0]


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), of_models(LAYOUTS))
def test_logits_are_those_of_transformers(outcomes, models, name, layout):
    for found, batch in zip(outcomes.answers[name, layout][0], TOKENS, strict=True):
        expected = models[name](batch).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), of_models(GENERATING))
def test_answers_with_a_cache_are_those_of_the_whole_forward(outcomes, models, name, layout):
    """Prompts of unequal length in one batch, so some are padded; transformers sees each alone and whole."""
    for prompt, answer in zip(PROMPTS, outcomes.answers[name, layout][1], strict=True):
        logits = models[name](torch.tensor([prompt + answer])).logits[0]
        assert len(answer) == runs.NUM_NEW and answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", quickly(MODELS, ["mistral, tied", "qwen2", "qwen3, tied", NEW_FAMILY]))
def test_weights_are_converted_there_and_back_bit_for_bit(files, tmp_path, name):
    base = Path(files.bases, name)
    hf_to_megatron(base, tmp_path / "megatron", progress=False)
    assert equal(tensors_of(megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", progress=False)), tensors_of(base))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("bloom")])
def test_a_made_config_gives_the_shape_back_and_transformers_reads_it_alike(files, models, tmp_path, caplog, name):
    base, is_new = Path(files.bases, name), name.startswith(NEW_FAMILY)
    shape = read_shape(base)
    assert (shape.architecture, shape.tied_embeddings) == (name.partition(",")[0], "tied" in name)
    write_config(tmp_path, config_of_shape(shape))
    assert read_shape(tmp_path) == shape
    assert not caplog.records, "a key without a meaning"
    ours, theirs = (AutoConfig.from_pretrained(place).to_dict() for place in (tmp_path, base))
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    window = set() if is_new else {"sliding_window", "max_window_layers"}
    assert changed <= {"_name_or_path", "dtype", "head_dim"} | window
    if is_new:
        assert ours["head_dim"] == models[name].model.layers[0].self_attn.head_dim
    else:
        assert ours["sliding_window"] == theirs["sliding_window"] or not theirs["use_sliding_window"]


@pytest.mark.parametrize("case", runs.QUICK, ids=" ".join)
def test_training_on_two_ranks_equals_one_process(outcomes, alone, case):
    family, method, _ = case
    one, two = alone[f"{family} {method} "], outcomes.reports[" ".join(case)]
    assert all(line.passed for line in compare_curves(two.curve, one.curve))
    assert one.curve.losses[-1] < one.curve.losses[0]
    if family in runs.TARGETS:  # in Hugging Face's names
        layers = product(range(4), ("self_attention.linear_qkv", "mlp.linear_fc2"))
        assert runs.adapted_layers(one) == {f"decoder.layers.{number}.{name}" for number, name in layers}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_method_on_two_ranks_equals_one_process(files, family):
    one = run_ranks(1, runs.run_methods, (files, [(family, method, "") for method in runs.SIX]))[0]
    cases = list(product([family], runs.SIX, ("TP2", "TP2+SP")))
    two = run_ranks(2, runs.run_methods, (files, cases))[-1]
    assert len(two) == len(cases) == 12
    for case in cases:
        lines = compare_curves(two[" ".join(case)].curve, one[f"{family} {case[1]} "].curve)
        assert all(line.passed for line in lines), (case, lines)


@pytest.mark.parametrize("adapted", quickly(["mistral", "qwen2", "qwen3"], ["qwen2"]))
def test_an_exported_adapter_in_hf_peft_and_a_merged_model_compute_what_was_trained(files, outcomes, tmp_path, adapted):
    run, base = Path(files.work, adapted), Path(files.bases, adapted)
    adapter, merged = export_adapter(run, tmp_path / "adapter"), merge(run, tmp_path / "merged", progress=False)
    assert max(verify(model, run).logits.absolute for model in (adapter, merged)) < 1e-4
    assert verify(adapter, base).logits.absolute > 0.1
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    config = opened.peft_config["default"]
    assert config.r == 4 and config.target_modules == {f"{part}_proj" for part in "q k v o gate up down".split()}


def test_norms_of_queries_and_keys_are_trained_and_saved_from_two_ranks(files, outcomes, tmp_path):
    run, base = Path(files.work, "qwen3, tied"), Path(files.bases, "qwen3, tied")
    written = tensors_of(megatron_to_hf(run, tmp_path / "hf", progress=False))
    moved = {name for name, tensor in tensors_of(base).items() if not torch.equal(tensor, written[name])}
    assert {f"model.layers.{n}.self_attn.{part}_norm.weight" for n in range(2) for part in "qk"} <= moved
    assert verify(tmp_path / "hf", run).logits.absolute < 1e-4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"architectures": ["Starcoder2ForTokenClassification"]}, "Supported: .*, Starcoder2ForCausalLM"),
    ],
)
def test_what_the_new_family_refuses(files, tmp_path, changes, told):
    config = json.loads(Path(files.bases, NEW_FAMILY, "config.json").read_text()) | changes
    write_config(tmp_path, config)
    with pytest.raises(ConfigurationError, match=told):
        read_shape(tmp_path)


def test_a_family_takes_one_line_and_no_other_file_names_one():
    package = Path(families.__file__).parents[1]
    registered = re.findall(runs.LINES, Path(families.__file__).read_text(), re.MULTILINE)
    assert {(name, f"megatron_peft.models.{name}") for name in BUILT_IN} <= {*registered}
    assert all(module == f"megatron_peft.models.{name}" for name, module in registered)
    names = {name for name, _ in registered}
    own = {package / "models" / f"{name}.py" for name in names} | {Path(families.__file__)}
    texts = {path: path.read_text() for path in package.rglob("*.py") if path not in own}
    found = {
        str(path.relative_to(package))
        for path, text in texts.items()
        if any(f'"{name}"' in text for name in names)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {
        "conversion/pretrained.py",  # Megatron-LM's arguments without a config.json name no family
        "data/tokenizers.py",  # types for which AutoTokenizer has no class of its own
        "certify/certify.py",  # Bloom's hidden size is that of its heads
        "serving/llama_cpp_script.py",  # llama.cpp's name for a vocabulary of numbers
    }
