"""What each of the demo's ranks does: train, score the trained model, put the base back, and score that.

python -m megatron_peft.demo.ranks FOLDER FLAGS writes FOLDER/after.json and FOLDER/before.json; FLAGS are those of
pretrain_peft.py. Training comes first, so that its first loss is soon there, and is continued if it was stopped.
"""

import os
import signal
import sys
from pathlib import Path

from megatron_peft.demo.waiting import PROGRAM, waiting


def main() -> None:
    """Train and score a run: the folder of the scores, then flags of pretrain_peft.py."""
    tells = os.environ.get("RANK", "0") == "0"
    try:
        _train_and_score(*sys.argv[1:], tells=tells)
    except KeyboardInterrupt:  # while nothing has begun
        if tells:
            print(f"{PROGRAM}: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)


def _train_and_score(folder: str, *flags: str, tells: bool) -> None:
    with waiting("loading torch and megatron-core", tells):
        from megatron.core.utils import unwrap_model

        from megatron_peft.cli.parser import parse_arguments
        from megatron_peft.demo.run import AFTER, BEFORE, MOST_NEW_TOKENS
        from megatron_peft.demo.scoring import score_model
        from megatron_peft.evaluation.model import restore_base
        from megatron_peft.runtime.failure import run_together
        from megatron_peft.runtime.launch import world
        from megatron_peft.training.metrics import METRICS_FILE, read_metrics
        from megatron_peft.training.run import finetune

    config = parse_arguments(flags, program=PROGRAM)

    def train_and_score() -> None:
        trained = finetune(config)
        if trained.state.position.iteration < trained.data.train_iters:
            raise KeyboardInterrupt  # it was asked to stop, and has saved
        # Training ends with a validation: of all held-out messages, unless --eval-iters said otherwise.
        last = read_metrics(Path(str(config.checkpoint.save), METRICS_FILE))[-1]
        loss = last.get("validation_loss") if config.training.eval_iters is None else None
        limit = MOST_NEW_TOKENS
        score_model(trained, "scoring the trained model", Path(folder, AFTER), loss=loss, max_new_tokens=limit)
        restore_base(unwrap_model(trained.state.model_chunks), config, trained.state.shape)
        score_model(trained, "scoring the base model", Path(folder, BEFORE), max_new_tokens=limit)

    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(train_and_score, program=PROGRAM)


if __name__ == "__main__":
    main()
