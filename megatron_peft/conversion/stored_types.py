"""Number types by their names: in safetensors, in torch and on the command line."""

import torch

from megatron_peft.config import require

SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_TYPES.values()}
WRITABLE = ("float32", "bfloat16", "float16")


def stored_type(name: str) -> torch.dtype:
    """Of a tensor's header, by the name that its file format uses."""
    return (SAFETENSORS_TYPES | TORCH_TYPES)[name]


def type_flag(name: str | None) -> torch.dtype | None:
    """Value of --dtype. ConfigurationError lists the names."""
    require(name is None or name in WRITABLE, f"--dtype {name} is none of {', '.join(WRITABLE)}.")
    return None if name is None else TORCH_TYPES[name]
