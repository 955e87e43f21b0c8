"""What a checkpoint says about the run that wrote it: `run_record.json`, and `adapter_config.json` for people."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_peft.checkpoint.folders import RECORD, newest_checkpoint
from megatron_peft.config import ConfigurationError, RunConfig, config_from_dict, config_to_dict, require
from megatron_peft.config.untrusted import parse_json, read_text
from megatron_peft.models.shape import ModelShape, RopeScaling

FORMAT_VERSION = 1
COUNTERS = ("iteration", "consumed_samples", "consumed_tokens")  # of a position
ADAPTER_CONFIG = "adapter_config.json"  # where there are adapters: in the checkpoint, and beside the tracker


@dataclass(frozen=True)
class RunRecord:
    """Everything of a checkpoint but its tensors.

    Args:
        config: of the run.
        shape: of the base model.
        position: counters by name (`iteration`, `consumed_samples`, ...).
        adapted_layers: global names of the layers with an adapter, over all ranks; empty for full fine-tuning.
        base_fingerprint: {file name: digest} of the base's folder; None if it could not be read.
        schedule: state of megatron-core's learning-rate schedule; None without the optimizer's state.
        optimizer_steps: updates that each parameter has had, by its key; None without the optimizer's state.
    """

    config: RunConfig
    shape: ModelShape
    position: Mapping[str, int]
    adapted_layers: tuple[str, ...]
    base_fingerprint: Mapping[str, str] | None
    schedule: Mapping[str, Any] | None
    optimizer_steps: Mapping[str, int] | None

    def to_json(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shape = dataclasses.asdict(self.shape)
        plain = {
            "config": config_to_dict(self.config),
            "shape": {**shape, "linear_biases": sorted(self.shape.linear_biases)},
        }
        return json.dumps({"format_version": FORMAT_VERSION, **fields, **plain}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Raises ConfigurationError (newer format or fields), ValueError, KeyError or TypeError (not a record)."""
        fields = parse_json(text, RECORD)
        if not isinstance(fields, dict) or not isinstance(fields.get("config"), dict):
            raise ValueError("it holds no record of a run")
        version = fields.pop("format_version")
        require(
            version <= FORMAT_VERSION,
            f"it has format {version} and this version of megatron_peft reads up to {FORMAT_VERSION}: update it.",
        )
        position, steps, layers = fields["position"], fields["optimizer_steps"], fields["adapted_layers"]
        if not position.keys() <= set(COUNTERS) or "iteration" not in position or not _are_counts(position):
            raise ValueError(f"its position is {position}")
        if not (steps is None or _are_counts(steps)):
            raise ValueError("its optimizer_steps are no counts")
        if not isinstance(fields["schedule"], dict | None):
            raise ValueError(f"its schedule is {fields['schedule']}")
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise ValueError("its adapted_layers are no names")
        fields["config"] = config_from_dict(fields["config"])
        fields["shape"] = _shape_from_dict(fields["shape"])
        fields["adapted_layers"] = tuple(fields["adapted_layers"])
        return cls(**fields)

    def adapter_config(self) -> str:
        """The method's numbers and the base, for people and for tools that look for adapters."""
        fields = {
            "base_model_name_or_path": self.config.model.pretrained_checkpoint,
            "base_model_fingerprint": self.base_fingerprint,
            **config_to_dict(self.config)["peft"],
            "adapted_layers": self.adapted_layers,
        }
        return json.dumps(fields, indent=2) + "\n"


def read_run_record(folder: str | Path) -> RunRecord:
    """The record of the newest checkpoint in a --save folder (or of a checkpoint given itself).

    Raises:
        ConfigurationError: there is no checkpoint, or its record cannot be read.
    """
    return read_record(find_checkpoint(folder))


def find_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint in a --save folder. Raises ConfigurationError if there is none."""
    checkpoint = newest_checkpoint(Path(folder))
    require(checkpoint is not None, f"{folder} holds no checkpoint: give the --save folder of a run.")
    assert checkpoint is not None
    return checkpoint


def read_record(checkpoint: Path) -> RunRecord:
    """The record inside a checkpoint. Raises ConfigurationError naming the file if it cannot be read."""
    path = checkpoint / RECORD
    try:
        return RunRecord.from_json(read_text(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error


def _are_counts(numbers: Mapping[str, Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers.values())


def _shape_from_dict(fields: dict[str, Any]) -> ModelShape:
    scaling = fields["rope_scaling"]
    return ModelShape(
        **{
            **fields,
            "linear_biases": frozenset(fields["linear_biases"]),
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
        }
    )
