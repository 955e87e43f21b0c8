"""`megatron-peft report`, as a script."""

import sys

from megatron_peft.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
