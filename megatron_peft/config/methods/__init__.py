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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from importlib import import_module
from inspect import get_annotations
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_peft.config.errors import Check, ConfigurationError, Requirements, flag_of, option, spelled
from megatron_peft.config.model import DataConfig, ModelConfig
from megatron_peft.config.parallel import ParallelConfig
from megatron_peft.config.targets import LinearSizes
from megatron_peft.config.training import CheckpointConfig, LoggingConfig, OptimizerSettings, TrainingConfig

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor

    from megatron_peft.config.run import RunConfig

# Of a run, beside PeftConfig: the names of their fields are taken.
SECTIONS = (ModelConfig, ParallelConfig, DataConfig, TrainingConfig, OptimizerSettings, CheckpointConfig, LoggingConfig)
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
    """A parameter group of the optimizer: the parameters on which the adapter set `attribute` to True.

    Args:
        attribute: of the parameters.
        learning_rate: (peft, --lr) -> the group's peak rate; None: --lr. --min-lr is scaled by the same factor.
        is_decayed: whether weight decay applies.
        is_labelled: the optimizer's group carries the attribute too, so that its learning rate can be looked up.
    """

    attribute: str
    learning_rate: Callable[[Any, float], float] | None = None
    is_decayed: bool = True
    is_labelled: bool = False


class Method:
    """One value of --peft-method. Subclasses set the attributes and override the checks that they need.

    Attributes:
        name: value of --peft-method.
        summary: one line for docs/methods.md.
        options: dataclasses derived from `PeftOptions` with the flags that the method reads.
        ignored: fields of these dataclasses that it does not read.
        adapter: module of `build`, `merge` and `EXPORT`; empty: the base weights themselves are trained.
        cost: trained parameters of one layer, as a formula for docs/methods.md; `num_parameters` computes it.
        param_groups: in the optimizer.
        demo_lr: learning rate of `megatron-peft demo`, which trains a Llama of 135M parameters.
        starts_from_gradients: whether LoRA-GA's start initializes A and B.
        mixes: whether adapters have a lambda, `mix` and `num_kept`, that their `update_mixtures` moves after backward.
    """

    name: str
    summary: str
    options: tuple[type[PeftOptions], ...] = ()
    ignored: tuple[str, ...] = ()
    adapter: str = ""
    cost: str
    param_groups: tuple[ParamGroup, ...] = ()
    demo_lr: float = 3e-3
    starts_from_gradients: bool = False
    mixes: bool = False

    def describe(self, peft: Any) -> str:
        """The flags that select the method, for messages."""
        return f"--peft-method {self.name}"

    def fields(self, peft: Any) -> set[str]:
        """Fields of `PeftConfig` that the method reads; the others have no effect."""
        own = {one.name for options in self.options for one in fields(options)} | {"method"}
        return (own | {"target_modules"} if self.adapter else own) - set(self.ignored)

    def variants(self) -> Sequence[Mapping[str, Any]]:
        """Fields of `PeftConfig` with which it reads different flags, for the tables of the documents."""
        return ({},)

    def num_parameters(self, peft: Any, out_features: int, in_features: int) -> int:
        """Trained parameters of one adapted linear layer, over all ranks."""
        raise NotImplementedError

    def check(self, peft: Any, require: Requirements) -> None:
        """What the method requires of its own fields, beyond their `check`."""

    def check_run(self, peft: Any, run: "RunConfig", require: Requirements) -> None:
        """What the method requires of the rest of the run: layout, precision, overlap."""

    def check_layer(self, peft: Any, sizes: LinearSizes, name: str) -> None:
        """What the method requires of a layer.

        Args:
            sizes: of the layer.
            name: global name of the layer, for errors.

        Raises:
            ConfigurationError: with the sizes that fit.
        """

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
        """Whether a step ends with an update of whole parameters on every rank, after the optimizer's own.

        Then modules of the adapter that have `project()` are projected after each step, and those that have
        `move(before, gradient, learning_rate)` update their `moved` parameter in place of the optimizer.
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

    Args:
        rows: tensors over the output features. A fused layer's modules each get their own rows of them, and all of the
            other tensors.
    """

    def __init__(self, rows: tuple[str, ...] = ()) -> None:
        self.rows = rows

    def config(self, peft: Any, target_modules: list[str]) -> dict[str, Any]:
        """Fields of adapter_config.json beyond those of every adapter. ConfigurationError: PEFT cannot express it.

        Args:
            target_modules: names of the adapted modules, in the shortest form that PEFT understands.
        """
        raise NotImplementedError

    def shapes(self, config: Mapping[str, Any], out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a module's tensors by name, given adapter_config.json."""
        raise NotImplementedError

    def tensors(self, tensors: "Mapping[str, Tensor]", peft: Any, layer: str, out_features: int) -> "dict[str, Tensor]":
        """PEFT's tensors of a (fused) layer, from the adapter's own; `layer` is its name, for errors."""
        raise NotImplementedError

    def shared(self, peft: Any, sizes: "Mapping[str, tuple[int, int]]") -> "dict[str, Tensor]":
        """Tensors that the modules share, by whole name, as `base_model.vera_A`.

        Args:
            sizes: (output, input) features of every adapted module, by name.
        """
        return {}

    def note(self, peft: Any) -> str:
        """A note to print after the export, ending in a newline, or an empty string."""
        return ""


# The registry, and the configuration that is made of the flags of every method.


class _Checks(PeftOptions):
    """Validation and derived properties of `PeftConfig`."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ConfigurationError(f"--peft-method is {self.method!r}; it must be a string.")
        with Requirements(self) as require:
            require(self.method in METHODS and self.method not in _UNUSABLE, _why_not(self.method))
            require(bool(self.target_modules), "--peft-target-modules needs at least one name.")
            if self.method in METHODS:
                require.fields(self.spec.fields(self))
                self.spec.check(self, require)

    @property
    def spec(self) -> Method:
        """The method's declaration."""
        return METHODS[self.method]

    @property
    def trains_adapters(self) -> bool:
        return bool(self.spec.adapter)

    @property
    def unused_fields(self) -> list[Field[Any]]:
        """Fields that were set and that the method does not read."""
        used = self.spec.fields(self)
        return [one for one in fields(self) if one.name not in used and getattr(self, one.name) != one.default]

    @property
    def unused_flags(self) -> list[str]:
        """Their flags, with the values."""
        return [spelled(flag_of(one), getattr(self, one.name)) for one in self.unused_fields]

    @property
    def recorded_fields(self) -> list[str]:
        """What a run's record holds, so that it can be read without the packages of other methods."""
        names = self.spec.fields(self) | {one.name for one in self.unused_fields}
        return [one.name for one in fields(self) if one.name in names]


GROUP = "megatron_peft.methods"  # entry points of other packages
BUILT_IN = (
    "megatron_peft.config.methods:FULL",
    "megatron_peft.config.methods.low_rank:LORA",
    "megatron_peft.config.methods.low_rank:LORA_GA",
    "megatron_peft.config.methods.boft:BOFT",
    "megatron_peft.config.methods.urnn:URNN",
    "megatron_peft.config.methods.hybrid:HYBRID",
)


def _load_methods() -> tuple[dict[str, Method], dict[str, str], dict[str, str]]:
    """Every method by name, the packages of those that are not our own, and why others cannot be used.

    A broken package is no error unless its method is chosen.
    """
    found: dict[str, Method] = {method.name: method for method in _built_in_methods()}
    packages: dict[str, str] = {}
    unusable: dict[str, str] = {}
    for point in _entry_points():
        package = f"the installed package {point.dist.name}" if point.dist else "an installed package"
        method: Any = None
        try:
            method = point.load()
            problem = _problem_of(method, found)
        except (Exception, SystemExit) as error:
            problem = f"it cannot be loaded: {error!r}"
        if not problem:
            found[method.name], packages[method.name] = method, package
            continue
        # By the name that a user types, where it is known: the declaration's, else the entry point's.
        name = getattr(method, "name", None)
        if not isinstance(name, str):
            name = f"{point.name} (an entry point)" if point.name in found else point.name
        unusable[name] = f"{package} has it, but {problem}."
    return found, packages, unusable


def _built_in_methods() -> Iterator[Method]:
    """Ours; whatever is wrong with one is raised."""
    for path in BUILT_IN:
        module, _, name = path.partition(":")
        yield getattr(import_module(module), name)


def _entry_points() -> Iterable["EntryPoint"]:
    """Those of `GROUP`. importlib.metadata takes a sixth of the time of --help: only if a package names the group."""
    files = (file for folder in sys.path for file in Path(folder).glob("*-info/entry_points.txt"))
    if not any(GROUP.encode() in file.read_bytes() for file in files):
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


# Of a declaration, with what messages call their types.
ATTRIBUTES = {"name": str, "summary": str, "cost": str, "adapter": str}
TUPLES = {"options": type, "ignored": str, "param_groups": ParamGroup}


def _problem_of(method: Any, others: Mapping[str, Method]) -> str:
    """Why a declaration cannot stand beside the others; empty if it can. `cli.flags` looks at its flags."""
    if not isinstance(method, Method):
        return f"it declares {method!r}, which is not a Method"
    for name, kind in ATTRIBUTES.items():
        if not isinstance(getattr(method, name, None), kind):
            return f"its {name} is {getattr(method, name, None)!r}, not a string"
    for name, kind in TUPLES.items():
        value = getattr(method, name)
        if not isinstance(value, tuple) or not all(isinstance(one, kind) for one in value):
            return f"its {name} is {value!r}, not a tuple of {kind.__name__}"
    if method.name in others:
        return f"so has {type(others[method.name]).__module__}: uninstall that package"
    known = {kind for other in others.values() for options in other.options for kind in options.__mro__}
    known |= {*_Checks.__mro__}
    problems = (problem for options in method.options if (problem := _problem_of_options(options, known)))
    if problem := next(problems, ""):
        return problem
    try:
        type("_Trial", tuple(_option_classes([*others.values(), method])), {})
    except TypeError as error:
        return f"its options cannot be combined with those of other methods: {error}"
    return ""


def _problem_of_options(options: type, known: Collection[type]) -> str:
    """The same of one dataclass of flags, beside the `known` classes of which `PeftConfig` is made."""
    if not (is_dataclass(options) and issubclass(options, PeftOptions)):
        return f"{options!r} is not a dataclass derived from PeftOptions"
    own_classes = [kind for kind in options.__mro__ if kind not in known]
    names = {name for kind in own_classes for name in {*get_annotations(kind), *vars(kind)}}
    taken = {name for kind in known for name in dir(kind)} | {one.name for kind in SECTIONS for one in fields(kind)}
    taken |= {one.name for kind in known if is_dataclass(kind) for one in fields(kind)}
    clashes = {name for name in names & taken if not name.startswith("__")}
    if clashes:
        return f"its field {min(clashes)} is one of another method, or of the run"
    hints = get_type_hints(options)
    problems = ((one.name, _problem_of_field(one, hints[one.name])) for one in fields(options))
    return next((f"its field {name} {problem}" for name, problem in problems if problem), "")


def _problem_of_field(field: Field[Any], annotation: Any) -> str:
    """The same of one field."""
    declared = field.metadata
    if "help" not in declared or field.default is MISSING:
        return "is not declared with option()"
    if declared["check"] not in (None, *get_args(Check)):
        return f"has the check {declared['check']!r}; there are {', '.join(get_args(Check))}"
    if not _is_field_type(annotation):
        return f"is of type {annotation}, for which there is no flag"
    texts = [declared["help"], *(declared[name] or "" for name in ("group", "metavar"))]
    if not all(isinstance(one, str) for one in (*texts, *declared["flags"])) or isinstance(declared["flags"], str):
        return "has a help, group or metavar that is not a string, or flags that are not a tuple of strings"
    return ""


def _is_field_type(annotation: Any) -> bool:
    """Whether a flag can hold it: a number, a string, a switch, one of several words; None besides; several strings."""
    if get_origin(annotation) in (UnionType, Union):
        (annotation, *more) = [one for one in get_args(annotation) if one is not NoneType] or [NoneType]
        return not more and _is_field_type(annotation)
    if get_origin(annotation) is tuple:
        return get_args(annotation)[1:] == (...,) and get_args(annotation)[0] in (int, float, str)
    if get_origin(annotation) is Literal:
        return all(isinstance(word, str) for word in get_args(annotation))
    return annotation in (int, float, bool, str)


def _option_classes(methods: Iterable[Method]) -> list[type[PeftOptions]]:
    """The dataclasses of all methods' flags, without those that another one inherits, in reverse order.

    dataclasses collect fields from the last base to the first, so fields are in the order of the methods.
    """
    every = list(dict.fromkeys(options for method in methods for options in method.options))
    return [one for one in reversed(every) if not any(issubclass(other, one) for other in every if other is not one)]


METHODS, PACKAGES, _UNUSABLE = _load_methods()


def _why_not(name: str) -> str:
    """The message about a method that `METHODS` does not have."""
    if name in _UNUSABLE:
        return f"--peft-method {name} cannot be used: {_UNUSABLE[name]}"
    broken = "".join(f" {other} cannot be used: {why}" for other, why in _UNUSABLE.items())
    return f"--peft-method {name} is not one of {', '.join(METHODS)}.{broken}"


def refuse_method(name: str, problem: str) -> None:
    """Take the method of a package out of `METHODS`: whoever chooses it is told the problem."""
    del METHODS[name]
    _UNUSABLE[name] = f"{PACKAGES.pop(name)} has it, but {problem}."


def flagged_fields() -> list[str]:
    """Names of the fields of `PeftConfig` that belong to a method that can be used, or to all of them."""
    every = (PeftOptions, *(options for method in METHODS.values() for options in method.options))
    return list(dict.fromkeys(one.name for options in every for one in fields(options)))


@dataclass(frozen=True)
class PeftConfig(_Checks, *_option_classes(METHODS.values())):
    """Which parameters are trained, and the flags of every method.

    Fields that the chosen method does not read keep their values and have no effect. Their types are checked, their
    ranges are not.
    """
