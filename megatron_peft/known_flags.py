"""Every flag that is known, served or not, and what to tell of one that is not served."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from megatron_peft.cli.flags import served_flags
from megatron_peft.cli.megatron import reason_of, refusal, refused_flags
from megatron_peft.config import flag
from megatron_peft.megatron_fields import SOURCES, megatron_fields

TYPO, NEAR = 0.85, 0.6  # likeness to a flag: a slip of the finger; worth asking about
FIELD_REASON = "a field of megatron-core that fine-tuning has no use for"


def known_flags() -> dict[str, str | None]:
    """Every flag that is known, with its dashes -> None if it is served, else why it is not.

    Besides Megatron-LM's own flags these are all fields of megatron-core's configuration classes, whatever its
    version: a field is served by a flag of `served_flags`, or it is refused; there is no third state.
    """
    of_fields = {
        name: reason_of(name[2:]) or reason_of(field_name.replace("_", "-")) or FIELD_REASON
        for name, field_name in _flags_of_fields()
    }
    refused = {f"--{name}": reason for name, reason in refused_flags().items()}
    return of_fields | refused | {name: None for served in served_flags() for name in served.names}


def why_not_served(name: str) -> str:
    """What to tell about a flag that is not served: refused by name, or not known at all."""
    known = known_flags()
    if reason := known.get(name):
        return refusal(name, reason)
    served = [other for other, reason in known.items() if reason is None]
    bare = name.lstrip("-")
    family = reason_of(bare) or reason_of(bare.removeprefix("no-"))
    if family and not _nearest(name, served, TYPO):
        return refusal(name, family)
    nearest = _nearest(name, known, TYPO) or _nearest(name, served, NEAR)
    if not nearest:
        return f"{name} is not a known flag; --help lists them."
    not_served = "" if known[nearest] is None else ", which is Megatron's and not served here"
    return f"{name} is not a known flag; did you mean {nearest}{not_served}?"


def _flags_of_fields() -> Iterator[tuple[str, str]]:
    """(flag, field): `--field`, Megatron's own names for it, and for a switch `--no-field` and `--disable-field`."""
    for class_name in SOURCES:
        for one in megatron_fields(class_name).values():
            prefixes = ("", "no_", "disable_") if one.annotation == "bool" else ("",)
            for name in (*(flag(prefix + one.name) for prefix in prefixes), *one.flags):
                yield name, one.name


def _nearest(name: str, others: Iterable[str], likeness: float) -> str | None:
    """The flag most like `name`, if it is at least so alike (0 to 1); dashes in front do not count."""
    found = get_close_matches(name.lstrip("-"), [other.lstrip("-") for other in others], 1, likeness)
    return f"--{found[0]}" if found else None
