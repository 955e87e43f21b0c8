"""LoRA and LoRA-GA, eq. (1)-(2) and (7)-(9): flags, checks and cost. The adapter is `adapters/low_rank.py`."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_peft.config.errors import option, require
from megatron_peft.config.methods import LinearSizes, Method, ParamGroup, PeftOptions

# Marks on parameters, by which the optimizer knows them.
IS_LORA_B = "is_lora_b"
IS_NOT_DECAYED = "is_not_decayed"


@dataclass(frozen=True)
class LowRankOptions(PeftOptions):
    """Flags of every method that trains W + s B A."""

    lora_rank: int = option(16, "r, the inner size of the low-rank factors", check="positive")
    lora_alpha: float = option(32, "the low-rank change is scaled by alpha / r", check="positive")
    lora_dropout: float = option(0.0, "dropout on the input of the low-rank path", check="fraction", may_change=True)
    lora_rs: bool = option(False, "scale by alpha / sqrt(r) instead (rsLoRA)")
    lora_plus_ratio: float = option(1.0, "learning rate of B over that of A (LoRA+)", check="positive", may_change=True)
    lora_max_norm_ratio: float | None = option(
        None,
        "after each step, scale the low-rank change of a weight down to at most this fraction of the weight's own "
        "Frobenius norm",
        check="positive",
        may_change=True,
    )

    @property
    def lora_scale(self) -> float:
        """s of y = W x + s B (A x): alpha / r, or alpha / sqrt(r) with --lora-rs."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.lora_rs else self.lora_rank)


@dataclass(frozen=True)
class LoraGaOptions(LowRankOptions):
    """Flags of the methods whose A and B are initialized from the gradient."""

    lora_ga_batches: int = option(
        8, "global batches whose gradient initializes A and B", check="positive", may_change=True
    )
    lora_ga_init: Literal["aligned", "paper", "original"] = option(
        "aligned",
        "initial A and B: aligned (A along the gradient, B zero), paper (eq. (8)) or original (as published); the last "
        "two subtract a frozen copy",
    )


class LoraMethod(Method):
    """LoRA: a low-rank change of the weight, eq. (1)-(2)."""

    name = "lora"
    summary = "W + s B A; B starts at zero"
    options = (LowRankOptions,)
    adapter = "megatron_peft.adapters.low_rank"
    cost = "r (out + in)"
    param_groups = (
        ParamGroup(IS_LORA_B, learning_rate=lambda peft, lr: peft.lora_plus_ratio * lr),
        ParamGroup(IS_NOT_DECAYED, is_decayed=False),
    )

    def num_parameters(self, peft: LowRankOptions, out_features: int, in_features: int) -> int:
        return peft.lora_rank * (out_features + in_features)

    def late_updates(self, peft: LowRankOptions) -> list[str]:
        return ["--lora-max-norm-ratio"] if peft.lora_max_norm_ratio is not None else []

    def check_layer(self, peft: Any, sizes: LinearSizes, name: str) -> None:
        rank, smaller = peft.lora_rank, min(sizes.out_features, sizes.in_features)
        side = f"{smaller}, the smaller side of {name} ({sizes.out_features} x {sizes.in_features})"
        require(rank <= smaller, f"--lora-rank {rank} is above {side}: use at most {smaller}.")
        takes_twice = self.starts_from_gradients and peft.lora_ga_init == "original"
        require(
            not takes_twice or 2 * rank <= smaller,
            f"--lora-ga-init original takes 2 x --lora-rank {rank} = {2 * rank} singular vectors, more than {side}: "
            f"use a rank of at most {smaller // 2}, or --lora-ga-init aligned or paper.",
        )


class LoraGaMethod(LoraMethod):
    """LoRA-GA: LoRA whose start follows the gradient, eq. (7)-(9)."""

    name = "lora-ga"
    summary = "the same, with A and B initialized from the gradient"
    options = (LoraGaOptions,)
    starts_from_gradients = True

    def subtracts_start(self, peft: LoraGaOptions) -> bool:
        return peft.lora_ga_init != "aligned"


LORA = LoraMethod()
LORA_GA = LoraGaMethod()
