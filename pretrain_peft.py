#!/usr/bin/env python3
"""Fine-tune a pretrained model with Megatron's arguments: torchrun --nproc-per-node N pretrain_peft.py --help"""

from megatron_peft.arguments import parse_arguments
from megatron_peft.models.huggingface import read_shape


def main() -> None:
    config = parse_arguments(read_shape=read_shape)

    # Imported after the arguments were read: --help and a wrong flag answer at once.
    from megatron_peft.runtime.failure import run_together
    from megatron_peft.runtime.launch import world
    from megatron_peft.training.finetune import finetune

    with world(config.parallel):
        run_together(lambda: finetune(config), program="pretrain_peft.py")


if __name__ == "__main__":
    main()
