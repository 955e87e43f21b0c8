"""The configuration of the fine-tuning methods."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements

# The registry: --peft-method -> what builds its adapters, imported when it is asked for (`adapters/attach.py`).
PEFT_METHODS = {
    "full": "",
    "lora": "megatron_peft.adapters.low_rank:LowRank",
    "lora-ga": "megatron_peft.adapters.low_rank:LowRank",
    "boft": "megatron_peft.adapters.boft:boft",
    "urnn": "megatron_peft.adapters.urnn:urnn",
    "hybrid": "megatron_peft.adapters.hybrid:Hybrid",
}
LAMBDA_RULES = ("gradient", "raw", "rms", "descent")
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
    lora_max_norm_ratio: float | None = None  # largest |s B A| / |W0|, Frobenius norms; None: unbounded
    lora_ga_batches: int = 8  # global batches that LoRA-GA starts from
    lora_ga_init: Literal["aligned", "paper", "original"] = "aligned"  # what A and B start as
    rotation_side: Literal["output", "input"] = "output"  # R W, or W R^T as in HF PEFT
    boft_block_size: int = 8  # b
    boft_factors: int = 3  # m; groups of b 2^(m-1) features turn together
    boft_parametrization: Literal["cayley", "projection"] = "cayley"  # what the blocks are made of
    urnn_block_size: int = 64  # real features of a group, two of them a complex one
    urnn_update: Literal["structured", "riemannian"] = "structured"  # eq. (10), or eq. (11)-(12)
    urnn_mode: Literal["multiply", "replace"] = "multiply"  # Q W, or Q in place of a square W
    peft_lr_rotation: float | None = None  # of rotation parameters; None: --lr, in the Hybrid --lr / 8
    hybrid_rotation: Literal["boft", "urnn"] = "boft"
    hybrid_lambda: str = "gradient"  # one of LAMBDA_RULES, or fixed:X
    hybrid_lambda_init: float = 0.5  # of every layer, before the first step
    hybrid_lambda_ema: float = 0.9  # weight of lambda's last value
    hybrid_lambda_min: float = 0.02  # both parts go on getting a gradient
    hybrid_lambda_max: float = 0.98
    hybrid_merge_interval: int | None = None  # iterations after which the change is folded into W

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require(
                self.method in PEFT_METHODS,
                f"--peft-method {self.method} is not one of {', '.join(PEFT_METHODS)}.",
            )
            require.positive("lora_rank", "lora_alpha", "lora_plus_ratio")
            require.positive("lora_ga_batches", "lora_max_norm_ratio")
            require.positive("boft_block_size", "boft_factors", "urnn_block_size", "peft_lr_rotation")
            require.positive("hybrid_merge_interval")
            require(
                self.boft_block_size % 2 == 0,
                f"--boft-block-size is {self.boft_block_size}; a butterfly mixes halves of a block: use an even size.",
            )
            require(
                self.urnn_block_size % 2 == 0,
                f"--urnn-block-size is {self.urnn_block_size}; two real features make a complex one: use an even size.",
            )
            require.fraction("lora_dropout", "hybrid_lambda_ema")
            require(
                self.hybrid_lambda in LAMBDA_RULES or self._fixed_mix is not None,
                f"--hybrid-lambda is {self.hybrid_lambda}; it is {', '.join(LAMBDA_RULES)}, or fixed:X with X between "
                f"0 and 1.",
            )
            low, start, high = self.hybrid_lambda_min, self.hybrid_lambda_init, self.hybrid_lambda_max
            require(
                0 < low <= start <= high < 1,
                f"--hybrid-lambda-min {low}, --hybrid-lambda-init {start} and --hybrid-lambda-max {high}: they must "
                f"rise in this order, above 0 and below 1.",
            )
            require(
                self.method != "hybrid" or self.rotation_side == "output",
                "--peft-method hybrid turns the output side: leave out --rotation-side input.",
            )
            require(bool(self.target_modules), "--peft-target-modules needs at least one name.")

    @property
    def trains_adapters(self) -> bool:
        return self.method != "full"

    @property
    def starts_from_gradients(self) -> bool:
        return self.method in ("lora-ga", "hybrid")

    @property
    def subtracts_start(self) -> bool:
        """Whether B A starts away from zero, so that a frozen B0 A0 is subtracted to keep the pretrained function."""
        return self.starts_from_gradients and self.lora_ga_init != "aligned"

    @property
    def leaves_the_optimizer(self) -> bool:
        """Whether a step ends with an update of whole matrices on every rank: eq. (6), or eq. (11)-(12)."""
        kinds = (self.method, self.hybrid_rotation if self.method == "hybrid" else "")
        return ("boft" in kinds and self.boft_parametrization == "projection") or (
            "urnn" in kinds and self.urnn_update == "riemannian"
        )

    @property
    def adapts_mix(self) -> bool:
        """Whether lambda follows the gradients."""
        return self._fixed_mix is None

    @property
    def initial_mix(self) -> float:
        """lambda at the start: X of fixed:X, else --hybrid-lambda-init."""
        return self.hybrid_lambda_init if self._fixed_mix is None else self._fixed_mix

    @property
    def _fixed_mix(self) -> float | None:
        kind, _, value = self.hybrid_lambda.partition(":")
        try:
            number = float(value)
        except ValueError:
            return None
        return number if kind == "fixed" and 0 <= number <= 1 else None

    def rotation_lr(self, lr: float) -> float:
        """Learning rate of rotation parameters: a rotation mixed with a low rank wants about an eighth of its rate."""
        return self.peft_lr_rotation or (lr / 8 if self.method == "hybrid" else lr)

    @property
    def lora_scale(self) -> float:
        """s of y = W x + s B (A x): alpha / r, or alpha / sqrt(r) with --lora-rs."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.lora_rs else self.lora_rank)
