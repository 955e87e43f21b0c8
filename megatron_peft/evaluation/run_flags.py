"""The flags of a run's model, from its record, so that whoever scores the run need not repeat them.

What is read from the record stands in front of what the user typed, and the last of two equal flags holds. So a layout,
or a base that has moved, is the user's, and everything else the run's.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_peft.checkpoint.record import RunRecord, read_run_record
from megatron_peft.cli.flags import FLAG_NAMES, methods_of
from megatron_peft.config import RunConfig, field_names, flag, require

# Section of RunConfig -> fields that say which model it is and how its texts become tokens.
CARRIED: dict[str, tuple[str, ...]] = {
    "model": ("pretrained_checkpoint", "bf16", "make_vocab_size_divisible_by"),
    "data": ("tokenizer_type", "tokenizer_model", "vocab_size"),
    "training": ("seed",),  # a method may draw what it never trains
}
# A model that is scored is not trained, but RunConfig asks for these: flag -> others that stand for it.
UNUSED = {
    ("--train-data-path", "none.jsonl"): {"--train-data-path", "--data-path"},
    ("--train-iters", "1"): {"--train-iters", "--train-samples", "--train-epochs"},
}


def model_flags(argv: Sequence[str]) -> list[str]:
    """`argv`, flags of pretrain_peft.py, with those of the run under --load in front.

    Raises:
        ConfigurationError: no checkpoint under --load, or its base is not where the run found it.
    """
    typed = {word.partition("=")[0] for word in argv}
    unused = [word for words, others in UNUSED.items() if not typed & others for word in words]
    load = _value_of("--load", argv)
    if load is None:
        return [*unused, *argv]
    record = read_run_record(load)
    if "--pretrained-checkpoint" not in typed:
        _require_base(record, load)
    return [*unused, *flags_of(record.config), *argv]


def flags_of(config: RunConfig) -> list[str]:
    """The flags that give a configuration's model, method and tokenizer; defaults are left out."""
    sections = {**CARRIED, "peft": _peft_fields(config)}
    return [
        word
        for section, names in sections.items()
        for name in names
        for word in _flag_of(getattr(config, section), name)
    ]


def _peft_fields(config: RunConfig) -> tuple[str, ...]:
    method = config.peft.method
    return tuple(name for name in field_names(type(config.peft)) if name == "method" or method in methods_of(name))


def _flag_of(section: Any, name: str) -> Iterator[str]:
    value = getattr(section, name)
    if value == getattr(type(section), name, None):
        return
    dashed = FLAG_NAMES.get(name, (flag(name),))[0]
    if isinstance(value, bool):
        yield dashed if value else f"--no-{dashed[2:]}"
    else:
        yield dashed
        yield from map(str, value if isinstance(value, tuple) else (value,))


def _value_of(name: str, argv: Sequence[str]) -> str | None:
    """The last value of a flag, typed as `--name value` or `--name=value`."""
    value = None
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def _require_base(record: RunRecord, load: str) -> None:
    base = record.config.model.pretrained_checkpoint
    require(
        base is not None and Path(base).exists(),
        f"--load {load} was trained on the base model {base}, which is not there: say where it lies now with "
        f"--pretrained-checkpoint.",
    )
