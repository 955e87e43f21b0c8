"""Give a running vLLM server the newest adapter of a run, and with --follow each later one.

megatron-peft sync --load RUN --server http://localhost:8000 --follow

Each version is served as RUN-ITERATION, from a folder of its own. What the engine binds of it is checked first, then it
is loaded, a prompt's log-probabilities are compared with our own model's, and the version before is unloaded. A version
that is refused leaves the one before in its place. --nproc-per-node N, with the layout flags of `megatron-peft train`,
splits our own model. See docs/moving-weights.md.
"""

from megatron_peft.cli.command import Command, start_ranks
from megatron_peft.cli.launch import tell_loading
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config.evaluation import SyncSettings


def run(settings: SyncSettings, run_flags: RunFlags) -> int:
    """Sync."""
    ended = start_ranks("sync", run_flags)
    if ended is not None:
        return ended
    tell_loading()
    from megatron_peft.evaluation.model import run_on_a_model
    from megatron_peft.evaluation.sync import sync_run

    run_on_a_model(sync_run, settings, run_flags)
    return 0


main = Command("sync", __doc__, SyncSettings, run, takes_run_flags=True)
