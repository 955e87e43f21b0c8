"""Flags of Megatron-LM that are refused: known by name or by family, with a reason and a way out."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_peft.megatron_flags import FAMILIES, FLAGS, WAYS_OUT, reason_of, refusal, refused_flags


def test_no_flag_is_refused_for_two_reasons() -> None:
    counted = Counter(name for names in FLAGS.values() for name in names.split())
    assert [name for name, count in counted.items() if count > 1] == []


def test_longest_family_wins() -> None:
    assert reason_of("torch-fsdp2-no-reshard-after-forward") == "fully sharded data parallelism"
    assert reason_of("hybrid-context-parallel") == FAMILIES["hybrid-context-parallel"] == "context parallelism"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("num-experts", "mixture of experts"),
        ("moe-router-topk", "mixture of experts"),
        ("fp8-format", "FP8"),
        ("context-parallel-size", "context parallelism"),
        ("mtp-num-layers", "multi-token prediction"),
        ("use-custom-fsdp", "fully sharded data parallelism"),
        ("retro-add-retriever", "Retro"),
        ("mamba-state-dim", "Mamba"),
        ("vision-pretraining", "vision"),
    ],
)
def test_well_known_flags_have_their_reason(name: str, reason: str) -> None:
    assert reason_of(name) == reason


def test_unknown_name_has_no_reason() -> None:
    assert reason_of("wibble") is None


def test_refusal_names_the_flag_the_reason_and_the_way_out() -> None:
    assert refusal("--num-experts", "mixture of experts") == (
        "--num-experts is a Megatron flag that megatron_peft does not serve (mixture of experts); remove it."
    )
    assert refusal("--fp16", "float16").endswith("use --bf16.")


def test_every_way_out_belongs_to_a_refused_flag() -> None:
    fields = {"check-for-nan-in-grad", "virtual-pipeline-model-parallel-size"}
    fields |= {"num-layers-in-first-pipeline-stage", "num-layers-in-last-pipeline-stage"}
    assert WAYS_OUT.keys() - refused_flags().keys() == fields
