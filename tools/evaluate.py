"""`megatron-peft evaluate`, as a script."""

import sys

from megatron_peft.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
