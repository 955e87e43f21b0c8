"""Which linear layers are adapted, by name, and how large they are.

Target names: Megatron's (`linear_qkv`), Hugging Face's for the model's family (`q_proj`: the fused layer that holds it
is adapted as a whole), full names (`decoder.layers.3.mlp.linear_fc1`) and shell wildcards over all three
(`decoder.layers.1?.*`, `*_proj`). Layer numbers are those of the whole model, from 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from megatron_peft.config.errors import require

Side = Literal["output", "input"]  # of y = W x


@dataclass(frozen=True)
class LinearSizes:
    """Sizes of y = W x, W [out_features, in_features], split over tensor-parallel ranks."""

    split: Literal["column", "row"]  # of the rows of W (the output), or of its columns (the input)
    out_features: int  # of the whole matrix
    in_features: int
    tensor_parallel_size: int
    num_parts: int = 1  # matrices stacked along the output; a rank holds its slice of each. 2: [gate; up] of fc1
    head_features: int | None = None  # of an attention head, if the output consists of heads

    @property
    def local_out_features(self) -> int:
        """Output features that a rank holds."""
        return self.out_features // self.tensor_parallel_size if self.split == "column" else self.out_features

    @property
    def local_in_features(self) -> int:
        """Input features that a rank holds."""
        return self.in_features // self.tensor_parallel_size if self.split == "row" else self.in_features

    def num_features(self, side: Side) -> int:
        """Number of features of the whole matrix."""
        return self.out_features if side == "output" else self.in_features

    def num_local_features(self, side: Side) -> int:
        """Number of features of one stacked matrix on a rank; groups of features must divide it."""
        return self.local_out_features // self.num_parts if side == "output" else self.local_in_features


def is_targeted(name: str, patterns: Sequence[str], modules: Mapping[str, str]) -> bool:
    """Whether any of `patterns` (--peft-target-modules) means the layer of this global name.

    `modules` maps Hugging Face's names of linear layers to the last part of Megatron's.
    """
    return any(_matches(name, pattern, modules) for pattern in patterns)


def require_matches(patterns: Sequence[str], names: Sequence[str], modules: Mapping[str, str]) -> None:
    """Raises ConfigurationError for patterns that match no layer of the whole model, with what there is."""
    require(bool(names), "the model has no linear layer to adapt.")
    lost = [pattern for pattern in patterns if not any(_matches(name, pattern, modules) for name in names)]
    endings = sorted({name.rpartition(".")[2] for name in names})
    foreign = f" (Hugging Face: {', '.join(modules)})" if modules else ""
    require(
        not lost,
        f"--peft-target-modules {' '.join(lost)} matches no linear layer. There are {', '.join(endings)}{foreign}, "
        f"with full names {names[0]} ... {names[-1]}; wildcards * ? [] work.",
    )


def _matches(name: str, pattern: str, modules: Mapping[str, str]) -> bool:
    module = name.rpartition(".")[2]
    parts = [part for part, layer in modules.items() if layer == module]
    return any(fnmatchcase(meant, pattern) for meant in (name, module, *parts))
