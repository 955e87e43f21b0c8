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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from inspect import get_annotations
from typing import TYPE_CHECKING, Any

from megatron_peft.config.errors import Requirements, flag_of, option, spelled
from megatron_peft.config.model import DataConfig, ModelConfig, ParallelConfig
from megatron_peft.config.training import CheckpointConfig, LoggingConfig, OptimizerSettings, TrainingConfig

if TYPE_CHECKING:
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
        starts_from_gradients: whether LoRA-GA's start initializes A and B.
    """

    name: str
    summary: str
    options: tuple[type[PeftOptions], ...] = ()
    ignored: tuple[str, ...] = ()
    adapter: str = ""
    cost: str
    param_groups: tuple[ParamGroup, ...] = ()
    starts_from_gradients: bool = False

    def describe(self, peft: Any) -> str:
        """The flags that select the method, for messages."""
        return f"--peft-method {self.name}"

    def fields(self, peft: Any) -> set[str]:
        """Fields of `PeftConfig` that the method reads; the others have no effect."""
        own = {one.name for options in self.options for one in fields(options)} | {"method"}
        return (own | {"target_modules"} if self.adapter else own) - set(self.ignored)

    def num_parameters(self, peft: Any, out_features: int, in_features: int) -> int:
        """Trained parameters of one adapted linear layer, over all ranks."""
        raise NotImplementedError

    def check(self, peft: Any, require: Requirements) -> None:
        """What the method requires of its own fields, beyond their `check`."""

    def check_run(self, peft: Any, run: "RunConfig", require: Requirements) -> None:
        """What the method requires of the rest of the run: layout, precision, overlap."""

    def check_layer(self, peft: Any, layout: Any, name: str) -> None:
        """What the method requires of a layer.

        Args:
            layout: `parallel.layout.LinearLayout` of the layer.
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

    def updates_whole_parameters(self, peft: Any) -> bool:
        """Whether a step ends with an update of whole parameters on every rank, after the optimizer's own.

        Then modules of the adapter that have `project()` are projected after each step, and those that have
        `move(before, gradient, learning_rate)` update their `moved` parameter in place of the optimizer.
        """
        return False


class FullMethod(Method):
    name = "full"
    summary = "every parameter of the model; megatron-core's own layers"
    cost = "out in"

    def num_parameters(self, peft: PeftOptions, out_features: int, in_features: int) -> int:
        return out_features * in_features


FULL = FullMethod()


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

    def note(self, peft: Any) -> str:
        """A note to print after the export, ending in a newline, or an empty string."""
        return ""


# The registry, and the configuration that is made of the flags of every method.

GROUP = "megatron_peft.methods"  # entry points of other packages
BUILT_IN = (
    "megatron_peft.config.methods:FULL",
    "megatron_peft.config.methods.low_rank:LORA",
    "megatron_peft.config.methods.low_rank:LORA_GA",
    "megatron_peft.config.methods.boft:BOFT",
    "megatron_peft.config.methods.urnn:URNN",
    "megatron_peft.config.methods.hybrid:HYBRID",
)


def _load_methods() -> tuple[dict[str, Method], dict[str, str]]:
    """Every method by name, and why others cannot be used; a broken package is no error unless its method is chosen."""
    found: dict[str, Method] = {}
    unusable: dict[str, str] = {}
    for point in (*(EntryPoint(path, path, GROUP) for path in BUILT_IN), *entry_points(group=GROUP)):
        package = f"the installed package {point.dist.name}" if point.dist else "megatron_peft"
        try:
            method = point.load()
            problem = _problem_of(method, found)
        except Exception as error:
            unusable[point.name] = f"{package} has it, but cannot be imported: {error!r}."
            continue
        if problem:
            unusable[getattr(method, "name", point.name)] = f"{package} has it, but {problem}."
        else:
            found[method.name] = method
    return found, unusable


def _problem_of(method: Any, others: Mapping[str, Method]) -> str:
    """Why a declaration cannot stand beside the others; empty if it can."""
    if not isinstance(method, Method):
        return f"declares {method!r}, which is not a Method"
    if method.name in others:
        return f"so has {type(others[method.name]).__module__}: uninstall that package"
    known = {kind for other in others.values() for options in other.options for kind in options.__mro__}
    known |= {*PeftOptions.__mro__, *SECTIONS}
    taken = {one.name for kind in known if is_dataclass(kind) for one in fields(kind)}
    for options in method.options:
        if not (is_dataclass(options) and issubclass(options, PeftOptions)):
            return f"{options!r} is not a dataclass derived from PeftOptions"
        own = {name for kind in options.__mro__ if kind not in known for name in get_annotations(kind)}
        if own & taken:
            return f"its field {min(own & taken)} is one of another method, or of the run"
        bare = [one.name for one in fields(options) if "help" not in one.metadata]
        if bare:
            return f"its field {bare[0]} is not declared with option()"
    try:
        type("_Trial", tuple(_option_classes([*others.values(), method])), {})
    except TypeError as error:
        return f"its options cannot be combined with those of other methods: {error}"
    return ""


def _option_classes(methods: Iterable[Method]) -> list[type[PeftOptions]]:
    """The dataclasses of all methods' flags, without those that another one inherits, in reverse order.

    dataclasses collect fields from the last base to the first, so fields are in the order of the methods.
    """
    every = list(dict.fromkeys(options for method in methods for options in method.options))
    return [one for one in reversed(every) if not any(issubclass(other, one) for other in every if other is not one)]


METHODS, _UNUSABLE = _load_methods()


class _Checks(PeftOptions):
    """Validation and derived properties of `PeftConfig`."""

    def __post_init__(self) -> None:
        reason = _UNUSABLE.get(self.method)
        with Requirements(self) as require:
            require(reason is None, f"--peft-method {self.method} cannot be used: {reason}")
            known = self.method in METHODS
            require(known or reason is not None, f"--peft-method {self.method} is not one of {', '.join(METHODS)}.")
            require(bool(self.target_modules), "--peft-target-modules needs at least one name.")
            if known:
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


@dataclass(frozen=True)
class PeftConfig(_Checks, *_option_classes(METHODS.values())):
    """Which parameters are trained, and the flags of every method.

    Fields that the chosen method does not read keep their values and have no effect.
    """
