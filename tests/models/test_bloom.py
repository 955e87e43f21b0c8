"""Bloom against transformers at every layout, and its answers with a key-value cache against the whole forward."""

import random
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_peft.config import ModelConfig, ParallelConfig
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.models.families import read_shape
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel
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


def quickly(layouts: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """Parameters of a test: `make test` takes the quick ones."""
    return [pytest.param(one, marks=[] if one in quick else [pytest.mark.slow]) for one in layouts]


def asked_layouts(request: pytest.FixtureRequest) -> list[str]:
    """Those of LAYOUTS that chosen tests of the file name."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = {spec.params["layout"] for spec in specs if spec and "layout" in spec.params}
    return [layout for layout in LAYOUTS if layout in asked]


QUICK = ("TP1", "TP2+SP", "PP2 interleaved")  # the others do less of the same


def run_all(
    bases: dict[str, str], layouts: Iterable[str] = LAYOUTS
) -> dict[tuple[str, str], tuple[list[Tensor], list[list[int]]]]:
    """By model and layout: the logits [b, s, vocabulary] of the last pipeline stage, and the answers."""
    start_world()
    return {(name, layout): _run(base, layout) for name, base in bases.items() for layout in layouts}


def _run(base: str, layout: str) -> tuple[list[Tensor], list[list[int]]]:
    shape = read_shape(base)
    parallel = ParallelConfig(**LAYOUTS[layout], world_size=dist.get_world_size())
    start_model_parallel(parallel, 1, parallel.num_virtual_stages(shape.num_layers))
    chunks = build_model_chunks(shape, ModelConfig(base), parallel)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor_model_parallel_size
    load_pretrained(chunks, base, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)
    logits = [x[..., : shape.vocab_size].clone() for x in _logits(chunks)]
    settings = GenerationSettings(frozenset(), NUM_NEW)
    answers = generate(chunks, PROMPTS, settings) if layout in GENERATING else []
    stop_model_parallel()
    return logits, answers


def _logits(chunks) -> list[Tensor]:
    iterators = [iter(TOKENS) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(TOKENS),
        micro_batch_size=TOKENS[0].shape[0],
        seq_length=TOKENS[0].shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )


def _forward(microbatches, model):
    tokens = next(microbatches)
    logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), attention_mask=None)
    return logits, lambda output, non_loss_data: gather_from_tensor_model_parallel_region(output)


@torch.no_grad()
def check_logits(logits: list[Tensor], model: Any) -> None:
    """They are those of transformers."""
    for found, batch in zip(logits, TOKENS, strict=True):
        expected = model(batch).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def check_answers(answers: list[list[int]], model: Any) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0]
        assert len(answer) == NUM_NEW and answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module")
def models():
    return {name: random_bloom(**changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def outcomes(models, request, tmp_path_factory):
    folders = {name: str(tmp_path_factory.mktemp("bloom")) for name in models}
    for name, folder in folders.items():
        models[name].save_pretrained(folder)
    return run_ranks(2, partial(run_all, folders), asked_layouts(request))[-1]


@pytest.mark.parametrize("layout", quickly(LAYOUTS, QUICK))
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(outcomes, models, name, layout):
    check_logits(outcomes[name, layout][0], models[name])


@pytest.mark.parametrize("layout", quickly(GENERATING, QUICK))
@pytest.mark.parametrize("name", MODELS)
def test_answers_with_a_cache_are_those_of_the_whole_forward(outcomes, models, name, layout):
    """Prompts of unequal length in one batch, so some are padded; transformers sees each alone and whole."""
    check_answers(outcomes[name, layout][1], models[name])
