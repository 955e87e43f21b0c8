#!/usr/bin/env python3
"""Fine-tune a pretrained model with Megatron's arguments: torchrun --nproc-per-node N pretrain_peft.py --help"""

import sys

from megatron_peft.commands.train import main

if __name__ == "__main__":
    sys.exit(main(program="pretrain_peft.py"))
