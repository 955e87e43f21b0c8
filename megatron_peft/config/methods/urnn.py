"""uRNN, eq. (10)-(12) and Algorithm 1: flags, checks and cost. The adapter is `adapters/urnn.py`."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements, option, require
from megatron_peft.config.methods.rotation import RotationMethod, RotationOptions, check_groups
from megatron_peft.config.targets import LinearSizes


@dataclass(frozen=True)
class UrnnOptions(RotationOptions):
    """Unitary blocks over pairs of features."""

    urnn_block_size: int = option(
        64, "real features that are rotated together; two of them form a complex one", check="positive"
    )
    urnn_update: Literal["structured", "riemannian"] = option(
        "structured",
        "structured: phases and reflections are trained; riemannian: the unitary blocks, by the exponential map with "
        "the plain gradient (needs its own learning rate: --peft-lr-rotation)",
    )
    urnn_mode: Literal["multiply", "replace"] = option(
        "multiply", "replace DISCARDS the pretrained weight of square layers and puts a unitary one in its place"
    )


class UrnnMethod(RotationMethod):
    """uRNN: a unitary rotation over pairs of features, eq. (10)-(12)."""

    name = "urnn"
    summary = "Q W, Q block-diagonal and unitary over pairs of features"
    options = (UrnnOptions,)
    adapter = "megatron_peft.adapters.urnn"
    whole_update_flags = "--urnn-update riemannian"
    cost = "7 out / 2; riemannian: out n, n = half the block size (input side: in)"
    demo_lr = 3e-3

    def num_parameters(self, peft: UrnnOptions, out_features: int, in_features: int) -> int:
        features = out_features if peft.rotation_side == "output" and not self.replaces_base(peft) else in_features
        return features * 7 // 2 if peft.urnn_update == "structured" else features * peft.urnn_block_size // 2

    def check(self, peft: UrnnOptions, require: Requirements) -> None:
        require(
            peft.urnn_block_size % 2 == 0,
            f"--urnn-block-size is {peft.urnn_block_size}; two real features make a complex one: use an even size.",
        )

    def check_layer(self, peft: UrnnOptions, sizes: LinearSizes, name: str) -> None:
        if not self.replaces_base(peft):
            super().check_layer(peft, sizes, name)
            return
        require(
            sizes.split == "row" and sizes.out_features == sizes.in_features,
            f"--urnn-mode replace needs square layers, but {name} is {sizes.out_features} x {sizes.in_features}: "
            f"give --peft-target-modules linear_proj, which is square where the heads fill the hidden size, or use "
            f"--urnn-mode multiply.",
        )
        check_groups(sizes, "input", self.group_size(peft), name, self.group_flags(peft))

    def group_size(self, peft: UrnnOptions) -> int:
        return peft.urnn_block_size

    def group_flags(self, peft: UrnnOptions) -> str:
        return f"--urnn-block-size {peft.urnn_block_size}"

    def replaces_base(self, peft: UrnnOptions) -> bool:
        return peft.urnn_mode == "replace"

    def updates_whole_parameters(self, peft: UrnnOptions) -> bool:
        """Eq. (11)-(12)."""
        return peft.urnn_update == "riemannian"


URNN = UrnnMethod()
