"""Parameter-efficient fine-tuning of language models over tensor- and pipeline-parallel ranks, on megatron-core."""

import sys
import warnings
from importlib.util import find_spec, spec_from_file_location

# Names that stand in people's task files and experiments -> the module that holds their code now.
MOVED = {
    "megatron_peft.demo.experiment_data": "megatron_peft.demo.data",
    "megatron_peft.evaluation.humaneval": "megatron_peft.evaluation.task_metrics",
}


class _MovedModules:
    """Finds a module by the name that it had, for `import` and for `python -m`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        now = find_spec(MOVED[name]) if name in MOVED else None
        return now and spec_from_file_location(name, now.origin)


sys.meta_path.append(_MovedModules)  # type: ignore[arg-type]  # after all others: a module that is there comes first

# megatron-core's warnings on every rank about optional packages and its own defaults, in whatever order it is imported.
for message in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=message)
