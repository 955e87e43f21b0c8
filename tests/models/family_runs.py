"""What the tests of model families run on two ranks: logits, answers, training curves, and runs that are saved."""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_peft.certify.runs import START, RankReport
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.config import ModelConfig, ParallelConfig
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.models.families import FAMILIES, read_shape
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop_model_parallel
from tests.checkpoint.runs import Files, configure, merged, start
from tests.tiny_bloom import random_bloom
from tests.tiny_llama import VOCAB_SIZE, draw_parameters
from tests.training.layout_runs import Job, run_each, run_jobs
from tests.training.test_layout import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "new-model.md"
(SOURCE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
LINES = r'^    "(\w+)": "([\w.]+)",$'
(LINE,) = re.findall(LINES, PAGE.read_text(), re.MULTILINE)
NEW_FAMILY, NEW_MODULE = LINE


def add_the_new_family() -> None:
    """As the page says."""
    module = sys.modules[NEW_MODULE] = ModuleType(NEW_MODULE)
    exec(compile(SOURCE, str(PAGE), "exec"), module.__dict__)
    FAMILIES[NEW_FAMILY] = NEW_MODULE


SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
# Small models of odd shapes, by family: untied and tied, heads of hidden size / heads and others, windows that fit.
MODELS: dict[str, dict[str, Any]] = {
    "bloom": {},
    "bloom, 12 heads": {"n_head": 12, "hidden_size": 96},
    "bloom, untied": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None, "head_dim": 20},
    "mistral, tied": {"sliding_window": 160, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 160}
    | {"max_window_layers": 1},
    "qwen3": {"head_dim": 20},
    "qwen3, tied": {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True},
    NEW_FAMILY: {"tie_word_embeddings": False, "num_hidden_layers": 4},
    f"{NEW_FAMILY}, tied": {"head_dim": 20, "use_bias": False, "sliding_window": 160, "num_hidden_layers": 4},
}


def random_model(name: str) -> Any:
    """One of MODELS by transformers, every parameter random: biases and norms too."""
    family = name.partition(",")[0]
    if family == "bloom":
        return random_bloom(**MODELS[name])
    prefix = family.capitalize()
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **MODELS[name]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    draw_parameters(model, std=0.08)
    return model


TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": TP2,
    "TP2+SP": TP2 | {"sequence_parallel": True},
    "PP2": PP2,
    "PP2 interleaved": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},  # of four layers
}
GENERATING = ("TP1", "TP2", "TP2+SP")  # generation runs on one pipeline stage
TOKENS = list(torch.randint(VOCAB_SIZE, (2, 2, 150), generator=torch.Generator().manual_seed(0)))
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(VOCAB_SIZE) for _ in range(length)] for length in (5, 1, 19, 140)]
NUM_NEW = 10

NUM_STEPS = 5
SIX = ("full", "lora", "lora-ga", "boft", "urnn", "hybrid")
Case = tuple[str, str, str]  # family, method, layout; "" for one process
# `make test` compares these; `make test-all` compares every method of Mistral and Qwen at both layouts.
QUICK: list[Case] = [
    *(("mistral", "lora", "TP2"), ("qwen2", "hybrid", "TP2+SP"), (NEW_FAMILY, "lora", "TP2")),
    *(("qwen3", "full", "TP2"), ("qwen3", "full", "TP2+SP")),
]
TARGETS = {NEW_FAMILY: ("q_proj", "c_proj")}


@dataclass(frozen=True)
class Outcomes:
    """Logits [b, s, vocabulary] of the last pipeline stage and answers, by model and layout; reports by case."""

    answers: dict[tuple[str, str], tuple[list[Tensor], list[list[int]]]]
    reports: dict[str, RankReport]


def run_families(asked: tuple[Files, list[tuple[str, str]], dict[str, str]]) -> Outcomes:
    """Called on each of two ranks, with models and layouts for answers, and methods of runs to save by model."""
    files, pairs, saved = asked
    add_the_new_family()
    start_world()
    answers = {(name, layout): _run(str(Path(files.bases, name)), layout) for name, layout in pairs}
    reports = run_each([curve_job(files, case) for case in QUICK])
    for name, method in saved.items():
        _save(files, name, method)
    return Outcomes(answers, reports)


def run_methods(asked: tuple[Files, list[Case]]) -> dict[str, RankReport]:
    files, cases = asked
    add_the_new_family()
    return run_jobs([curve_job(files, case) for case in cases])


def curve_job(files: Files, case: Case) -> Job:
    family, method, layout = case
    # Split over ranks, the loss is also formed in several chunks a microbatch.
    split = {"training": {"micro_batch_size": 4}, "model": {"cross_entropy_chunk_tokens": 50}}
    settings = {"parallel": LAYOUTS[layout], **split} if layout else {}
    settings = merged(METHODS[method], settings)
    if family in TARGETS:
        settings = merged(settings, {"peft": {"target_modules": TARGETS[family]}})
    return Job(" ".join(case), str(Path(files.bases, family)), files.data, num_steps=NUM_STEPS, **settings)


def adapted_layers(report: RankReport) -> set[str]:
    return {key.partition(".adapter.")[0] for key, _ in report.tensors[START]}


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


def _logits(chunks: Any) -> list[Tensor]:
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


def _forward(microbatches: Any, model: Any) -> tuple[Tensor, Any]:
    tokens = next(microbatches)
    logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), attention_mask=None)
    return logits, lambda output, non_loss_data: gather_from_tensor_model_parallel_region(output)


def _save(files: Files, name: str, method: str) -> None:
    """A run of two steps at TP2. LoRA's second factor is 0 at the start: random numbers make a change that shows."""
    settings = {"model": {"pretrained_checkpoint": name}, "parallel": TP2}
    settings |= {"peft": METHODS[method]["peft"], "checkpoint": {"save": str(Path(files.work, name))}}
    run = start(configure(files, settings | {"optimizer": {"lr": 0.02}}))
    run.train(2)
    with torch.no_grad():
        for parameter_name, parameter in run.chunks[0].named_parameters():
            if parameter_name.endswith("adapter.B"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    draft_checkpoint(run.state).complete()
