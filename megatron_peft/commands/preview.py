"""Show what training will see of its data: samples token by token, lengths, truncation, packing, steps per epoch.

megatron-peft data preview --train-data-path data.jsonl --tokenizer-model FOLDER --seq-length 2048

All other flags, and files of --config, are those of `megatron-peft train`: a run's own line or file shows its data.
"""

from collections.abc import Mapping
from typing import Any

from megatron_peft.cli.command import Command
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config.model import PreviewOptions

NO_MODEL = "(none)"  # a model is needed for its tokenizer only


def run(settings: PreviewOptions, run_flags: RunFlags) -> int:
    """Print the preview."""
    # The flags of a run on several ranks are accepted by one process.
    environ = {"WORLD_SIZE": str(run_flags.replica_size)}
    config = run_flags.config(environ, saved=without_a_model)
    base = config.model.pretrained_checkpoint
    settings.check_data(config.data)
    from megatron_peft.data.preview import Preview, show  # with numpy: a wrong flag is told at once

    sizes = config.global_batch_size, config.training.micro_batch_size
    show(Preview(config.data, settings, None if base == NO_MODEL else base, *sizes))
    return 0


def without_a_model(typed: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a run needs and a preview does not."""
    return {} if typed.get("pretrained_checkpoint") else {"pretrained_checkpoint": NO_MODEL}


main = Command("data preview", __doc__, PreviewOptions, run, takes_run_flags=True)
