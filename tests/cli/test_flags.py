"""One flag for each thing that is served, each with its words; every other flag of Megatron is refused with a reason.

What is read from megatron-core's source is what its dataclasses say, in whatever version is installed.
"""

import ast
import re
import typing
import warnings
from collections import Counter
from dataclasses import fields

import pytest

from megatron_peft.cli import flags as module
from megatron_peft.cli.flags import (
    EQUIVALENTS,
    GROUPS,
    MEGATRONS,
    REASONS,
    SOURCES,
    TOLD,
    MegatronField,
    equivalent,
    known_flags,
    megatron_fields,
    reason_of,
    served_flags,
    why_not_served,
)
from megatron_peft.config import METHODS, SECTIONS, ConfigurationError, PeftConfig, flag
from megatron_peft.models.shape import CLAIMS, VALUES

SERVED = served_flags()
NAMES = {name for one in SERVED for name in one.names}
OURS = {one.name for config_class in SECTIONS.values() for one in fields(config_class) if "help" in one.metadata}
TRANSFORMER = megatron_fields("TransformerConfig")
READ_FROM_SOURCE = [
    name.replace("-", "_")
    for table in MEGATRONS.values()
    for name, declared in table.items()
    if declared.keys().isdisjoint(("kind", "choices", "constant"))
]


def repeated(names: typing.Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_every_field_has_one_flag_with_help_and_a_group_and_a_shape_can_be_compared() -> None:
    assert {one.key for one in SERVED if one.target == "config"} == OURS
    assert repeated(name for one in SERVED for name in one.names) == []
    assert [one.names for one in SERVED if len(one.help) <= 10 or one.group not in GROUPS] == []
    assert {one.key for one in SERVED if one.target == "transformer"} <= TRANSFORMER.keys()
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
    of_fields = {"check-for-nan-in-grad", "virtual-pipeline-model-parallel-size"}
    of_fields |= {"num-layers-in-first-pipeline-stage", "num-layers-in-last-pipeline-stage"}
    of_values = {name[2:] for one in SERVED if one.choices for name in one.names}
    assert TOLD["ways-out"].keys() - REASONS.keys() - of_values == of_fields
    assert TOLD["ways-out-by-reason"].keys() <= TOLD["reasons"].keys()


def test_every_field_of_megatron_core_is_served_or_refused() -> None:
    known = known_flags(NAMES)
    of_classes = [one for class_name in SOURCES for one in megatron_fields(class_name).values()]
    names = [name for one in of_classes for name in (flag(one.name), *one.flags)]
    assert [name for name in names if name not in known or known[name] == ""] == []


def test_a_field_of_a_newer_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    field = MegatronField("quantum_speedup", "bool", "", ())
    monkeypatch.setattr("megatron_peft.cli.flags.megatron_fields", lambda name: {"quantum_speedup": field})
    for name in ("--quantum-speedup", "--no-quantum-speedup"):
        assert f"{name} is a Megatron flag" in why_not_served(name, NAMES)


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing here
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.transformer.transformer_config import TransformerConfig
    found = {one.__name__: one for one in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)}
    assert found.keys() == SOURCES.keys()
    return found


def test_source_has_the_fields_of_the_classes_with_their_types(classes: dict[str, type]) -> None:
    for name, of_class in classes.items():
        public = {one.name for one in fields(of_class) if not one.name.startswith("_")}
        assert megatron_fields(name).keys() == public
    hints = typing.get_type_hints(classes["TransformerConfig"])
    for name in READ_FROM_SOURCE:
        (served,) = (one for one in SERVED if one.names[0] == flag(name))
        kind, choices = served.kind if served.takes_value else bool, served.choices
        members = [one for one in typing.get_args(hints[name]) if one is not type(None)] or [hints[name]]
        assert choices == (typing.get_args(members[0]) or typing.get_args(hints[name]) if choices else None), name
        assert choices or members == [kind], name


def test_help_is_the_first_sentence_under_a_field_and_flags_are_megatrons_own() -> None:
    """What is computed beside their names is left alone."""
    assert megatron_fields("OptimizerConfig")["sgd_momentum"].help == "Momentum factor for SGD optimizer"
    assert TRANSFORMER["layernorm_epsilon"].flags == ("--norm-epsilon",)
    metadata = "{'argparse_meta': {'arg_names': ['--x-y'], 'choices': [one.name for one in Scope]}}"
    (found,) = module._fields(ast.parse(f"class C:\n  x: int = field(metadata={metadata})").body[0])  # type: ignore[arg-type]
    assert found.flags == ("--x-y",)


def test_missing_megatron_core_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install megatron-core"):
        module.megatron_fields.__wrapped__("OptimizerConfig")


def test_flags_of_hugging_faces_trainers_stand_beside_ours_and_name_ours() -> None:
    assert EQUIVALENTS.keys() & {name.lstrip("-") for name in known_flags(NAMES)} == set()
    mentioned = {name for told in EQUIVALENTS.values() for name in re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", told)}
    assert mentioned <= NAMES


def test_common_arguments_of_hugging_faces_trainer_are_known() -> None:
    """Those that people set most; a name that both sides spell alike is served."""
    common = "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size weight_decay warmup_ratio"
    common += " gradient_accumulation_steps lr_scheduler_type logging_steps save_steps save_total_limit eval_steps"
    common += " gradient_checkpointing max_grad_norm seed bf16 fp16 optim report_to run_name resume_from_checkpoint"
    common += " dataloader_num_workers warmup_steps deepspeed fsdp ddp_timeout push_to_hub group_by_length adam_beta1"
    known = {name.lstrip("-").replace("-", "_") for name in known_flags(NAMES)}
    unanswered = [name for name in common.split() if name not in known and not equivalent(f"--{name}")]
    assert unanswered == ["group_by_length"]  # there is nothing like it here
