"""Parameter-efficient fine-tuning of language models over tensor- and pipeline-parallel ranks, on megatron-core.

For models and training loops of one's own (docs/your-own-model.md):

    PeftConfig            method, targets and numbers; fields have the names of the flags
    add_adapters          puts adapters into a GPTModel and returns a ModelAdapters
    ModelAdapters         what a training loop calls
    support_cpu           lets megatron-core run without a GPU
    ConfigurationError    what can be mended by whoever calls

They are imported when they are first used: `import megatron_peft` needs no torch.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_peft.config import ConfigurationError as ConfigurationError
    from megatron_peft.config import PeftConfig as PeftConfig
    from megatron_peft.runtime.cpu import install as support_cpu
    from megatron_peft.training.model_adapters import ModelAdapters as ModelAdapters
    from megatron_peft.training.model_adapters import add_adapters as add_adapters

__all__ = ["ConfigurationError", "ModelAdapters", "PeftConfig", "add_adapters", "support_cpu"]

_PLACES = {
    "ConfigurationError": "megatron_peft.config:ConfigurationError",
    "ModelAdapters": "megatron_peft.training.model_adapters:ModelAdapters",
    "PeftConfig": "megatron_peft.config:PeftConfig",
    "add_adapters": "megatron_peft.training.model_adapters:add_adapters",
    "support_cpu": "megatron_peft.runtime.cpu:install",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return resolve_name(_PLACES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
