"""The configuration of the fine-tuning methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config_error import Requirements

PEFT_METHODS = ("full", "lora", "lora-ga", "boft")
LINEAR_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class PeftConfig:
    """Which parameters are trained, and the numbers of the method."""

    method: str = "lora"  # --peft-method
    target_modules: tuple[str, ...] = LINEAR_MODULES  # --peft-target-modules: Megatron or HF names, wildcards
    lora_rank: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_rs: bool = False  # rank-stabilised: scale alpha / sqrt(r)
    lora_plus_ratio: float = 1.0  # learning rate of B over that of A
    lora_ga_batches: int = 8  # global batches that LoRA-GA starts from
    rotation_side: Literal["output", "input"] = "output"  # R W, or W R^T as in HF PEFT
    boft_block_size: int = 8  # b
    boft_factors: int = 3  # m; groups of b 2^(m-1) features turn together
    peft_lr_rotation: float | None = None  # of rotation parameters; None: --lr

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require(
                self.method in PEFT_METHODS,
                f"--peft-method {self.method} is not one of {', '.join(PEFT_METHODS)}.",
            )
            require.positive("lora_rank", "lora_alpha", "lora_plus_ratio")
            require.positive("lora_ga_batches")
            require.positive("boft_block_size", "boft_factors", "peft_lr_rotation")
            require(
                self.boft_block_size % 2 == 0,
                f"--boft-block-size is {self.boft_block_size}; a butterfly mixes halves of a block: use an even size.",
            )
            require.fraction("lora_dropout")
            require(bool(self.target_modules), "--peft-target-modules needs at least one name.")

    @property
    def trains_adapters(self) -> bool:
        return self.method != "full"

    @property
    def starts_from_gradients(self) -> bool:
        return self.method == "lora-ga"

    @property
    def lora_scale(self) -> float:
        """s of y = W x + s B (A x): alpha / r, or alpha / sqrt(r) with --lora-rs."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.lora_rs else self.lora_rank)
