"""A run on a quantized base is the same at every layout, and what would change its weights is refused."""

import sys
from functools import cache
from itertools import product
from typing import Any

import pytest
import transformers

from megatron_peft.certify.comparison import compare_curves
from megatron_peft.certify.runs import RankReport
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.pretrained import checked_shape
from tests.models.family_runs import SIZES
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import draw_parameters, save_llama
from tests.training.layout_runs import Job, merged, run_each, run_jobs
from tests.training.test_layout import HALF_AS_MANY, METHODS, PP2, RECOMPUTE, SP, TP2

# Every rank's part of a row-parallel weight has whole blocks at TP2.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "TP2": {"parallel": TP2, **HALF_AS_MANY},
    "TP2+SP recompute": {"parallel": SP, "transformer": RECOMPUTE, **HALF_AS_MANY},
    "PP2": {"parallel": PP2},
    "DP2": {},
    "TP2xPP2": {"parallel": {**TP2, **PP2}, **HALF_AS_MANY},
}
NUM_RANKS = {"alone": 1, "TP2xPP2": 4}  # of the others 2
FIVE = ("lora", "lora-ga", "boft", "urnn", "hybrid")
FAMILIES = ("llama", "qwen3", "bloom")
# `make test` runs these, `make test-all` five methods of three families at every layout.
QUICK = [
    ("llama", "lora", "nf4", "DP2"),
    ("llama", "hybrid", "nf4", "TP2+SP recompute"),
    ("bloom", "lora", "fp8", "TP2"),
]
ALL = [(*case, layout) for case in product(FAMILIES, FIVE, ["nf4"]) for layout in LAYOUTS if layout != "alone"]
ALL += [("llama", "boft-input", "fp8", layout) for layout in LAYOUTS if layout != "alone"]
Case = tuple[str, ...]  # family, method, precision, layout


def save_qwen3(folder: Any) -> Any:
    config = transformers.Qwen3Config(**{**SIZES, **WIDTHS, **HEADS, "num_hidden_layers": 4})
    transformers.set_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    draw_parameters(model, std=0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reports(tmp_path_factory, files, request):
    """`reports(num_steps, *case)`: reports of the ranks; cases of one test on as many ranks share a world."""
    folder = tmp_path_factory.mktemp("quantized")
    bases = {"llama": save_llama(folder / "llama", **WIDTHS, **HEADS), "qwen3": save_qwen3(folder / "qwen3")}
    bases["bloom"] = save_bloom(folder / "bloom", hidden_size=128, n_head=4)
    items = [item for item in request.session.items if item.path == request.path and "one_process" in item.name]
    chosen: list[Case] = [tuple(item.callspec.params[name] for name in NAMES) for item in items]

    def job(num_steps: int, family: str, method: str, precision: str, layout: str) -> Job:
        settings = merged(METHODS[method], LAYOUTS[layout], {"model": {"base_precision": precision}})
        name = f"{family} {method} {precision} {layout}"
        return Job(name, str(bases[family]), files[1], num_steps=num_steps, **settings)

    @cache
    def of_ranks(num_ranks: int, num_steps: int, cases: tuple[Case, ...]) -> list[dict[str, RankReport]]:
        jobs = [job(num_steps, *case) for case in cases]
        if num_ranks > 1:
            return run_ranks(num_ranks, run_jobs, jobs)
        with one_rank(with_groups=False):
            return [run_each(jobs)]

    def world_of(case: Case) -> tuple[Any, ...]:
        return NUM_RANKS.get(case[3], 2), *(() if case in QUICK else (case[0],))

    def found(num_steps: int, *case: str) -> list[RankReport]:
        together = tuple(one for one in chosen if world_of(one) == world_of(case))
        cases = together if case in together else (case,)
        return [rank[" ".join(case)] for rank in of_ranks(world_of(case)[0], num_steps, cases)]

    return found


NAMES = ("family", "method", "precision", "layout")


@pytest.mark.parametrize(NAMES, QUICK)
def test_a_layout_equals_one_process(reports, family, method, precision, layout, num_steps=5):
    (alone,), ranks = (reports(num_steps, family, method, precision, where) for where in ("alone", layout))
    lines = compare_curves(ranks[0].curve, alone.curve)
    assert {line.name: line.problems for line in lines if line.problems} == {}
    assert min(step.grad_norm for step in alone.curve.steps) > 0 and len(alone.curve.steps) == num_steps


@pytest.mark.slow
@pytest.mark.parametrize(NAMES, [case for case in ALL if case not in QUICK])
def test_every_layout_equals_one_process(reports, family, method, precision, layout):
    test_a_layout_equals_one_process(reports, family, method, precision, layout, num_steps=20)


def test_without_bitsandbytes_its_extra_is_named_and_fp8_needs_none(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigurationError, match=r"bitsandbytes cannot be imported .*: pip install 'megatron-peft\[nf4\]'"
    ):
        checked_shape(job(model={"base_precision": "nf4"}).config(1))
    with one_rank(), pytest.raises(ConfigurationError, match="--base-precision fp8 has blocks of 64 .* have 96 and "):
        checked_shape(job(model={"base_precision": "fp8"}).config(1))
