"""`megatron-peft bench`, as a script."""

import sys

from megatron_peft.commands.bench import main

if __name__ == "__main__":
    sys.exit(main())
