"""The base model of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_peft.config.errors import Requirements, flag

FULL_RECOMPUTE_FIELDS = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it runs.

    `shape_flags` holds the shape that the user typed (`num_layers`, `hidden_size`, ...), to be compared with what
    the checkpoint says; `transformer` holds the served fields of megatron-core's TransformerConfig that describe a
    run and not a model (dropouts, recompute, fusions).
    """

    pretrained_checkpoint: str | None = None
    shape_flags: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    make_vocab_size_divisible_by: int = 128
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  # norms and core attention only

    def __post_init__(self) -> None:
        run = self.transformer
        full = run.get("recompute_granularity") == "full"
        only_full = [name for name in FULL_RECOMPUTE_FIELDS if run.get(name)]
        with Requirements(self) as require:
            require(
                bool(self.pretrained_checkpoint),
                "no base model: --pretrained-checkpoint takes a Hugging Face folder (config.json and *.safetensors).",
            )
            require.positive("make_vocab_size_divisible_by")
            for name in ("attention_dropout", "hidden_dropout"):
                require(0 <= run.get(name, 0) < 1, f"{flag(name)} is {run.get(name)}; it is at least 0 and below 1.")
            require(
                not full or {"recompute_method", "recompute_num_layers"} <= run.keys(),
                "--recompute-granularity full needs --recompute-method uniform or block, and --recompute-num-layers N "
                "(uniform: layers a recomputed unit; block: layers a stage that are recomputed).",
            )
            require(
                full or not only_full,
                f"{', '.join(map(flag, only_full))} belong to --recompute-granularity full, which is not given.",
            )
            require(
                run.get("recompute_num_layers", 1) > 0,
                f"--recompute-num-layers is {run.get('recompute_num_layers')}; it must be above 0.",
            )
