"""One flag for each thing that is served, with its words; every other flag of Megatron is refused with a reason."""

import re
import typing
import warnings
from collections import Counter
from dataclasses import fields

import pytest

from megatron_peft.cli.flags import (
    EQUIVALENTS,
    GROUPS,
    REASONS,
    TOLD,
    equivalent,
    reason_of,
    served_flags,
    why_not_served,
)
from megatron_peft.config import METHODS, SECTIONS, PeftConfig, flag
from megatron_peft.models.shape import CLAIMS, VALUES

SERVED = served_flags()
NAMES = {name for one in SERVED for name in one.names}
KNOWN = {name[2:] for name in NAMES} | REASONS.keys()
OURS = {one.name for config_class in SECTIONS.values() for one in fields(config_class) if "help" in one.metadata}


def repeated(names: typing.Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_every_field_has_one_flag_with_help_and_a_group_and_a_shape_can_be_compared() -> None:
    assert {one.key for one in SERVED if one.target == "config"} == OURS
    assert repeated(name for one in SERVED for name in one.names) == []
    assert [one.names for one in SERVED if len(one.help) <= 10 or one.group not in GROUPS] == []
    shape = [one for one in SERVED if one.target == "shape"]
    assert {one.key for one in shape if one.takes_value} | {"vocab_size"} == VALUES.keys()
    assert {one.key for one in shape if not one.takes_value} == CLAIMS.keys()


def test_every_peft_flag_belongs_to_a_method() -> None:
    read = {name for method in METHODS for name in METHODS[method].fields(PeftConfig(method))}
    read |= METHODS["hybrid"].fields(PeftConfig("hybrid", hybrid_rotation="urnn"))
    assert read == {one.name for one in fields(PeftConfig)}


def test_a_flag_is_refused_for_one_reason_and_never_served_too() -> None:
    """The longest family wins."""
    assert repeated(name for names in TOLD["reasons"].values() for name in names.split()) == []
    assert {name[2:] for name in NAMES} & REASONS.keys() == set()
    assert reason_of("torch-fsdp2-no-reshard-after-forward") == "fully sharded data parallelism"
    assert reason_of("hybrid-context-parallel") == "context parallelism" != reason_of("hybrid-layer-x")


def test_every_way_out_belongs_to_a_refused_flag() -> None:
    of_values = {name[2:] for one in SERVED if one.choices for name in one.names}
    assert TOLD["ways-out"].keys() <= REASONS.keys() | of_values
    assert TOLD["ways-out-by-reason"].keys() <= TOLD["reasons"].keys()


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing here
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.transformer.transformer_config import TransformerConfig
    found = {one.__name__: one for one in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)}
    return found


def test_every_field_of_megatron_core_is_served_or_refused(classes: dict[str, type]) -> None:
    """In whatever version is installed."""
    public = [one for of_class in classes.values() for one in fields(of_class) if not one.name.startswith("_")]
    own_names = [name for one in public for name in one.metadata.get("argparse_meta", {}).get("arg_names", ())]
    names = [*(flag(one.name) for one in public), *own_names]
    answers = {name: why_not_served(name, NAMES) for name in names if name not in NAMES}
    assert [name for name, told in answers.items() if f"{name} is a Megatron flag" not in told] == []


def test_flags_of_transformer_fields_have_their_types(classes: dict[str, type]) -> None:
    hints = typing.get_type_hints(classes["TransformerConfig"])
    for served in (one for one in SERVED if one.target == "transformer"):
        members = [one for one in typing.get_args(hints[served.key]) if one is not type(None)] or [hints[served.key]]
        if served.choices:
            assert served.choices == typing.get_args(members[0]) or served.choices == typing.get_args(hints[served.key])
        elif served.constant in (True, False) or served.takes_value:
            assert members == [served.kind if served.takes_value else bool], served.key


def test_flags_of_hugging_faces_trainers_stand_beside_ours_and_name_ours() -> None:
    assert EQUIVALENTS.keys() & KNOWN == set()
    mentioned = {name for told in EQUIVALENTS.values() for name in re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", told)}
    assert mentioned <= NAMES


def test_common_arguments_of_hugging_faces_trainer_are_known() -> None:
    """Those that people set most; a name that both sides spell alike is served."""
    common = "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size weight_decay warmup_ratio"
    common += " gradient_accumulation_steps lr_scheduler_type logging_steps save_steps save_total_limit eval_steps"
    common += " gradient_checkpointing max_grad_norm seed bf16 fp16 optim report_to run_name resume_from_checkpoint"
    common += " dataloader_num_workers warmup_steps deepspeed fsdp ddp_timeout push_to_hub group_by_length adam_beta1"
    known = {name.replace("-", "_") for name in KNOWN}
    unanswered = [name for name in common.split() if name not in known and not equivalent(f"--{name}")]
    assert unanswered == ["group_by_length"]  # there is nothing like it here
