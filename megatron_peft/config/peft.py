"""The registry of fine-tuning methods, and the configuration that is made of their flags."""

from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points

from megatron_peft.config.errors import Requirements, flag_of, spelled
from megatron_peft.config.methods import Method, PeftOptions

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
        package = point.dist.name if point.dist else __package__
        try:
            method: Method = point.load()
        except Exception as error:
            unusable[point.name] = f"it is in the installed package {package}, which cannot be imported: {error!r}."
            continue
        if method.name in found:
            unusable[method.name] = f"the installed package {package} has one of the same name: uninstall that package."
        found.setdefault(method.name, method)
    return found, unusable


METHODS, _UNUSABLE = _load_methods()


def _option_classes() -> list[type[PeftOptions]]:
    """The dataclasses of all methods' flags, without those that another one inherits, in reverse order.

    dataclasses collect fields from the last base to the first, so fields are in the order of the methods.
    """
    every = list(dict.fromkeys(options for method in METHODS.values() for options in method.options))
    return [one for one in reversed(every) if not any(issubclass(other, one) for other in every if other is not one)]


class _Checks(PeftOptions):
    """What `PeftConfig` adds to the flags."""

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.fields()
            require(bool(self.target_modules), "--peft-target-modules needs at least one name.")
            known, reason = self.method in METHODS, _UNUSABLE.get(self.method)
            require(reason is None, f"--peft-method {self.method} cannot be used: {reason}")
            require(known or bool(reason), f"--peft-method {self.method} is not one of {', '.join(METHODS)}.")
            if known:
                self.spec.check(self, require)

    @property
    def spec(self) -> Method:
        """The method's declaration."""
        return METHODS[self.method]

    @property
    def trains_adapters(self) -> bool:
        return bool(self.spec.adapter)

    @property
    def unused_flags(self) -> list[str]:
        """Flags that were set and that the method does not read, with their values."""
        used = self.spec.fields(self)
        unused = [one for one in fields(self) if one.name not in used and getattr(self, one.name) != one.default]
        return [spelled(flag_of(one), getattr(self, one.name)) for one in unused]


@dataclass(frozen=True)
class PeftConfig(_Checks, *_option_classes()):
    """Which parameters are trained, and the flags of every method.

    Fields that the chosen method does not read keep their values and have no effect.
    """
