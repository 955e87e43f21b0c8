"""What BOFT, uRNN and the Hybrid have in common: a block-diagonal rotation of one side of the weight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_peft.config.errors import Requirements, option, require
from megatron_peft.config.methods import Method, ParamGroup, PeftOptions
from megatron_peft.config.targets import LinearSizes, Side

if TYPE_CHECKING:
    from megatron_peft.config.run import RunConfig

IS_ROTATION = "is_rotation"  # mark on parameters, by which the optimizer knows them


@dataclass(frozen=True)
class RotationOptions(PeftOptions):
    """Flags of every method that rotates the weight."""

    rotation_side: Literal["output", "input"] = option(
        "output", "side of the weight that is rotated: R W, or W R^T as in Hugging Face PEFT"
    )
    peft_lr_rotation: float | None = option(
        None, "learning rate of rotation parameters (default: --lr; with hybrid --lr / 8)", check="positive"
    )


class RotationMethod(Method):
    """A method whose adapter is a rotation. Subclasses say how large its blocks are."""

    whole_update_flags: str  # those with which `updates_whole_parameters`, for errors

    # Not decayed, since the identity need not be at zero.
    param_groups = (
        ParamGroup(IS_ROTATION, lambda peft, lr: peft.peft_lr_rotation or lr, is_decayed=False, is_labelled=True),
    )

    def group_size(self, peft: Any) -> int:
        """g, features of a block of R."""
        raise NotImplementedError

    def group_flags(self, peft: Any) -> str:
        """The flags that set g, for errors."""
        raise NotImplementedError

    def check_run(self, peft: Any, run: "RunConfig", require: Requirements) -> None:
        require(
            not (self.updates_whole_parameters(peft) and run.optimizer.overlap_param_gather),
            f"{self.whole_update_flags} updates whole parameters at the end of a step, before "
            f"--overlap-param-gather has gathered them: leave out one of them.",
        )

    def check_layer(self, peft: Any, sizes: LinearSizes, name: str) -> None:
        check_groups(sizes, peft.rotation_side, self.group_size(peft), name, self.group_flags(peft))


def check_groups(sizes: LinearSizes, side: Side, group_size: int, name: str, flags: str) -> None:
    """Groups of features must divide what a rank holds of a layer, and the features of an attention head.

    Args:
        sizes: of the layer.
        side: of the weight that is rotated.
        group_size: g.
        name: of the layer, and `flags` that set g, for errors.

    Raises:
        ConfigurationError: with the sizes that fit.
    """
    held = sizes.num_local_features(side)
    heads = sizes.head_features if side == "output" else None
    whole = heads or sizes.num_features(side) // (sizes.num_parts if side == "output" else 1)
    fitting = ", ".join(str(size) for size in even_divisors(heads or held))
    ranks = [str(size) for size in range(1, sizes.tensor_parallel_size + 1) if whole % (size * group_size) == 0]
    elsewhere = f"; groups of {group_size} fit at --tensor-model-parallel-size {', '.join(ranks)}" if ranks else ""
    require(
        held % group_size == 0,
        f"{flags} gives groups of {group_size} features, but {name} holds {held} per rank at "
        f"--tensor-model-parallel-size {sizes.tensor_parallel_size} on its {side} side: groups must divide {held}. "
        f"Groups that do: {fitting}{elsewhere}.",
    )
    require(
        heads is None or heads % group_size == 0,
        f"{flags} gives groups of {group_size} features, but the heads of {name} have {heads}: groups must divide "
        f"that, so that no head is mixed with another. Groups that do, at any layout: {fitting}.",
    )


def even_divisors(number: int) -> list[int]:
    """The even divisors of `number`, in ascending order."""
    return [size for size in range(2, number + 1, 2) if number % size == 0]
