"""A run on a quantized base is the same at every layout, and what would change its weights is refused."""

import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from megatron_peft.certify.comparison import compare_curves
from megatron_peft.certify.runs import RankReport
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.conversion.pretrained import checked_shape
from megatron_peft.data.batches import Microbatch
from megatron_peft.training.step import train_step
from tests.models.family_runs import SIZES
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import draw_parameters, save_llama
from tests.training.layout_runs import Job, built, merged, run_each, run_jobs
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
OUTPUT = (("llama", "lora-ga", "nf4 output"), ("qwen3", "lora", "fp8 output"))  # the output layer is quantized too
# `make test` runs these, `make test-all` five methods of three families at every layout.
QUICK = [
    ("llama", "lora", "nf4", "DP2"),
    ("llama", "hybrid", "nf4 output", "TP2+SP recompute"),
    ("bloom", "lora", "fp8", "TP2"),
]
ALL = [(*case, layout) for case in product(FAMILIES, FIVE, ["nf4"]) for layout in LAYOUTS if layout != "alone"]
ALL += [("llama", "boft-input", "fp8", layout) for layout in LAYOUTS if layout != "alone"]
ALL += [(*case, layout) for case in OUTPUT for layout in LAYOUTS if layout != "alone"]
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
        kind, _, output = precision.partition(" ")
        # One process forms whole logits, split ones the loss of a few tokens at a time.
        model = {"base_precision": kind, "cross_entropy_chunk_tokens": 0 if layout == "alone" else 7}
        settings = merged(METHODS[method], LAYOUTS[layout], {"model": model | {"quantize_output_layer": bool(output)}})
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


@pytest.mark.slow
def test_logits_and_ten_steps_of_lora_are_those_of_transformers_bitsandbytes_and_peft(files, tmp_path):
    """Of layers that are not fused: PEFT's q, k and v have an A each, ours one in common."""
    base = save_llama(tmp_path / "llama", **WIDTHS, **HEADS)
    peft = {"lora_rank": 4, "target_modules": ("o_proj", "down_proj")}
    steady = {"lr": 5e-3, "lr_decay_style": "constant", "weight_decay": 0.0, "clip_grad": 1.0}
    settings = {"peft": peft, "optimizer": steady, "model": {"base_precision": "nf4"}}
    job = Job("", str(base), files[1], num_steps=10, training={"micro_batch_size": 8}, **settings)
    with one_rank(with_groups=False), built(job) as (state, data):
        chunk, batches, ours = state.model_chunks[0].module, [], []
        starts = {name: x.detach().clone() for name, x in chunk.named_parameters() if ".adapter." in name}
        for (batch,) in islice(data.train, 10):
            if not batches:
                with torch.no_grad():
                    logits = chunk(batch.tokens, batch.position_ids, None)
            batches.append(batch)
            ours.append(train_step(state, [batch]).loss)
    theirs = _with_peft(base, starts, batches)
    their_logits = next(theirs)
    torch.testing.assert_close(logits[..., : their_logits.shape[-1]], their_logits, atol=1e-4, rtol=0)
    assert ours == pytest.approx(list(theirs), rel=1e-4) and ours[-1] < ours[0]


def _with_peft(base: Path, starts: dict[str, torch.Tensor], batches: list[Microbatch]) -> Iterator[Any]:
    """The first batch's logits, and the loss of each step."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    lora = LoraConfig(r=4, lora_alpha=PeftConfig.lora_alpha, target_modules=["o_proj", "down_proj"])
    model = get_peft_model(model, lora).train()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    for name, parameter in trained.items():
        _, _, number, module, side = re.fullmatch(r"(.*)(layers\.)(\d+)\.\w+\.(\w+)\.lora_(A|B).*", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        ours = {"o_proj": "self_attention.linear_proj", "down_proj": "mlp.linear_fc2"}[module]
        parameter.data.copy_(starts[f"decoder.layers.{number}.{ours}.adapter.{side}"])
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0.0)
    for batch in batches:
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        if batch is batches[0]:
            yield logits.detach()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        loss = (losses * batch.loss_mask.flatten()).sum() / batch.num_loss_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        yield loss.item()
