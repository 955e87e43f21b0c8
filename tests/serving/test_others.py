"""Adapters that others wrote: good ones are accepted by what is bound and by numbers, known faults are refused by name.

Run by `make test-engines`, as test_engine.py. HF PEFT is the reference for numbers.
"""

import re
from pathlib import Path

import pytest
import torch

from megatron_peft.commands import convert
from megatron_peft.conversion.verify import random_tokens
from megatron_peft.serving import served
from megatron_peft.serving.engine import Engine
from tests.serving import others, runs
from tests.serving.test_engine import PYTHON, TOLERANCE
from tests.tiny_llama import VOCAB_SIZE, save_llama

pytestmark = pytest.mark.engines
LENGTHS = [1, 5, 17, 64]
FAULTS = {
    # vllm-project/vllm 34186: names of another class of the same model.
    "the multimodal class's names": "bound to nothing, so the base is served in their place: model.language_model",
    "a pipeline stage left out": "missing, though target_modules names them: model.layers.1.* and 4 more$",
    # vllm-project/vllm 9280; Unsloth does so when tokens were added.
    "an output layer saved whole": "vLLM does not read it: .*modules_to_save: .*lm_head",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "base", **runs.SIZES)


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("others")
    return {name: write(base, folder / name) for name, (write, _) in others.WRITERS.items()}


@pytest.fixture(scope="module")
def bindings(base, good, tmp_path_factory) -> dict[str, served.Binding]:
    """What one process says of all folders, good and faulty."""
    folder = tmp_path_factory.mktemp("faulty")

    def nested(tensors: runs.Tensors) -> runs.Tensors:
        return {name.replace("model.layers", "model.language_model.layers"): x for name, x in tensors.items()}

    def first_layer(tensors: runs.Tensors) -> runs.Tensors:
        return {name: x for name, x in tensors.items() if "layers.1." not in name}

    whole = {"modules_to_save": ["lm_head", "embed_tokens"], "layers_to_transform": None}
    changed = [runs.spoilt(good["Unsloth's pattern"], folder / "nested", nested)]
    changed += [runs.spoilt(good["Megatron-Bridge"], folder / "half", first_layer)]
    folders = good | dict(zip(FAULTS, [*changed, others.unsloth(base, folder / "whole", **whole)], strict=True))
    return dict(zip(folders, served.bindings_of(PYTHON, base, [*folders.values()]), strict=True))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:  # [2, 64]
    return random_tokens(VOCAB_SIZE, max(LENGTHS))


@pytest.fixture(scope="module")
def log_probs(base, good, tokens) -> dict[str, torch.Tensor]:
    """What one engine computes without an adapter and with each: [2 * LENGTHS, vocabulary]."""
    prompts = [row[:length].tolist() for row in tokens for length in LENGTHS]
    settings = {"dtype": "float32", "max_lora_rank": 16, "max_model_len": max(LENGTHS) + 1}
    with Engine(PYTHON) as engine:
        engine.open(base, [*good.values()], settings)
        found = engine.ask("log_probs", prompts=prompts)["log_probs"]
    return dict(zip(["base", *good], (torch.tensor(rows)[:, :VOCAB_SIZE] for rows in found), strict=True))


@pytest.mark.parametrize("writer", others.WRITERS)
def test_a_good_folder_is_bound_whole(bindings, writer):
    assert bindings[writer].problems == () and bindings[writer].num_bound == others.WRITERS[writer][1]


@pytest.mark.parametrize("writer", others.WRITERS)
def test_a_good_folder_is_served_as_hf_peft_computes_it(base, good, tokens, log_probs, writer):
    expected = others.log_probs_of_hf_peft(base, good[writer], tokens)[:, [length - 1 for length in LENGTHS]]
    assert (log_probs[writer] - expected.flatten(0, 1)).abs().max() <= TOLERANCE
    assert (log_probs[writer] - log_probs["base"]).abs().max() > served.MOVES


@pytest.mark.parametrize("fault", FAULTS)
def test_a_known_fault_is_refused_by_name(bindings, fault):
    assert re.search(FAULTS[fault], bindings[fault].problems[0]), bindings[fault]


def test_a_folder_that_names_no_base_is_served_on_the_given_one(base, good, capsys):
    words = ["verify", "--input", str(good["Megatron-SWIFT"]), "--pretrained-checkpoint", str(base)]
    code = convert.main([*words, "--engine", "vllm", "--engine-python", str(PYTHON)])
    told = capsys.readouterr().out
    assert code == 0 and told.rstrip().endswith("served as it was trained"), told
