"""Mistral, Qwen2 and Qwen3 against transformers and HF PEFT: logits, answers, weights there and back, training."""

from itertools import product
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_peft.certify.comparison import compare_curves
from megatron_peft.conversion.convert import megatron_to_hf, merge
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.verify import verify
from megatron_peft.models.families import read_shape
from tests.checkpoint.runs import Files
from tests.conversion.megatron_folders import tensors_of
from tests.models import family_runs as runs
from tests.models.test_bloom import GENERATING, asked_layouts, check_answers, check_logits, quickly
from tests.ranks import run_ranks
from tests.tiny_families import MODELS, random_model
from tests.tiny_llama import save_pairs

ADAPTED = [name for name, method in runs.SAVED.items() if method == "lora"]


@pytest.fixture(scope="module")
def models():
    return {name: random_model(name) for name in MODELS}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> Files:
    work = tmp_path_factory.mktemp("families")
    for name, model in models.items():
        model.save_pretrained(work / "bases" / name)
    return Files(str(work / "bases"), str(save_pairs(work / "pairs.jsonl")), str(work / "runs"))


@pytest.fixture(scope="module")
def outcomes(files, request) -> runs.Outcomes:
    return run_ranks(2, runs.run_families, (files, asked_layouts(request)))[-1]


@pytest.fixture(scope="module")
def alone(files):
    """The curves of one process."""
    return run_ranks(1, runs.run_methods, (files, [(family, method, "") for family, method, _ in runs.QUICK]))[0]


@pytest.mark.parametrize("layout", quickly(runs.LOGIT_LAYOUTS, runs.QUICK_LOGIT_LAYOUTS))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(outcomes, models, name, layout):
    check_logits(outcomes.answers[name, layout][0], models[name])


@pytest.mark.parametrize("layout", quickly(GENERATING, runs.QUICK_LOGIT_LAYOUTS))
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_transformers(outcomes, models, name, layout):
    check_answers(outcomes.answers[name, layout][1], models[name])


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_converted_there_and_back_bit_for_bit(files, tmp_path, name):
    runs.check_round_trip(Path(files.bases, name), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_made_config_gives_the_shape_back_and_transformers_reads_it_alike(files, tmp_path, caplog, name):
    shape = read_shape(Path(files.bases, name))
    assert (shape.architecture, shape.tied_embeddings) == (name.split()[0], "tied" in name)
    ours, theirs = runs.made_config(Path(files.bases, name), tmp_path, caplog, "sliding_window", "max_window_layers")
    assert ours["sliding_window"] == theirs["sliding_window"] or not theirs["use_sliding_window"]


@pytest.mark.parametrize("case", runs.QUICK, ids=" ".join)
def test_training_on_two_ranks_equals_one_process(outcomes, alone, case):
    family, method, layout = case
    one, two = alone[f"{family} {method} "], outcomes.curves[f"{family} {method} {layout}"]
    assert all(line.passed for line in compare_curves(two, one)) and one.losses[-1] < one.losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", runs.FAMILIES)
def test_every_method_on_two_ranks_equals_one_process(files, family):
    one = run_ranks(1, runs.run_methods, (files, [(family, method, "") for method in runs.SIX]))[0]
    cases = list(product([family], runs.SIX, runs.LAYOUTS))
    two = run_ranks(2, runs.run_methods, (files, cases))[-1]
    assert len(two) == len(cases) == 12
    for case in cases:
        lines = compare_curves(two[" ".join(case)], one[f"{family} {case[1]} "])
        assert all(line.passed for line in lines), (case, lines)


@pytest.mark.parametrize("name", ADAPTED)
def test_hf_peft_opens_an_exported_adapter_and_computes_the_same(files, outcomes, tmp_path, name):
    run, base = Path(files.work, name), Path(files.bases, name)
    adapter = export_adapter(run, tmp_path / "adapter")
    assert verify(adapter, run).logits.absolute < 1e-4
    assert verify(adapter, base).logits.absolute > 0.1
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    config = opened.peft_config["default"]
    assert config.r == 4 and config.target_modules == {f"{part}_proj" for part in "q k v o gate up down".split()}


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.slow
def test_a_merged_model_is_what_was_trained(files, outcomes, tmp_path, name):
    merge(Path(files.work, name), tmp_path / "merged", progress=False)
    assert verify(tmp_path / "merged", Path(files.work, name)).logits.absolute < 1e-4


def test_norms_of_queries_and_keys_are_trained_and_saved_from_two_ranks(files, outcomes, tmp_path):
    run, base = Path(files.work, "qwen3 tied"), Path(files.bases, "qwen3 tied")
    written = tensors_of(megatron_to_hf(run, tmp_path / "hf", progress=False))
    moved = {name for name, tensor in tensors_of(base).items() if not torch.equal(tensor, written[name])}
    assert {f"model.layers.{n}.self_attn.{part}_norm.weight" for n in range(2) for part in "qk"} <= moved
    assert verify(tmp_path / "hf", run).logits.absolute < 1e-4
