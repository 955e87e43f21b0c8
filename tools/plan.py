"""`megatron-peft plan`, as a script."""

import sys

from megatron_peft.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
