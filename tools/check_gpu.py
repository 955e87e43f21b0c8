"""`megatron-peft check-gpu`, as a script."""

import sys

from megatron_peft.commands.check_gpu import main

if __name__ == "__main__":
    sys.exit(main())
