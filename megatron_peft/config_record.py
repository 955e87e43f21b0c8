"""RunConfig <-> a plain dictionary that JSON can hold: the record of a run beside its checkpoints."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_origin, get_type_hints

from megatron_peft.config.run import ConfigurationError, RunConfig, field_names


def config_to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """{section: {field: value}} with lists for tuples; what `config_from_dict` reads back to an equal RunConfig."""
    return {
        section: {name: _plain(getattr(part, name)) for name in field_names(type(part))}
        for section, part in ((name, getattr(config, name)) for name in field_names(RunConfig))
    }


def config_from_dict(record: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The RunConfig of a record. Fields that an older record lacks take their defaults.

    Raises ConfigurationError for fields that this version does not know, and for values that contradict one another.
    """
    section_classes = get_type_hints(RunConfig)
    unknown = [
        f"{section}.{name}"
        for section, values in record.items()
        for name in values
        if section not in section_classes or name not in field_names(section_classes[section])
    ]
    if unknown:
        raise ConfigurationError(
            f"the run's record holds {', '.join(unknown)}, which this version of megatron_peft does not know: "
            f"it was written by a newer one."
        )
    return RunConfig(**{name: _section(cls, record.get(name, {})) for name, cls in section_classes.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _section(config_class: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(config_class)
    tuples = {field.name for field in fields(config_class) if get_origin(hints[field.name]) is tuple}
    return config_class(**{name: tuple(value) if name in tuples else value for name, value in values.items()})
