"""Show what training will see of its data: samples token by token, lengths, truncation, packing, steps per epoch.

megatron-peft data preview --train-data-path data.jsonl --tokenizer-model FOLDER --seq-length 2048

All other flags, and files of --config, are those of `megatron-peft train`: a run's own line or file shows its data.
"""

from megatron_peft.cli.command import Command
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config.model import PreviewOptions


def run(settings: PreviewOptions, run_flags: RunFlags) -> int:
    """Print the preview."""
    # The flags of a run on several ranks are accepted by one process.
    environ = {"WORLD_SIZE": str(run_flags.replica_size)}
    given = run_flags.values["config"].get("pretrained_checkpoint")  # it is needed for its tokenizer only
    config = run_flags.config(environ, saved=lambda typed: {} if given else {"pretrained_checkpoint": "(none)"})
    settings.check_data(config.data)
    from megatron_peft.data.preview import Preview, show  # with numpy: a wrong flag is told at once

    sizes = config.global_batch_size, config.training.micro_batch_size
    show(Preview(config.data, settings, config.model.pretrained_checkpoint if given else None, *sizes))
    return 0


main = Command("data preview", __doc__, PreviewOptions, run, takes_run_flags=True)
