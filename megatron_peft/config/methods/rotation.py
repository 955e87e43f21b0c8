"""BOFT, eq. (3)-(6), and uRNN, eq. (10)-(12) and Algorithm 1: flags, checks and cost, and what the Hybrid shares.

Each is a block-diagonal rotation of one side of the weight. The adapters are `adapters/boft.py` and `adapters/urnn.py`.
"""

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
        None,
        "learning rate of rotation parameters (default: --lr; with hybrid --lr / 8)",
        check="positive",
        may_change=True,
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


@dataclass(frozen=True)
class BoftOptions(RotationOptions):
    """Butterfly factors of orthogonal blocks."""

    boft_block_size: int = option(8, "b, the size of the orthogonal blocks", check="even")
    boft_factors: int = option(
        3, "m, the number of butterfly factors; groups of b 2^(m-1) features are rotated together", check="positive"
    )
    boft_parametrization: Literal["cayley", "projection"] = option(
        "cayley",
        "cayley: blocks are Cayley transforms; projection: the blocks themselves are trained, and each step ends at "
        "the nearest orthogonal ones",
    )


class BoftMethod(RotationMethod):
    """A rotation that is a product of butterfly factors."""

    name = "boft"
    summary = "R W, R a product of m butterfly factors with orthogonal b x b blocks"
    options = (BoftOptions,)
    adapter = "megatron_peft.adapters.boft"
    group_fields = ("boft_block_size", "boft_factors")
    whole_update = ("boft_parametrization", "projection")  # eq. (6)
    cost = "out m (b - 1) / 2; projection: out m b (input side: in)"
    demo_lr = 5e-4

    def num_parameters(self, peft: BoftOptions, out_features: int, in_features: int) -> int:
        features = out_features if peft.rotation_side == "output" else in_features
        numbers = features * peft.boft_factors * peft.boft_block_size  # of whole blocks
        return numbers if peft.boft_parametrization == "projection" else (numbers - features * peft.boft_factors) // 2

    def group_size(self, peft: BoftOptions) -> int:
        return peft.boft_block_size * 2 ** (peft.boft_factors - 1)


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
    """A unitary rotation over pairs of features."""

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


BOFT = BoftMethod()
URNN = UrnnMethod()
