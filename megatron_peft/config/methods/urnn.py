"""uRNN, eq. (10)-(12) and Algorithm 1: flags, checks and cost. The adapter is `adapters/urnn.py`."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import option, require
from megatron_peft.config.methods import LinearSizes
from megatron_peft.config.methods.rotation import RotationMethod, RotationOptions


@dataclass(frozen=True)
class UrnnOptions(RotationOptions):
    """Unitary blocks over pairs of features."""

    urnn_block_size: int = option(64, "real features rotated together; two of them form a complex one", check="even")
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
    group_fields = ("urnn_block_size",)
    whole_update = ("urnn_update", "riemannian")  # eq. (11)-(12)
    cost = "7 out / 2; riemannian: out n, n = half the block size (input side: in)"

    def num_parameters(self, peft: UrnnOptions, out_features: int, in_features: int) -> int:
        features = out_features if peft.rotation_side == "output" and not self.replaces_base(peft) else in_features
        return features * 7 // 2 if peft.urnn_update == "structured" else features * peft.urnn_block_size // 2

    def check_layer(self, peft: UrnnOptions, sizes: LinearSizes, name: str) -> None:
        require(
            not self.replaces_base(peft) or sizes.split == "row" and sizes.out_features == sizes.in_features,
            f"--urnn-mode replace needs square layers, but {name} is {sizes.out_features} x {sizes.in_features}: give "
            f"--peft-target-modules linear_proj, square where heads fill the hidden size, or --urnn-mode multiply.",
        )
        super().check_layer(peft, sizes, name)

    def group_size(self, peft: UrnnOptions) -> int:
        return peft.urnn_block_size

    def replaces_base(self, peft: UrnnOptions) -> bool:
        return peft.urnn_mode == "replace"


URNN = UrnnMethod()
