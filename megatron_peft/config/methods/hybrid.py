"""The Hybrid, Algorithm 2: flags, checks and cost. The adapter is `adapters/hybrid.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from megatron_peft.config.errors import Requirements, option
from megatron_peft.config.methods import LinearSizes, Method, ParamGroup
from megatron_peft.config.methods.low_rank import LORA_GA, LoraGaOptions
from megatron_peft.config.methods.rotation import BOFT, IS_ROTATION, URNN, BoftOptions, RotationMethod, UrnnOptions

if TYPE_CHECKING:
    from megatron_peft.config.run import RunConfig

LAMBDA_RULES = ("gradient", "raw", "rms", "descent")
ROTATIONS: dict[str, RotationMethod] = {"boft": BOFT, "urnn": URNN}


@dataclass(frozen=True)
class HybridOptions(UrnnOptions, BoftOptions, LoraGaOptions):
    """The mixture of a low-rank change and a rotation."""

    hybrid_rotation: Literal["boft", "urnn"] = option("boft", "rotation combined with the low-rank change")
    hybrid_lambda: str = option(
        "gradient",
        "the mixture: gradient (norms of the gradients before mixing), rms (the same per parameter), descent (what a "
        "step gains by each part), raw (the paper's norms), or fixed:X",
    )
    hybrid_lambda_init: float = option(0.5, "lambda before the first step, unless it is fixed")
    hybrid_lambda_ema: float = option(0.9, "weight of the previous lambda in its moving average", check="fraction")
    hybrid_lambda_min: float = option(0.02, "lower bound of lambda")
    hybrid_lambda_max: float = option(0.98, "upper bound of lambda")
    hybrid_merge_interval: int | None = option(
        None, "merge the change into the weight after this many iterations and restart the adapters", check="positive"
    )

    @property
    def initial_mix(self) -> float:
        """lambda at the start: X of fixed:X, else --hybrid-lambda-init."""
        return self.hybrid_lambda_init if self.fixed_mix is None else self.fixed_mix

    @property
    def fixed_mix(self) -> float | None:
        """X of fixed:X."""
        kind, _, value = self.hybrid_lambda.partition(":")
        try:
            number = float(value)
        except ValueError:
            return None
        return number if kind == "fixed" and 0 <= number <= 1 else None


def rotation_lr(peft: Any, lr: float) -> float:
    """Learning rate of a rotation that is mixed with a low rank: an eighth of the low rank's by default."""
    return peft.peft_lr_rotation or lr / 8


def rotation_options(peft: HybridOptions) -> HybridOptions:
    """The options with the values that the rotation has in a mixture."""
    return replace(peft, urnn_mode="multiply", rotation_side="output")


class HybridMethod(Method):
    """The Hybrid: LoRA-GA's low rank and a rotation, mixed by lambda (Algorithm 2)."""

    name = "hybrid"
    summary = "W + lambda s B A + (1 - lambda)(R - I) W, lambda from the gradients"
    options = (HybridOptions,)
    ignored = ("urnn_mode", "rotation_side")  # Q W or R W, of the output side
    adapter = "megatron_peft.adapters.hybrid"
    cost = "r (out + in), and those of the rotation"
    param_groups = (*LORA_GA.param_groups, ParamGroup(IS_ROTATION, rotation_lr, is_decayed=False, is_labelled=True))
    starts_from_gradients = True
    mixes = True

    def num_parameters(self, peft: HybridOptions, out_features: int, in_features: int) -> int:
        parts: tuple[Method, ...] = LORA_GA, ROTATIONS[peft.hybrid_rotation]
        return sum(part.num_parameters(rotation_options(peft), out_features, in_features) for part in parts)

    def check(self, peft: HybridOptions, require: Requirements) -> None:
        require(
            peft.hybrid_lambda in LAMBDA_RULES or peft.fixed_mix is not None,
            f"--hybrid-lambda is {peft.hybrid_lambda}; it must be {', '.join(LAMBDA_RULES)}, or fixed:X with X from 0 "
            f"to 1.",
        )
        low, start, high = peft.hybrid_lambda_min, peft.hybrid_lambda_init, peft.hybrid_lambda_max
        require(
            0 < low <= start <= high < 1,
            f"--hybrid-lambda-min {low}, --hybrid-lambda-init {start} and --hybrid-lambda-max {high}: they must rise "
            f"in this order, above 0 and below 1.",
        )

    def check_run(self, peft: HybridOptions, run: "RunConfig", require: Requirements) -> None:
        super().check_run(peft, run, require)
        require(
            peft.hybrid_merge_interval is None or not run.model.bf16,
            "--hybrid-merge-interval merges changes into weights, which must be float32: leave out --bf16.",
        )

    def late_updates(self, peft: HybridOptions) -> list[str]:
        merges = ["--hybrid-merge-interval"] if peft.hybrid_merge_interval is not None else []
        return [*LORA_GA.late_updates(peft), *ROTATIONS[peft.hybrid_rotation].late_updates(peft), *merges]

    def fields(self, peft: HybridOptions) -> set[str]:
        """The fields that the method reads, without those of the other rotation."""
        chosen = [rotation for name, rotation in ROTATIONS.items() if name == peft.hybrid_rotation]
        parts = (LORA_GA, *chosen)  # another rotation is an error of that field
        return {*HybridOptions.__annotations__}.union(*(part.fields(peft) for part in parts)) - {*self.ignored}

    def variants(self) -> Sequence[Mapping[str, Any]]:
        return [{"hybrid_rotation": name} for name in ROTATIONS]

    def describe(self, peft: HybridOptions) -> str:
        return f"{super().describe(peft)} with --hybrid-rotation {peft.hybrid_rotation}"

    def check_layer(self, peft: HybridOptions, sizes: LinearSizes, name: str) -> None:
        LORA_GA.check_layer(peft, sizes, name)
        ROTATIONS[peft.hybrid_rotation].check_layer(rotation_options(peft), sizes, name)

    def subtracts_start(self, peft: HybridOptions) -> bool:
        return LORA_GA.subtracts_start(peft)

    def merge_interval(self, peft: HybridOptions) -> int | None:
        return peft.hybrid_merge_interval

    def updates_whole_parameters(self, peft: HybridOptions) -> bool:
        return ROTATIONS[peft.hybrid_rotation].updates_whole_parameters(peft)


HYBRID = HybridMethod()
