"""What a folder must hold, compared with what it holds, before any weight is read."""

import re
from collections.abc import Mapping

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.hf_files import Source, listed

# Tensors of old or tied checkpoints that say nothing new.
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
TIED_OUTPUT = re.compile(r"^lm_head\.weight$")
# Names of the real number types in safetensors and in torch; anything else is a quantised checkpoint.
NUMBER_TYPES = frozenset({"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"})


def check_inventory(source: Source, expected: Mapping[str, tuple[int, ...]], tied_embeddings: bool) -> None:
    """Raise ConfigurationError naming every kind of fault: missing, extra, misshapen and quantised tensors."""
    headers = {name: h for name, h in source.headers.items() if not _is_harmless(name, expected, tied_embeddings)}
    found = {name: headers[name] for name in expected if name in headers}
    faults = {
        "missing": [name for name in expected if name not in headers],
        "not part of this model": [name for name in headers if name not in expected],
        "of the wrong shape": [
            f"{name} {list(header.shape)} instead of {list(expected[name])}"
            for name, header in found.items()
            if header.shape != expected[name]
        ],
        "of an unsupported number type": [
            f"{name} {header.dtype}" for name, header in found.items() if header.dtype not in NUMBER_TYPES
        ],
    }
    told = [f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names]
    if told:
        raise ConfigurationError(f"the tensors in {source.folder} do not fit its config.json. " + "; ".join(told) + ".")


def _is_harmless(name: str, expected: Mapping[str, tuple[int, ...]], tied_embeddings: bool) -> bool:
    if name in expected:
        return False
    return bool(HARMLESS.search(name)) or (tied_embeddings and bool(TIED_OUTPUT.match(name)))
