"""Bloom against transformers at every layout, and its answers with a key-value cache against the whole forward."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_peft.evaluation.generation import GenerationSettings
from tests.models import bloom_runs
from tests.models.bloom_runs import Job
from tests.ranks import run_ranks
from tests.tiny_bloom import random_bloom
from tests.tiny_llama import VOCAB_SIZE

NUM_NEW = 10
MODELS = {"12 heads": {"n_head": 12, "hidden_size": 96}, "6 heads": {}, "untied": {"tie_word_embeddings": False}}
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 interleaved": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
}
TOKENS = list(torch.randint(VOCAB_SIZE, (2, 2, 150), generator=torch.Generator().manual_seed(0)))
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(VOCAB_SIZE) for _ in range(length)] for length in (5, 1, 19, 140)]
GENERATING = ("TP1", "TP2", "TP2+SP")  # generation runs on one pipeline stage


@pytest.fixture(scope="module")
def models():
    return {name: random_bloom(**changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def outcomes(models, tmp_path_factory):
    """(logits, answers) of the rank that holds the last stage, by model and layout; one world of two ranks."""
    keys, jobs = [], []
    for name, model in models.items():
        base = str(tmp_path_factory.mktemp("bloom"))
        model.save_pretrained(base)
        for layout, parallel in LAYOUTS.items():
            keys.append((name, layout))
            asked = PROMPTS if layout in GENERATING else []
            jobs.append(Job(base, parallel, TOKENS, asked, GenerationSettings(frozenset(), NUM_NEW)))
    return dict(zip(keys, run_ranks(2, bloom_runs.run_jobs, jobs)[-1], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(outcomes, models, name, layout):
    logits, _ = outcomes[name, layout]
    assert len(logits) == len(TOKENS)
    for found, batch in zip(logits, TOKENS, strict=True):
        with torch.no_grad():
            expected = models[name](batch).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", GENERATING)
@pytest.mark.parametrize("name", MODELS)
def test_answers_with_a_cache_are_those_of_the_whole_forward(outcomes, models, name, layout):
    """Prompts of unequal length in one batch, so some are padded; transformers sees each alone and whole."""
    _, answers = outcomes[name, layout]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == NUM_NEW
        with torch.no_grad():
            logits = models[name](torch.tensor([prompt + answer])).logits[0]
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
