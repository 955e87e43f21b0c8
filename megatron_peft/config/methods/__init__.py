"""What a fine-tuning method declares, which methods there are, and `PeftConfig`, which is made of their flags.

Nothing in this folder imports torch, so `--help` answers at once.

A method is an instance of a subclass of `Method`: its name, the dataclasses of the flags that it reads, its checks, its
parameter groups in the optimizer and its cost. The module that `adapter` names does the work, with torch:

    build(layout, peft, name, seed, dtype) -> nn.Module      the adapter of one linear layer; its forward is the layer's
    merge(weight, tensors, peft) -> Tensor                   the base weight [out, in] with the adapter merged into it
    change(tensors, peft) -> WeightChange                    what it adds to the weight, by rows, for --as-lora; without
                                                             it the merged weight is compared with the base's
    EXPORT: PeftFormat                                       if Hugging Face PEFT has the method; else left out

`tensors` maps the names of the adapter's parameters and buffers to whole tensors, whatever layout they were trained at.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from megatron_peft.config.errors import ConfigurationError, Requirements, flag_of, option, require, spelled

if TYPE_CHECKING:
    from torch import Tensor

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
        return self.out_features // self.tensor_parallel_size if self.split == "column" else self.out_features

    @property
    def local_in_features(self) -> int:
        return self.in_features // self.tensor_parallel_size if self.split == "row" else self.in_features

    def num_features(self, side: Side) -> int:
        return self.out_features if side == "output" else self.in_features

    def num_local_features(self, side: Side) -> int:
        """Number of features of one stacked matrix on a rank; groups of features must divide it."""
        return self.local_out_features // self.num_parts if side == "output" else self.local_in_features


# Which linear layers are adapted, by name: Megatron's (`linear_qkv`), Hugging Face's for the model's family (`q_proj`:
# the fused layer that holds it is adapted as a whole), full names (`decoder.layers.3.mlp.linear_fc1`), and wildcards
# over all three (`decoder.layers.1?.*`, `*_proj`). Layer numbers are those of the whole model, from 0.


def is_targeted(name: str, patterns: Sequence[str], modules: Mapping[str, str]) -> bool:
    """Whether any of `patterns` (--peft-target-modules) means the layer of this global name.

    `modules` maps Hugging Face's names of linear layers to the last part of Megatron's.
    """
    module = name.rpartition(".")[2]
    names = (name, module, *(part for part, layer in modules.items() if layer == module))
    return any(fnmatchcase(meant, pattern) for meant in names for pattern in patterns)


def require_matches(patterns: Sequence[str], names: Sequence[str], modules: Mapping[str, str]) -> None:
    """Raises ConfigurationError for patterns that match no layer of the whole model, with what there is."""
    require(bool(names), "the model has no linear layer to adapt.")
    lost = [pattern for pattern in patterns if not any(is_targeted(name, [pattern], modules) for name in names)]
    endings = sorted({name.rpartition(".")[2] for name in names})
    foreign = f" (Hugging Face: {', '.join(modules)})" if modules else ""
    require(
        not lost,
        f"--peft-target-modules {' '.join(lost)} matches no linear layer. There are {', '.join(endings)}{foreign}, "
        f"with full names {names[0]} ... {names[-1]}; wildcards * ? [] work.",
    )


LINEAR_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class PeftOptions:
    """What is trained, for every method. Subclasses add the flags of methods; `PeftConfig` inherits all of them."""

    method: str = option("lora", "fine-tuning method", flags=("--peft-method",), may_change=True)
    target_modules: tuple[str, ...] = option(
        LINEAR_MODULES,
        "layers to adapt: linear_qkv linear_proj linear_fc1 linear_fc2, Hugging Face names (a fused layer is adapted "
        "as a whole) or wildcards",
        flags=("--peft-target-modules",),
        may_change=True,  # the adapted layers are compared instead
    )


@dataclass(frozen=True)
class ParamGroup:
    """A parameter group of the optimizer: the parameters on which the adapter set `attribute` to True."""

    attribute: str
    learning_rate: Callable[[Any, float], float] | None = None  # (peft, --lr) -> its peak; None: --lr. --min-lr scales
    is_decayed: bool = True
    is_labelled: bool = False  # the optimizer's group carries the attribute too, so that its rate can be looked up


class Method:
    """One value of --peft-method. Subclasses set the attributes and override the checks that they need."""

    name: str  # value of --peft-method
    summary: str  # one line for docs/methods.md
    options: tuple[type[PeftOptions], ...] = ()  # dataclasses of the flags that the method reads
    ignored: tuple[str, ...] = ()  # fields of these dataclasses that it does not read
    adapter: str = ""  # module of `build`, `merge` and `EXPORT`; empty: the base weights themselves are trained
    cost: str  # trained parameters of one layer, as a formula for docs/methods.md; `num_parameters` computes it
    param_groups: tuple[ParamGroup, ...] = ()  # of the optimizer
    demo_lr: float = 3e-3  # of `megatron-peft demo`, which trains a Llama of 135M parameters
    starts_from_gradients: bool = False  # whether LoRA-GA's start initializes A and B
    mixes: bool = False  # whether adapters have a lambda, `mix` and `num_kept`, that `update_mixtures` moves

    def describe(self, peft: Any) -> str:
        """The flags that select the method, for messages."""
        return f"--peft-method {self.name}"

    def fields(self, peft: Any) -> set[str]:
        """Fields of `PeftConfig` that the method reads; the others have no effect."""
        names = {field.name for options in self.options for field in fields(options)} | {"method"}
        return (names | {"target_modules"} if self.adapter else names) - set(self.ignored)

    def variants(self) -> Sequence[Mapping[str, Any]]:
        """Fields of `PeftConfig` with which it reads different flags, for the tables of the documents."""
        return ({},)

    def num_parameters(self, peft: Any, out_features: int, in_features: int) -> int:
        """Trained parameters of one adapted linear layer, over all ranks."""
        raise NotImplementedError

    def check(self, peft: Any, require: Requirements) -> None:
        """What the method requires of its own fields, beyond their `check`."""

    def check_run(self, peft: Any, run: Any, require: Requirements) -> None:
        """What the method requires of the rest of the run, a `RunConfig`: layout, precision, overlap."""
        late = " and ".join(self.late_updates(peft))
        require(
            not (late and run.optimizer.overlap_param_gather),
            f"{late}: changes whole parameters at the end of a step, before --overlap-param-gather has gathered them.",
        )

    def late_updates(self, peft: Any) -> list[str]:
        """Flags that change whole parameters after the optimizer's step."""
        return []

    def check_layer(self, peft: Any, sizes: LinearSizes, name: str) -> None:
        """What the method requires of a layer, whose global `name` is for the error, which says what sizes fit."""

    def subtracts_start(self, peft: Any) -> bool:
        """Whether B A starts away from zero, so that a frozen B0 A0 is subtracted to keep the pretrained function."""
        return False

    def replaces_base(self, peft: Any) -> bool:
        """Whether the pretrained weights of the adapted layers are not used at all."""
        return False

    def merge_interval(self, peft: Any) -> int | None:
        """Iterations after which each adapter's `merge_and_restart` is called; None: never."""
        return None

    def updates_whole_parameters(self, peft: Any) -> bool:
        """Whether modules of the adapter update whole parameters on every rank, after the optimizer's step.

        Those with `project()` are projected; `move(before, gradient, learning_rate)` updates the parameter `moved`.
        """
        return False


class FullMethod(Method):
    """Full fine-tuning: no adapters."""

    name = "full"
    summary = "every parameter of the model; megatron-core's own layers"
    cost = "out in"
    demo_lr = 3e-4

    def num_parameters(self, peft: PeftOptions, out_features: int, in_features: int) -> int:
        return out_features * in_features


FULL = FullMethod()


# What to do with an adapter that Hugging Face PEFT has no form for.
OTHER_EXPORTS = (
    "--as-lora exports a LoRA close to it; megatron-peft convert merge merges the adapters into their base, which any "
    "program opens"
)


class PeftFormat:
    """How Hugging Face PEFT stores a method's adapters. Names of tensors leave out the module, as `lora_A.weight`.

    `rows` are tensors over the output features: a fused layer's modules each get their own rows of these, and all of
    the other tensors.
    """

    rows: tuple[str, ...] = ()

    def config(self, peft: Any, target_modules: list[str]) -> dict[str, Any]:
        """Fields of adapter_config.json beyond those of every adapter. ConfigurationError: PEFT cannot express it.

        `target_modules` are names of the adapted modules, in the shortest form that PEFT understands.
        """
        raise NotImplementedError

    def shapes(self, config: Mapping[str, Any], out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's tensors by name, given adapter_config.json."""
        raise NotImplementedError

    def tensors(self, tensors: "Mapping[str, Tensor]", peft: Any, layer: str, out_features: int) -> "dict[str, Tensor]":
        """PEFT's tensors of a (fused) layer, from the adapter's own; `layer` is its name, for errors."""
        raise NotImplementedError

    def shared(self, peft: Any, sizes: "Mapping[str, tuple[int, int]]") -> "dict[str, Tensor]":
        """Tensors that all modules share, by whole name; `sizes`: (output, input) features of each module by name."""
        return {}

    def note(self, peft: Any) -> str:
        """A note to print after the export, ending in a newline, or an empty string."""
        return ""


# The registry, and the configuration that is made of the flags of every method.


GROUP = "megatron_peft.methods"  # entry points of other packages
BUILT_IN = (
    "megatron_peft.config.methods:FULL",
    "megatron_peft.config.methods.low_rank:LORA",
    "megatron_peft.config.methods.low_rank:LORA_GA",
    "megatron_peft.config.methods.rotation:BOFT",
    "megatron_peft.config.methods.rotation:URNN",
    "megatron_peft.config.methods.hybrid:HYBRID",
)


def _load_methods() -> dict[str, Method]:
    """Every method by name: ours, and those that installed packages announce.

    Packages are trusted. Where one cannot be loaded, whatever it raises goes on, with a note that names the package.
    """
    methods = {method.name: method for method in map(resolve_name, BUILT_IN)}
    # importlib.metadata takes a sixth of the time of --help: it is imported only if a package names the group.
    files = (file for folder in sys.path for file in Path(folder).glob("*-info/entry_points.txt"))
    if not any(GROUP.encode() in file.read_bytes() for file in files):
        return methods
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else "an installed package"
        try:
            method = point.load()
            require(method.name not in methods, f"there is a method {method.name} already: uninstall one of them.")
        except Exception as error:
            error.add_note(f"This is of the method {point.name} of the installed package {package}.")
            raise
        methods[method.name] = method
    return methods


METHODS = _load_methods()
# Names in other libraries -> the flags for the same here.
EQUIVALENTS = {
    "qlora": "lora with --base-precision nf4",
    "rslora": "lora with --lora-rs",
    "lora+": "lora with --lora-plus-ratio",
}
_options = list(dict.fromkeys(options for method in METHODS.values() for options in method.options))
_inherited = {base for options in _options for base in options.__mro__[1:]}
# In reverse: dataclasses collect fields from the last base to the first, so fields are in the order of the methods.
_bases = [options for options in reversed(_options) if options not in _inherited]


def _hint(method: str) -> str:
    """Return a hint for an unknown `--peft-method`."""
    if here := EQUIVALENTS.get(method.lower()):
        return f"; use {here}."
    near = get_close_matches(method, METHODS, 1)
    return f"; did you mean {near[0]}?" if near else "."


@dataclass(frozen=True)
class PeftConfig(*_bases):
    """Which parameters are trained, and the flags of every method.

    Fields that the chosen method does not read keep their values and have no effect. Their types are checked, their
    ranges are not.
    """

    def __post_init__(self) -> None:
        is_known = self.method in [*METHODS]  # a record may hold anything
        with Requirements(self) as require:
            known = ", ".join(METHODS)
            require(is_known, f"--peft-method {self.method} is not one of {known}{_hint(str(self.method))}")
            require(bool(self.target_modules), "--peft-target-modules needs at least one name.")
            if is_known:
                require.fields(self.spec.fields(self))
                self.spec.check(self, require)

    @property
    def spec(self) -> Method:
        return METHODS[self.method]

    @property
    def trains_adapters(self) -> bool:
        return bool(self.spec.adapter)

    @property
    def recorded_fields(self) -> list[str]:
        """What a run's record holds, so that it can be read without the packages of other methods."""
        used = self.spec.fields(self)
        return [f.name for f in fields(self) if f.name in used or getattr(self, f.name) != f.default]

    @property
    def unused_flags(self) -> list[str]:
        """Flags that were set and that the method does not read, with their values."""
        used, recorded = self.spec.fields(self), self.recorded_fields
        unused = [field for field in fields(self) if field.name not in used and field.name in recorded]
        return [spelled(flag_of(field), getattr(self, field.name)) for field in unused]
