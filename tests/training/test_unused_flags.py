"""Flags of other methods have no effect: a run with all of them set is the same, bit for bit, as one without."""

from dataclasses import fields

import pytest

from megatron_peft.config import METHODS, PeftConfig
from tests.one_rank import one_rank
from tests.training.layout_runs import Job, run_each

# Values that a method would act on, of every field of PeftConfig but the method and its targets.
OTHERS = {
    "lora_rank": 3, "lora_alpha": 7.0, "lora_dropout": 0.5, "lora_rs": True, "lora_plus_ratio": 4.0,
    "lora_max_norm_ratio": 1e-4, "lora_ga_batches": 2, "lora_ga_init": "paper", "rotation_side": "input",
    "peft_lr_rotation": 0.5, "boft_block_size": 4, "boft_factors": 1, "boft_parametrization": "projection",
    "urnn_block_size": 8, "urnn_update": "riemannian", "urnn_mode": "replace", "hybrid_rotation": "urnn",
    "hybrid_lambda": "raw", "hybrid_lambda_init": 0.3, "hybrid_lambda_ema": 0.1, "hybrid_lambda_min": 0.1,
    "hybrid_lambda_max": 0.7, "hybrid_merge_interval": 1,
}  # fmt: skip
OWN = {
    "full": {},
    "lora": {"lora_rank": 4},
    "lora-ga": {"lora_rank": 4, "lora_ga_batches": 1},
    "boft": {"boft_block_size": 2, "boft_factors": 2},
    "urnn": {"urnn_block_size": 4},
    "hybrid": {"lora_rank": 4, "lora_ga_batches": 1, "boft_block_size": 2, "boft_factors": 2},
}


def with_others(method: str) -> dict:
    read = METHODS[method].fields(PeftConfig(method))
    return {**OWN[method], **{name: value for name, value in OTHERS.items() if name not in read}}


@pytest.fixture(scope="module")
def curves(files):
    peft = {method: {"method": method, **own} for method, own in OWN.items()}
    peft |= {f"{method} and others": {"method": method, **with_others(method)} for method in OWN}
    with one_rank(with_groups=False):
        found = run_each([Job(name, *files, num_steps=2, peft=settings) for name, settings in peft.items()])
    return {name: report.curve for name, report in found.items()}


def test_every_flag_is_among_them():
    assert OTHERS.keys() == {one.name for one in fields(PeftConfig)} - {"method", "target_modules"}
    defaults = PeftConfig()
    assert all(getattr(defaults, name) != value for name, value in OTHERS.items())


@pytest.mark.parametrize("method", OWN)
def test_flags_of_other_methods_have_no_effect(curves, method):
    assert curves[f"{method} and others"] == curves[method]
    assert PeftConfig(method, **with_others(method)).unused_flags or method == "hybrid"
