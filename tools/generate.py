"""`megatron-peft generate`, as a script."""

import sys

from megatron_peft.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
