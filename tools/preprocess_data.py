"""`megatron-peft data preprocess`, as a script."""

import sys

from megatron_peft.commands.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
