#!/usr/bin/env python3
"""Fine-tune a pretrained model with Megatron's arguments: torchrun --nproc-per-node N pretrain_peft.py --help"""

import sys

from megatron_peft.commands.train import main
from megatron_peft.runtime.exit_signals import ends_with_reader

if __name__ == "__main__":
    with ends_with_reader():
        exit_code = main(program="pretrain_peft.py")
    sys.exit(exit_code)
