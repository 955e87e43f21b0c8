"""What the tests of Mistral and Qwen run on two ranks: logits, training curves, and runs that are saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from megatron_peft.certify.runs import Curve, RankReport
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_peft.conversion.hf_files import write_config
from megatron_peft.models.families import config_of_shape, read_shape
from tests.checkpoint.runs import Files, configure, merged, start
from tests.conversion.megatron_folders import equal, tensors_of
from tests.models.test_bloom import run_all
from tests.tiny_families import MODELS
from tests.training.layout_runs import Job, run_each, run_jobs
from tests.training.test_layout import METHODS, SP, TP2

FAMILIES = ("mistral", "qwen2", "qwen3")
NUM_STEPS = 5
SIX = ("full", "lora", "lora-ga", "boft", "urnn", "hybrid")
LOGIT_LAYOUTS = ("TP1", "TP2", "TP2+SP", "PP2")
QUICK_LOGIT_LAYOUTS = ("TP1", "TP2", "PP2")
LAYOUTS = {"TP2": TP2, "TP2+SP": SP}
# `make test` compares these; `make test-all` compares every method of every family at both layouts.
QUICK = [
    *(("mistral", "lora", "TP2"), ("qwen2", "hybrid", "TP2+SP")),
    *(("qwen3", "full", "TP2"), ("qwen3", "full", "TP2+SP")),
]
SAVED = {**{family: "lora" for family in FAMILIES}, "qwen3 tied": "full"}
Answers = dict[tuple[str, str], tuple[list[Tensor], list[list[int]]]]


@dataclass(frozen=True)
class Outcomes:
    """Logits and answers by model and layout; curves by family, method and layout; saved runs by the model's name."""

    answers: Answers
    curves: dict[str, Curve]


def curve_job(files: Files, family: str, method: str, layout: str) -> Job:
    parallel = {"parallel": LAYOUTS[layout], "training": {"micro_batch_size": 4}} if layout in LAYOUTS else {}
    base = str(Path(files.bases, family))
    return Job(
        f"{family} {method} {layout}", base, files.data, num_steps=NUM_STEPS, **merged(METHODS[method], parallel)
    )


def run_families(asked: tuple[Files, list[str]]) -> Outcomes:
    """Called on each of two ranks, with the layouts of logits and answers."""
    files, layouts = asked
    answers = run_all({name: str(Path(files.bases, name)) for name in MODELS}, layouts)
    curves = curves_of(run_each([curve_job(files, *case) for case in QUICK]))
    for name, method in SAVED.items():
        _save(files, name, method)
    return Outcomes(answers, curves)


def run_methods(asked: tuple[Files, list[tuple[str, str, str]]]) -> dict[str, Curve]:
    files, cases = asked
    return curves_of(run_jobs([curve_job(files, *case) for case in cases]))


def check_round_trip(base: Path, work: Path) -> None:
    """Weights go to Megatron's format and come back bit for bit."""
    hf_to_megatron(base, work / "megatron", progress=False)
    assert equal(tensors_of(megatron_to_hf(work / "megatron", work / "hf", progress=False)), tensors_of(base))


def made_config(base: Path, folder: Path, caplog: Any, *may_differ: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config made of the base's shape gives it back; it and the base's as transformers reads them, which is alike."""
    shape = read_shape(base)
    write_config(folder, config_of_shape(shape))
    assert read_shape(folder) == shape
    assert not caplog.records, "a key without a meaning"
    ours, theirs = (AutoConfig.from_pretrained(place).to_dict() for place in (folder, base))
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert changed <= {"_name_or_path", "dtype", "head_dim", *may_differ}
    return ours, theirs


def curves_of(reports: dict[str, RankReport]) -> dict[str, Curve]:
    return {name: report.curve for name, report in reports.items()}


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
