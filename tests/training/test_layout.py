"""The layout never changes the model: all that `megatron-peft certify` compares equals one process's."""

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest
import torch

from megatron_peft.certify.runs import END, START, RankReport
from tests.ranks import RanksFailed, run_ranks
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, differences, merged, run_jobs

TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
ACCOUNTED = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
GROUPS_OF_FOUR = {"boft_block_size": 2, "boft_factors": 2}
LORA = {"method": "lora", "lora_rank": 4}
BOFT = {"method": "boft", **GROUPS_OF_FOUR}
URNN = {"method": "urnn", "urnn_block_size": 4}
HYBRID = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 2, "peft_lr_rotation": 2e-3}
FOLDED = {"hybrid_rotation": "urnn", "hybrid_lambda": "descent", "hybrid_merge_interval": 3, "urnn_block_size": 4}
METHODS = {
    "lora": {"peft": LORA},
    "boft": {"peft": BOFT, "optimizer": {"lr": 1e-2}},
    "boft-input": {"peft": {**BOFT, "rotation_side": "input"}, "optimizer": {"lr": 1e-2}},
    "lora-ga": {"peft": {"method": "lora-ga", "lora_rank": 4, "lora_ga_batches": 2}},
    "hybrid": {"peft": {**HYBRID, **GROUPS_OF_FOUR}},
    "urnn": {"peft": URNN},
    "riemannian": {"peft": {**URNN, "urnn_update": "riemannian", "peft_lr_rotation": 0.2}},
    "projection": {"peft": {**BOFT, "boft_parametrization": "projection"}},
    # Adam forgets its moments in a merge: with a smaller eps its next step makes whole steps of what is rounding.
    "hybrid-folded": {"peft": {**HYBRID, **FOLDED, "lora_ga_init": "original"}, "optimizer": {"adam_eps": 1e-4}},
    "full": {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}},
    "lora-packed": {"peft": LORA, "data_settings": {"pack_sequences": True}},
}
# Two microbatches a step, or one, as one process has, where four would do: a collective of gloo costs a millisecond
# whatever it carries, and how samples fall on microbatches must not matter either.
HALF_AS_MANY = {"training": {"micro_batch_size": 4}}
ONE = {"training": {"micro_batch_size": 8}}
OVERLAPPED = {
    "optimizer": {"use_distributed_optimizer": True, "overlap_param_gather": True},
    "training": {"overlap_grad_reduce": True},
}
PADDED = {"data_settings": {"pad_to_seq_length": True}}
ON_TWO_RANKS = {
    "TP2": {"parallel": TP2, **HALF_AS_MANY},
    "TP2+SP": {"parallel": SP, **ONE},
    "TP2 selective recompute": {
        "parallel": TP2,
        "transformer": {"recompute_granularity": "selective"},
        "model": {"recompute_modules": ("core_attn", "layernorm", "mlp")},
        **HALF_AS_MANY,
    },
    "PP2": {"parallel": PP2},
    "PP2 uneven, first": {"parallel": {**PP2, "decoder_first_pipeline_num_layers": 1}},
    "PP2 uneven, last": {"parallel": {**PP2, "decoder_last_pipeline_num_layers": 1}},
    "PP2 interleaved": {"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}},
    # 4 layers + 2 = 2 ranks x 3 chunks: the embedding alone, and the loss alone.
    "PP2 interleaved, accounted": {
        "parallel": {**PP2, **ACCOUNTED, "num_layers_per_virtual_pipeline_stage": 1},
        "transformer": RECOMPUTE,
    },
    "PP2 padded": {"parallel": PP2, **PADDED},
    "PP2 interleaved, padded": {"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}, **PADDED},
    "DP2": {},
    "DP2 distributed optimizer": {"optimizer": {"use_distributed_optimizer": True}},
    "DP2 overlapped": OVERLAPPED,
}
ON_FOUR_RANKS = {
    "TP2xPP2 recompute": {"parallel": {**TP2, **PP2}, "transformer": RECOMPUTE, **HALF_AS_MANY},
    "TP2xPP2+SP": {"parallel": {**SP, **PP2}, **HALF_AS_MANY},
    "PP2 interleaved x DP2 overlapped": {"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}, **OVERLAPPED},
    # Two chunks a rank; on four of the eight no layer, on two of those nothing at all.
    "PP4 layout": {"parallel": {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "E|t|t||t|t||L"}},
}

LAYOUTS = {**ON_TWO_RANKS, **ON_FOUR_RANKS}
# `make test` runs a third of the layouts for LoRA and one or two for each other method, and no variants of them;
# `make test-all` runs all.
# `test_layout_small.py` has others.
QUICK_LAYOUTS = {
    "lora": (*("TP2+SP", "PP2 interleaved, accounted", "DP2 overlapped"), *("TP2xPP2 recompute", "PP4 layout")),
    "hybrid": ("TP2+SP", "DP2 distributed optimizer"),
    "boft": ("TP2+SP", "PP2"),
    "lora-ga": ("TP2+SP", "PP2"),
    "urnn": ("TP2+SP", "DP2 distributed optimizer"),
    "full": ("PP2 interleaved x DP2 overlapped", "PP2 padded"),
    "lora-packed": ("TP2+SP", "PP2 interleaved"),
}
REFUSED = [
    (method, layout)
    for method in ("riemannian", "projection", "hybrid-folded")
    for layout in LAYOUTS
    if "DP2 overlapped" in layout
]
# Bloom's own parts split like everything else: ALiBi, the norm of the embedding, tied embeddings over two stages.
BLOOM_METHODS = ("full", "hybrid", "urnn", "lora-packed")
BLOOM_LAYOUTS = {
    "TP2+SP recompute": {"parallel": SP, "transformer": RECOMPUTE},
    "PP2 interleaved": LAYOUTS["PP2 interleaved"],
}


def quick_layouts(method: str) -> tuple[str, ...]:
    return QUICK_LAYOUTS.get(method, ())


CASES = [
    *(
        pytest.param(
            method, layout, "llama", marks=[] if layout in QUICK_LAYOUTS.get(method, ()) else [pytest.mark.slow]
        )
        for method in METHODS
        for layout in LAYOUTS
        if (method, layout) not in REFUSED
    ),
    *(pytest.param(*case, "bloom", marks=pytest.mark.slow) for case in product(BLOOM_METHODS, BLOOM_LAYOUTS)),
]


def layout_job(method: str, layout: str, settings: dict, base: str, data: str) -> Job:
    return Job(f"{method} {layout}", base, data, num_steps=6, **merged(METHODS[method], settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """`trained(method, layout, base)`: what each rank reports of one run; they agree on its numbers.

    A world of ranks costs a second or two: a method's layouts of as many ranks, of those that were chosen, share one.
    """
    folder = tmp_path_factory.mktemp("layout")
    bases = {"llama": str(save_llama(folder / "llama")), "bloom": str(save_bloom(folder / "bloom"))}
    data = str(save_pairs(folder / "pairs.jsonl"))
    chosen = [item.callspec.params for item in request.session.items if item.originalname == EQUALS_ONE_PROCESS]

    def run_world(num_ranks: int, method: str, layouts: Sequence[str], base: str) -> dict[str, list[RankReport]]:
        settings = {"alone": ONE, **LAYOUTS, **BLOOM_LAYOUTS}
        jobs = {layout: layout_job(method, layout, settings[layout], bases[base], data) for layout in layouts}
        by_rank = run_ranks(num_ranks, run_jobs, list(jobs.values()))
        found = {layout: [reports[job.name] for reports in by_rank] for layout, job in jobs.items()}
        for ranks in found.values():
            assert all(rank.curve == ranks[0].curve for rank in ranks), "ranks report different numbers"
        return found

    @cache
    def of_method(num_ranks: int, method: str, base: str) -> dict[str, list[RankReport]] | None:
        cases = [case["layout"] for case in chosen if (case["method"], case["base"]) == (method, base)]
        try:
            return run_world(num_ranks, method, [one for one in cases if ranks_of(one) == num_ranks], base)
        except (AssertionError, RanksFailed):
            return None  # each by itself, to see which it is

    @cache
    def run(method: str, layout: str, base: str = "llama") -> list[RankReport]:
        together = {} if layout == "alone" else of_method(ranks_of(layout), method, base) or {}
        return together.get(layout) or run_world(ranks_of(layout), method, [layout], base)[layout]

    return run


def ranks_of(layout: str) -> int:
    return 1 if layout == "alone" else 4 if layout in ON_FOUR_RANKS else 2


@pytest.mark.parametrize(("method", "layout", "base"), CASES)
def test_layout_equals_one_process(trained, method, layout, base):
    (alone,), here = trained(method, "alone", base), trained(method, layout, base)
    assert differences(here, alone) == {}
    lambdas = here[0].curve.lambdas
    assert bool(lambdas) == method.startswith("hybrid")
    assert not {0.0, 0.5, 1.0} & {*lambdas.values()}, "a lambda has not moved"
    start, end = (alone.tensors[when] for when in (START, END))
    merged_into = [slot for slot in start if slot[0].endswith("folded_weight")]
    assert bool(merged_into) == (method == "hybrid-folded")
    assert not any(torch.equal(start[slot], end[slot]) for slot in merged_into), "nothing was merged"


EQUALS_ONE_PROCESS = test_layout_equals_one_process.__name__


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method in QUICK_LAYOUTS else [pytest.mark.slow]) for method in METHODS]
)
def test_training_learns(trained, method):
    losses = trained(method, "alone")[0].curve.losses
    assert losses[-1] < losses[0] - 0.05
