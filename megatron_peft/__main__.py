"""`python -m megatron_peft COMMAND` is `megatron-peft COMMAND`."""

import sys

from megatron_peft.commands.program import main

if __name__ == "__main__":
    sys.exit(main())
