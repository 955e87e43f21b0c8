"""What BOFT, uRNN and the Hybrid have in common: a block-diagonal rotation of one side of the weight."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_peft.config.errors import flag, option, require, spelled
from megatron_peft.config.methods import LinearSizes, Method, ParamGroup, PeftOptions

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

    group_fields: tuple[str, ...]  # that set g
    whole_update: tuple[str, str]  # field and value with which `updates_whole_parameters`

    # Not decayed, since the identity need not be at zero.
    param_groups = (
        ParamGroup(IS_ROTATION, lambda peft, lr: peft.peft_lr_rotation or lr, is_decayed=False, is_labelled=True),
    )

    def group_size(self, peft: Any) -> int:
        """g, features of a block of R."""
        raise NotImplementedError

    def updates_whole_parameters(self, peft: Any) -> bool:
        name, value = self.whole_update
        return getattr(peft, name) == value

    def late_updates(self, peft: Any) -> list[str]:
        name, value = self.whole_update
        return [spelled(flag(name), value)] if self.updates_whole_parameters(peft) else []

    def check_layer(self, peft: Any, sizes: LinearSizes, name: str) -> None:
        """Groups of features must divide what a rank holds of a layer, or the features of an attention head."""
        size, side = self.group_size(peft), "input" if self.replaces_base(peft) else peft.rotation_side
        tp, parts = sizes.tensor_parallel_size, sizes.num_parts if side == "output" else 1
        heads = sizes.head_features if side == "output" else None
        held = heads or sizes.num_local_features(side)
        whole = heads or sizes.num_features(side) // parts
        where = f"per rank at --tensor-model-parallel-size {tp} on its {side} side"
        if heads:
            where = "in each attention head"
        flags = " with ".join(spelled(flag(name), getattr(peft, name)) for name in self.group_fields)
        fitting = ", ".join(str(number) for number in range(2, held + 1, 2) if held % number == 0)
        ranks = ", ".join(str(ranks) for ranks in range(1, tp + 1) if whole % (ranks * size) == 0)
        elsewhere = f"; groups of {size} fit at --tensor-model-parallel-size {ranks}" if ranks else ""
        require(
            held % size == 0,
            f"{flags} gives groups of {size} features, but {name} holds {held} {where}: groups must divide {held}. "
            f"Groups that do: {fitting}{elsewhere}.",
        )
