"""`megatron-peft sync`, as a script."""

import sys

from megatron_peft.commands.sync import main

if __name__ == "__main__":
    sys.exit(main())
