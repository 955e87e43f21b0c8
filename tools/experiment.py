"""`megatron-peft experiment`, as a script."""

import sys

from megatron_peft.commands.experiment import main

if __name__ == "__main__":
    sys.exit(main())
