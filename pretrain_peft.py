#!/usr/bin/env python3
"""Fine-tune a pretrained model with Megatron's arguments: torchrun --nproc-per-node N pretrain_peft.py --help"""

import os
import signal
import sys
from pathlib import Path

from megatron_peft.cli.parser import parse_arguments
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape


def shape_of(folder: str) -> ModelShape:
    """Of --pretrained-checkpoint. Without a config.json it may be a checkpoint of Megatron's, which torch must read."""
    if not Path(folder).is_dir() or Path(folder, "config.json").is_file():
        return read_shape(folder)
    from megatron_peft.conversion.pretrained import read_model_shape

    return read_model_shape(folder)


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one line of ours, not ninety of C++ frames
    config = parse_arguments(read_shape=shape_of)

    # Imported after the arguments were read: --help and a wrong flag answer at once.
    from megatron_peft.runtime.failure import run_together
    from megatron_peft.runtime.launch import world
    from megatron_peft.training.run import finetune

    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(lambda: finetune(config), program="pretrain_peft.py")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while nothing has begun
        print("pretrain_peft.py: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
