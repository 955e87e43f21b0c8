"""`megatron-peft demo`, as a script."""

import sys

from megatron_peft.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
