"""Which modules an adapter_config.json means, with which rank and alpha: asked of Hugging Face PEFT itself."""

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, require_packages

SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")
ALL_LINEAR = r".*(?<!lm_head)(?<!embed_tokens)"  # of the modules that have an adapter in any run


def is_targeted(settings: Mapping[str, Any], module: str) -> bool:
    """Return True if HF PEFT puts an adapter with these settings on the module of this full name.

    Raises ConfigurationError: PEFT is not installed, or a pattern is not a regular expression.
    """
    require_packages("peft", "peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = settings.get("target_modules") or []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = ALL_LINEAR
    config = SimpleNamespace(target_modules=targets, **{name: settings.get(name) for name in SELECTION})
    try:
        return bool(check_target_module_exists(config, module))
    except re.error as error:
        raise ConfigurationError(
            f"{ADAPTER_CONFIG}: the regular expression {error.pattern!r} cannot be used ({error}): list the modules "
            f"by name."
        ) from error


def of_module(settings: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """Return the module's value of `rank_pattern` or `alpha_pattern`, or else that of `r` or `lora_alpha`."""
    from peft.utils.other import get_pattern_key

    values = settings.get(patterns) or {}
    return values.get(get_pattern_key([*values], module), settings.get(default))
